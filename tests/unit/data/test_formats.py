from typing import Any

import orjson
import pytest

from megasft.data.conversation import BadRecordError, Category
from megasft.data.formats import FieldMap, parse

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def read(record: Any, **fields: str) -> list[tuple[str, str | None, bool]]:
    conversation = parse(orjson.dumps(record), FieldMap(**fields))
    return [(m.role, m.content, m.trained) for m in conversation.messages]


def reason_of(record: Any, **fields: str) -> str:
    with pytest.raises(BadRecordError) as caught:
        parse(record if isinstance(record, bytes) else orjson.dumps(record), FieldMap(**fields))
    return caught.value.reason


def test_messages_train_every_assistant_message() -> None:
    assert read({"messages": [USER, ASSISTANT]}) == [
        ("user", "Hi", False),
        ("assistant", "Hello", True),
    ]


def test_sharegpt_speakers_become_roles() -> None:
    record = {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "system": "Be kind.",
        "labels": [0, 1],
    }
    assert read(record) == [
        ("system", "Be kind.", False),
        ("user", "Hi", False),
        ("assistant", "Hello", True),
    ]


def test_two_plain_fields_make_a_conversation() -> None:
    record = {"question": "Hi", "answer": "Hello"}
    assert read(record, prompt_key="question", response_key="answer") == [
        ("user", "Hi", False),
        ("assistant", "Hello", True),
    ]


def test_labels_choose_among_assistant_messages_only() -> None:
    messages = [USER, ASSISTANT, USER, ASSISTANT]
    trained = [t for *_, t in read({"messages": messages, "labels": [1, 0, 1, 1]})]
    assert trained == [False, False, False, True]


@pytest.mark.parametrize("key", ["label", "labels", "loss"])
def test_a_message_may_carry_its_own_label(key: str) -> None:
    messages = [USER, {**ASSISTANT, key: 0}, USER, {**ASSISTANT, key: 1}]
    assert [t for *_, t in read({"messages": messages})] == [False, False, False, True]


def test_other_fields_of_a_message_reach_the_template_and_labels_do_not() -> None:
    calls = [{"function": {"name": "add"}}]
    record = {"messages": [USER, {"role": "assistant", "tool_calls": calls, "loss": 1}]}
    message = parse(orjson.dumps(record), FieldMap()).messages[1]
    assert message.as_dict(None) == {"role": "assistant", "content": None, "tool_calls": calls}


def test_category_of_meta_is_read_and_an_empty_name_is_none() -> None:
    record = {"messages": [USER, ASSISTANT], "meta": {"category_id": 3, "category_name": ""}}
    assert parse(orjson.dumps(record), FieldMap()).category == Category(3, None)


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("not JSON", b'{"messages": ['),
        ("not JSON", b'{"messages": "\xff"}'),
        ("not an object", ["a"]),
        ("missing field", {"text": "Hi"}),
        ("missing field", {"prompt": "Hi"}),
        ("missing field", {"messages": [{"content": "Hi"}, ASSISTANT]}),
        ("missing field", {"messages": [{"role": "user"}, ASSISTANT]}),
        ("missing field", {"conversations": [{"from": "gpt"}]}),
        ("wrong type", {"messages": {"role": "user"}}),
        ("wrong type", {"messages": ["Hi"]}),
        ("wrong type", {"messages": [{"role": "user", "content": ["Hi"]}, ASSISTANT]}),
        ("wrong type", {"messages": [USER, ASSISTANT], "tools": "add"}),
        ("unknown role", {"messages": [{"role": "narrator", "content": "Hi"}, ASSISTANT]}),
        ("unknown role", {"messages": [{"role": ["user"], "content": "Hi"}, ASSISTANT]}),
        ("unknown role", {"conversations": [{"from": "narrator", "value": "Hi"}]}),
        ("no assistant turn", {"messages": []}),
        ("no assistant turn", {"messages": [USER]}),
        ("nothing to train", {"messages": [USER, ASSISTANT], "labels": [1, 0]}),
        ("bad labels", {"messages": [USER, ASSISTANT], "labels": [1]}),
        ("bad labels", {"messages": [USER, ASSISTANT], "labels": [0, 2]}),
        ("bad labels", {"messages": [USER, {**ASSISTANT, "loss": 1}], "labels": [0, 1]}),
        ("bad labels", {"messages": [USER, {**ASSISTANT, "loss": 1, "label": 1}]}),
        ("bad category", {"messages": [USER, ASSISTANT], "meta": {"category_id": -1}}),
        ("bad category", {"messages": [USER, ASSISTANT], "meta": {"category_id": "1"}}),
        ("bad category", {"messages": [USER, ASSISTANT], "meta": {"category_name": 1}}),
    ],
)
def test_a_bad_record_names_its_reason(reason: str, record: Any) -> None:
    assert reason_of(record) == reason


def test_a_named_format_insists() -> None:
    assert reason_of({"messages": [USER, ASSISTANT]}, format="sharegpt") == "missing field"

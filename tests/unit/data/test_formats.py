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
        ("missing field", {"document": "Hi"}),
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
        ("missing field", {"messages": None}),
        ("missing field", {"prompt": "Hi", "response": None}),
        ("missing field", {"messages": [{"role": "user", "content": None}, ASSISTANT]}),
        ("wrong type", {"messages": [[USER, ASSISTANT]]}),
        ("wrong type", {"messages": [{"role": "user", "content": [["Hi"]]}, ASSISTANT]}),
        ("wrong type", {"messages": [{"role": "user", "content": []}, ASSISTANT]}),
        (
            "wrong type",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT]},
        ),
        ("wrong type", {"prompt": ["Hi"], "response": "Hello"}),
        ("wrong type", {"instruction": "a", "output": "b", "history": [["q"]]}),
        ("wrong type", {"instruction": "a", "output": "b", "history": "q"}),
        ("wrong type", {"instruction": "a", "output": "b", "history": 5}),
        ("record too long", b" " * (16 * 2**20 + 1)),
        ("bad labels", {"messages": [USER, ASSISTANT], "labels": [1]}),
        ("bad labels", {"messages": [USER, ASSISTANT], "labels": [0, -1]}),
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


def test_text_parts_are_joined_and_reasoning_stays_beside_them() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assistant = {"role": "assistant", "content": parts, "reasoning_content": "Greet."}
    message = parse(orjson.dumps({"messages": [USER, assistant]}), FieldMap()).messages[1]
    assert message.content == "Hello"
    assert message.extra == {"reasoning_content": "Greet."}


def test_a_tool_conversation_keeps_tools_calls_and_results() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        ASSISTANT,
    ]
    for given in (tools, orjson.dumps(tools).decode()):  # tables hold tools as text
        record = orjson.dumps({"messages": messages, "tools": given})
        conversation = parse(record, FieldMap())
        assert conversation.tools == tuple(tools)
        assert [m.as_dict(m.content) for m in conversation.messages] == messages


def test_alpaca_has_system_and_history_and_an_input_behind_the_instruction() -> None:
    record = {
        "instruction": "Add",
        "input": "1 and 2",
        "output": "3",
        "system": "Be kind.",
        "history": [["Hi", "Hello"]],
    }
    assert (
        read(record)
        == read(record, format="alpaca")
        == [
            ("system", "Be kind.", False),
            ("user", "Hi", False),
            ("assistant", "Hello", True),
            ("user", "Add\n1 and 2", False),
            ("assistant", "3", True),
        ]
    )
    assert read({"instruction": "Add", "input": "", "output": "3", "history": None}) == [
        ("user", "Add", False),
        ("assistant", "3", True),
    ]


@pytest.mark.parametrize(
    "pair",
    [
        ("prompt", "response"),
        ("prompt", "answer"),
        ("prompt", "completion"),
        ("question", "answer"),
    ],
)
def test_well_known_pairs_need_no_flag(pair: tuple[str, str]) -> None:
    record = {pair[0]: "Hi", pair[1]: "Hello"}
    for format in ("auto", "prompt"):
        assert read(record, format=format)[1] == ("assistant", "Hello", True)


def test_named_fields_come_before_well_known_ones() -> None:
    record = {"instruction": "a", "output": "b", "ask": "Hi", "reply": "Hello"}
    assert read(record, prompt_key="ask", response_key="reply")[0] == ("user", "Hi", False)


@pytest.mark.parametrize(
    ("train_on", "labels", "trained"),
    [
        ("all-turns", None, [1, 3]),
        ("all-turns", [0, 0, 0, 1], [3]),
        ("last-turn", None, [3]),
        ("last-turn", [0, 1, 0, 1], [3]),
        ("labels", [1, 1, 0, 0], [1]),
    ],
)
def test_train_on_chooses_among_the_turns(
    train_on: str, labels: list[int] | None, trained: list[int]
) -> None:
    record = {"messages": [USER, ASSISTANT, USER, ASSISTANT], "labels": labels}
    flags = [t for *_, t in read(record, train_on=train_on)]
    assert [i for i, t in enumerate(flags) if t] == trained


def test_train_on_labels_takes_a_messages_own_label_and_a_null_one_is_none() -> None:
    messages = [USER, {**ASSISTANT, "loss": None}, USER, {**ASSISTANT, "loss": 1}]
    flags = [t for *_, t in read({"messages": messages}, train_on="labels")]
    assert flags == [False, False, False, True]


def test_a_record_with_nothing_left_to_train_is_refused() -> None:
    messages = [USER, ASSISTANT, USER, ASSISTANT]
    assert reason_of({"messages": messages}, train_on="labels") == "nothing to train"
    record = {"messages": messages, "labels": [0, 1, 0, 0]}
    assert reason_of(record, train_on="last-turn") == "nothing to train"


@pytest.mark.parametrize(
    ("value", "category"),
    [("maths", Category(name="maths")), (7, Category(7)), (None, Category()), ("", Category())],
)
def test_a_category_may_have_a_field_of_its_own(value: Any, category: Category) -> None:
    record = {"messages": [USER, ASSISTANT], "source": value, "meta": {"category_id": 3}}
    assert parse(orjson.dumps(record), FieldMap(category_key="source")).category == category


def test_a_category_field_of_another_type_is_refused() -> None:
    record = {"messages": [USER, ASSISTANT], "source": ["maths"]}
    assert reason_of(record, category_key="source") == "bad category"


def test_bytes_that_are_not_utf_8_are_found() -> None:
    with pytest.raises(BadRecordError, match=r"byte 14 is not UTF-8 \(0xff\)"):
        parse(b'{"messages": "\xff"}', FieldMap())

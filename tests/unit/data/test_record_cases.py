"""What a record says is honoured or refused, in every format and whatever the key is called."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import orjson
import pytest

from megasft.data.build import BuildOptions, Tally, build
from megasft.data.conversation import BadRecordError, Conversation
from megasft.data.formats import FieldMap, parse
from megasft.data.tokenize import Made, Recipe, Tokenizer
from megasft.store import open_store
from tests.tiny_tokenizer import make_tokenizer
from tests.unit.data.conftest import QWEN_LIKE

Record = dict[str, Any]
Turn = tuple[str, str, dict[str, Any]]  # question, answer, other keys of the answer


@pytest.fixture(scope="module")
def trained(calls_dir: Path, calls_tokenizer: Tokenizer) -> Callable[[Record], list[str]]:
    """Returns the text of each trained turn."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(calls_dir)

    def texts(record: Record) -> list[str]:
        (made,) = calls_tokenizer.make([(1, orjson.dumps(record))])
        assert isinstance(made, Made), made
        tokens, turns = made.sample
        return [hf.decode(tokens[a : a + n]) for a, n, *_ in turns.tolist()]

    return texts


def read(record: Any, **fields: str) -> Conversation:
    data = record if isinstance(record, bytes) else orjson.dumps(record)
    return parse(data, FieldMap(**fields))


def said(record: Any, **fields: str) -> list[tuple[str, str | None, bool]]:
    return [(m.role, m.content, m.trained) for m in read(record, **fields).messages]


def refusal(record: Any, **fields: str) -> BadRecordError:
    with pytest.raises(BadRecordError) as caught:
        read(record, **fields)
    return caught.value


def as_messages(turns: list[Turn]) -> Record:
    return {"messages": _listed(turns, "role", ("user", "assistant"), "content")}


def as_sharegpt(turns: list[Turn]) -> Record:
    return {"conversations": _listed(turns, "from", ("human", "gpt"), "value")}


def as_messages_under_conversations(turns: list[Turn]) -> Record:
    return {"conversations": _listed(turns, "role", ("user", "assistant"), "content")}


def as_json_text(turns: list[Turn]) -> Record:
    return {"messages": orjson.dumps(as_messages(turns)["messages"]).decode()}


def as_json_texts(turns: list[Turn]) -> Record:
    return {"messages": [orjson.dumps(m).decode() for m in as_messages(turns)["messages"]]}


def as_firefly(turns: list[Turn]) -> Record:
    return {"conversation": [{"human": q, "assistant": a, **more} for q, a, more in turns]}


def as_moss(turns: list[Turn]) -> Record:
    return {
        "chat": {
            f"turn_{i}": {
                "Human": f"<|Human|>: {q}<eoh>\n",
                "MOSS": f"<|MOSS|>: {a}<eom>\n",
                **more,
            }
            for i, (q, a, more) in enumerate(turns, start=1)
        }
    }


def as_completion(turns: list[Turn]) -> Record:
    messages = as_messages(turns)["messages"]
    return {"prompt": messages[:1], "completion": messages[1:]}


def _listed(turns: list[Turn], who: str, names: tuple[str, str], what: str) -> list[Record]:
    return [
        {who: name, what: text, **more}
        for question, answer, more_of_answer in turns
        for name, text, more in (
            (names[0], question, {}),
            (names[1], answer, more_of_answer),
        )
    ]


WRITERS: Final = (
    as_messages, as_sharegpt, as_messages_under_conversations, as_json_text, as_json_texts,
    as_firefly, as_moss, as_completion,
)  # fmt: skip
KEYS: Final = (
    "weight", "train", "training", "trainable", "loss", "loss_mask", "step_loss_mask",
    "loss_scale", "loss_weight", "label", "labels",
)  # fmt: skip
LIMA: Final[list[Turn]] = [
    ("Capital of Peru?", "Quito, of course.", {}),
    ("Are you sure?", "Sorry: it is Lima.", {}),
    ("Thank you", "You are welcome.", {}),
]


@pytest.mark.parametrize("writer", WRITERS)
def test_every_label_key_means_the_same_in_every_format_and_place(
    writer: Callable[[list[Turn]], Record],
) -> None:
    num_seen = 0
    for key, (no, yes), untrained in itertools.product(
        KEYS, ((0, 1), (False, True), (0.0, 1.0)), ({0}, {1}, {2}, {0, 2})
    ):
        turns = [(q, a, {key: no if i in untrained else yes}) for i, (q, a, _) in enumerate(LIMA)]
        conversation = read(writer(turns))
        assert [m.content for m in conversation.messages] == [t for q, a, _ in LIMA for t in (q, a)]
        answers = [m.trained for m in conversation.messages if m.role == "assistant"]
        assert answers == [i not in untrained for i in range(3)], (key, untrained)
        assert not any(m.extra for m in conversation.messages)
        num_seen += 1
    assert num_seen >= 50


def test_an_answer_of_weight_0_is_no_turn_and_not_counted(
    trained: Callable[[Record], list[str]],
) -> None:
    turns = [(q, a, {"weight": int(i > 0)}) for i, (q, a, _) in enumerate(LIMA[:2])]
    assert trained(as_messages(turns)) == ["Sorry: it is Lima.<|im_end|>"]


def test_an_ambiguous_mask_is_reported_as_unread(calls_dir: Path, tmp_path: Path) -> None:
    tally = _build(tmp_path, calls_dir, as_messages([("Hi", "Yo", {"mask": 0})]))
    assert [(k.place, k.key) for k in tally.unread] == [("message", "mask")]


SYSTEM: Final = "You answer in French only."


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record",
    [
        *(writer(LIMA) for writer in WRITERS),
        {"prompt": "Hello", "response": "Bonjour"},
        {"instruction": "Hello", "output": "Bonjour"},
        {"input": "Hello", "target": "Bonjour"},
    ],
)
def test_a_system_prompt_beside_any_format_becomes_the_first_message(
    record: Record, key: str
) -> None:
    given = read({key: SYSTEM, **record}).messages
    assert (given[0].role, given[0].content, given[0].trained) == ("system", SYSTEM, False)
    assert given[1:] == read(record).messages


def test_a_system_prompt_that_repeats_the_first_message_stands_there_once() -> None:
    messages = [{"role": "system", "content": SYSTEM}, *as_messages(LIMA)["messages"]]
    assert [role for role, *_ in said({"system": SYSTEM, "messages": messages})[:2]] == [
        "system",
        "user",
    ]
    assert refusal({"system": "Be kind.", "messages": messages}).reason == "system given twice"
    both = {"system": SYSTEM, "system_prompt": "Be kind.", **as_messages(LIMA)}
    assert refusal(both).reason == "system given twice"


CALL: Final = {"name": "get_weather", "arguments": {"city": "Oslo"}}
TOOL_CALL: Final = {"type": "function", "function": CALL}


@pytest.mark.parametrize(
    "asks",
    [
        {"from": "gpt", "value": "", "tool_calls": [TOOL_CALL]},
        {"from": "gpt", "value": "", "tool_calls": orjson.dumps([TOOL_CALL]).decode()},
        {"role": "assistant", "content": "", "tool_calls": [orjson.dumps(TOOL_CALL).decode()]},
        {"from": "function_call", "value": orjson.dumps(CALL).decode()},
        {"from": "function_call", "value": orjson.dumps([CALL]).decode()},
        {"role": "tool_call", "content": orjson.dumps(CALL).decode()},
        {"role": "assistant", "content": "", "function_call": CALL},
    ],
)
@pytest.mark.parametrize("result", ["observation", "tool", "function"])
def test_tools_are_called_in_every_format_as_in_messages(
    asks: Record, result: str, trained: Callable[[Record], list[str]]
) -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            asks,
            {"from": result, "value": "-3"},
            {"from": "gpt", "value": "Cold."},
        ]
    }
    called = read(record).messages[1]
    assert (called.role, called.content, called.trained) == ("assistant", "", True)
    assert called.extra == {"tool_calls": [TOOL_CALL]}
    assert read(record).messages[2].role == "tool"
    call = '<call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</call>'
    assert trained(record) == [f"{call}<|im_end|>", "Cold.<|im_end|>"]


def test_a_call_that_is_no_call_is_refused() -> None:
    for value in ("get_weather", '"get_weather"', '{"arguments": {}}', "[1]"):
        turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
        assert refusal({"conversations": turns}).reason == "wrong type"


def test_thinking_of_sharegpt_is_trained(trained: Callable[[Record], list[str]]) -> None:
    record = as_sharegpt([("2+2", "4", {"reasoning_content": "two and two make four"})])
    assert trained(record) == ["<think>\ntwo and two make four\n</think>\n\n4<|im_end|>"]


def test_functions_become_tools() -> None:
    function = {"name": "get_weather", "parameters": {}}
    wrapped = ({"type": "function", "function": function},)
    for given in ([function], orjson.dumps([function]).decode(), [orjson.dumps(function).decode()]):
        assert read({**as_messages(LIMA), "functions": given}).tools == wrapped
    both = {**as_messages(LIMA), "functions": [function], "tools": [*wrapped]}
    assert refusal(both).reason == "wrong type"


@pytest.mark.parametrize(
    "key", ["images", "image", "audios", "audio", "videos", "video", "image_url", "image_path"]
)
def test_images_audio_and_video_are_refused_wherever_they_stand(key: str) -> None:
    for record in (
        {**as_messages(LIMA), key: ["x.png"]},
        {"prompt": "What is it?", "response": "A cat", key: "x.png"},
        as_sharegpt([("<image>What is it?", "A cat", {key: ["x.png"]})]),
    ):
        assert refusal(record).reason == "media"
    assert len(said({**as_messages(LIMA), key: []})) == 6  # a table's empty column


def test_arguments_of_the_template_come_from_the_record_and_from_the_build(
    calls_dir: Path, trained: Callable[[Record], list[str]]
) -> None:
    record = as_messages([("2+2", "4", {})])
    as_text = {**record, "chat_template_kwargs": '{"level": 12345678901234567890123}'}
    assert read(as_text).template_kwargs == {"level": 12345678901234567890123}
    own = {**record, "chat_template_kwargs": {"enable_thinking": False}}
    merged = read(own, template_kwargs='{"enable_thinking": true, "level": 3}')
    assert merged.template_kwargs == {"enable_thinking": False, "level": 3}
    assert read(record, template_kwargs='{"level": 3}').template_kwargs == {"level": 3}
    assert trained(own) == ["4<|im_end|>"]
    for wrong in (["x"], "x", {"messages": []}):
        assert refusal({**record, "chat_template_kwargs": wrong}).reason == "wrong type"


def test_keys_that_nobody_reads_are_counted_once_with_their_first_line(
    calls_dir: Path, tmp_path: Path
) -> None:
    turn: Turn = ("Hi", "Yo", {"importance": 3, "name": "me", "reasoning_content": "Hm"})
    records = [
        as_messages([("Hi", "Yo", {})]),
        {**as_messages([turn]), "score": 1, "source": None, "first_prompt": "Hi"},
        {**as_messages([turn]), "score": 2},
    ]
    tally = _build(tmp_path, calls_dir, *records)
    place = f"{tmp_path / 'chats.jsonl'}:2"
    assert {(k.place, k.key): tuple(seen) for k, seen in tally.unread.items()} == {
        ("record", "score"): (2, place),
        ("message", "importance"): (2, place),
    }
    listed = open_store(tmp_path / "store").meta["unread_keys"]
    assert [item["key"] for item in listed] == ["importance", "score"]


def test_a_key_is_read_if_a_template_reads_it(calls_dir: Path, tmp_path: Path) -> None:
    record = as_messages([("Hi", "Yo", {"importance": 3})])
    reading = "{% for m in messages %}{{ m['importance'] }}{% endfor %}" + QWEN_LIKE
    other = make_tokenizer(tmp_path / "other", chat_template=reading)
    assert not _build(tmp_path, other, record).unread


@pytest.mark.parametrize(
    ("more", "has_fields"),
    [
        ({}, False),
        ({"reasoning_content": "Hm"}, False),
        ({"reasoning_content": "Hm", "name": "<|im_end|>"}, True),
        ({"thinking": ["Hm"]}, True),
        ({"tool_calls": []}, True),
    ],
)
def test_a_record_is_known_to_hold_nothing_but_contents_and_thinking(
    more: dict[str, Any], has_fields: bool
) -> None:
    assert read(as_messages([("Hi", "Yo", more)])).has_fields == has_fields
    assert read({**as_messages([("Hi", "Yo", more)]), "tools": [{"name": "f"}]}).has_fields


def _build(tmp_path: Path, folder: Path, *records: Record) -> Tally:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    options = BuildOptions((file,), tmp_path / "store", Recipe(folder), overwrite=True)
    return build(options, on_bytes=lambda n: None, on_rejected=lambda place, why: None)


@pytest.mark.parametrize(
    ("record", "said_by_user"),
    [
        ({"instruction": "", "input": "Add 1 and 2", "output": "3"}, ["Add 1 and 2"]),
        ({"instruction": None, "input": "Add 1 and 2", "output": "3"}, ["Add 1 and 2"]),
        ({"instruction": "Add", "input": "1 and 2", "output": "3"}, ["Add\n1 and 2"]),
        (
            {"instruction": "Human:Hi\nAssistant:Yo\nHuman:1+2?\nAssistant:", "output": "3"},
            ["Hi", "1+2?"],
        ),
        ({"instruction": "Human:Hi\nSo?", "output": "3"}, ["Human:Hi\nSo?"]),
        ({"prompt": [{"role": "user", "content": "1+2?"}], "completion": "3"}, ["1+2?"]),
        ({"kind": "maths", "input": "1+2?", "target": "3"}, ["1+2?"]),
    ],
)
def test_formats_of_published_data_become_conversations(
    record: Record, said_by_user: list[str]
) -> None:
    messages = read(record).messages
    assert [m.content for m in messages if m.role == "user"] == said_by_user
    assert (messages[-1].role, messages[-1].content, messages[-1].trained) == (
        "assistant",
        "3",
        True,
    )


def test_answers_in_a_prompt_of_messages_are_not_trained_unless_they_say_so() -> None:
    prompt = as_messages(LIMA[:2])["messages"]
    record = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Lima."}]}
    assert [trained for role, _, trained in said(record) if role == "assistant"] == [0, 0, 1]
    prompt[1]["weight"] = 1
    assert [trained for role, _, trained in said(record) if role == "assistant"] == [1, 0, 1]


def test_moss_keeps_its_thoughts_and_refuses_its_plugins() -> None:
    turn = {"Human": "<|Human|>: Hi<eoh>", "Inner Thoughts": "<|Inner Thoughts|>: Greet.<eot>",
            "Commands": "<|Commands|>: None<eoc>", "MOSS": "<|MOSS|>: Yo<eom>"}  # fmt: skip
    record = {"meta_instruction": "Be kind.", "chat": {"turn_10": turn, "turn_9": turn}}
    messages = read(record).messages
    assert [m.content for m in messages] == ["Be kind.", "Hi", "Yo", "Hi", "Yo"]
    assert messages[2].extra == {"reasoning_content": "Greet."}
    turn["Commands"] = '<|Commands|>: Search("x")<eoc>'
    assert refusal(record).reason == "not supported"

"""Numbers above 0 as labels of messages: the weights of their turns, from record to store."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from megasft.data.build import BuildOptions, build
from megasft.data.conversation import BadRecordError
from megasft.data.formats import FieldMap, parse
from megasft.data.render import RenderOptions
from megasft.data.tokenize import Made, Recipe, Tokenizer
from megasft.errors import DataError
from megasft.schema import turn_weights_of
from megasft.store import open_store
from megasft.turn_records import WeightRange
from tests.tiny_tokenizer import make_tokenizer
from tests.unit.data.test_record_cases import (
    KEYS,
    LIMA,
    QWEN_LIKE,
    WRITERS,
    Record,
    Turn,
    as_messages,
    read,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("weights"), chat_template=QWEN_LIKE)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_number_above_0_is_the_weight_of_its_answer_in_every_format(
    writer: Callable[[list[Turn]], Record],
) -> None:
    num_seen = 0
    for key, weights in itertools.product(
        KEYS, ([0.5, 1, 2], [0.1, 0, 1e-3], [3, True, 1e30], [False, 0.25, 0.0], [2**60, 1.5, 1])
    ):
        turns = [(q, a, {key: w}) for (q, a, _), w in zip(LIMA, weights, strict=True)]
        answers = [m for m in read(writer(turns)).messages if m.role == "assistant"]
        assert [m.weight if m.trained else 0 for m in answers] == weights, (key, weights)
        assert not any(m.extra for m in answers)
        num_seen += 1
    assert num_seen >= 50


def test_a_turn_has_the_weight_of_its_message_in_the_store(folder: Path, tmp_path: Path) -> None:
    turns = [(q, a, {"weight": w}) for (q, a, _), w in zip(LIMA, (0.1, 0, 2), strict=True)]
    plain: list[Turn] = [("Hi", "Yo", {})]
    listed = as_messages(LIMA) | {"labels": [0, 0.5, 0, 1, 0, 4]}

    file = tmp_path / "chats.jsonl"
    records = (as_messages(turns), as_messages(plain), listed)
    file.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    options = BuildOptions((str(file),), tmp_path / "store", Recipe(folder))
    build(options, on_bytes=lambda n: None, on_rejected=lambda place, why: None)

    store = open_store(options.output)
    found = [turn_weights_of(store.sample(i).turns).tolist() for i in range(3)]
    assert found == [[float(np.float32(0.1)), 2.0], [1.0], [0.5, 1.0, 4.0]]
    assert store.weights == WeightRange(4, float(np.float32(0.1)), 4.0)


def test_everything_trained_is_one_turn_of_weight_1(folder: Path) -> None:
    fields = FieldMap(train_on="everything")
    record = as_messages([(q, a, {"weight": 3}) for q, a, _ in LIMA])
    (made,) = Tokenizer(Recipe(folder, fields=fields)).make([(1, orjson.dumps(record))])
    assert isinstance(made, Made)
    assert turn_weights_of(made.sample.turns).tolist() == [1.0]


def test_what_is_left_of_a_turn_without_its_thinking_keeps_its_weight(folder: Path) -> None:
    rendering = RenderOptions(mask_thinking=True)
    thinks = {"reasoning_content": "Hm.", "weight": 0.5}
    record = as_messages([("Hi", "Yo", thinks), ("Bye", "See you", {})])
    (made,) = Tokenizer(Recipe(folder, rendering=rendering)).make([(1, orjson.dumps(record))])
    assert isinstance(made, Made)
    assert turn_weights_of(made.sample.turns).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    "weight",
    [-1, -0.5, "0", "0.5", "true", [1], {}, math.nan, math.inf, -math.inf, 3.5e38, 1e-39, 10**400],
)
def test_a_weight_that_is_no_number_float32_holds_is_refused_with_a_remedy(weight: Any) -> None:
    for record in (
        as_messages([("Hi", "Yo", {"weight": weight})]),
        as_messages([("Hi", "Yo", {})]) | {"labels": [0, weight]},
    ):
        with pytest.raises(BadRecordError) as caught:
            parse(json.dumps(record).encode(), FieldMap())
        assert caught.value.reason == "bad labels"
        assert caught.value.detail.endswith(
            "write 0 where nothing is to be trained, else 1 or the weight"
        )


def test_a_bad_weight_is_reported_with_its_line_and_value(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    records = [as_messages([("Hi", "Yo", {"weight": w})]) for w in (0.5, -2)]
    file.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    complaints: dict[str, str] = {}
    options = BuildOptions((str(file),), tmp_path / "store", Recipe(folder))
    with pytest.raises(DataError, match="1 of 2 records are bad"):
        build(options, on_bytes=lambda n: None, on_rejected=complaints.__setitem__)
    ((place, why),) = complaints.items()
    assert place == f"{file}:2"
    assert why.startswith("bad labels: a label or weight is 0") and "not -2;" in why

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megasft.checks.engine import Finding
from megasft.checks.run import stores
from megasft.checks.run.subject import Subject
from megasft.store import open_store
from tests.unit.checks.run.conftest import World, convert, write_store


def run_of(world: World, **changes: Any) -> Subject:
    paths: dict[str, Any] = {
        "megasft_data": [str(world.store)],
        "megasft_valid_data": None,
        "megasft_hf": str(world.model),
        "pretrained_checkpoint": None,
        "load": None,
    }
    args = SimpleNamespace(**(paths | changes))
    valid = {
        Path(path).name: SimpleNamespace(store=open_store(path))
        for path in args.megasft_valid_data or ()
    }
    train = SimpleNamespace(store=open_store(args.megasft_data[0]))
    data = SimpleNamespace(train=train, valid=valid)
    return cast(Subject, SimpleNamespace(args=args, data=data))


RULES = {
    name: getattr(stores, name)
    for name in (
        *("other_tokenizer", "uncomparable_tokenizer", "unknown_tokenizer", "unlike_validation"),
        *("unlike_template", "other_stop", "same_data"),
    )
}


def fired(subject: Subject) -> dict[str, list[Finding]]:
    found = {name: list(rule(subject)) for name, rule in RULES.items()}
    return {name: hits for name, hits in found.items() if hits}


def test_stores_of_the_models_tokenizer_are_not_remarked_on(run_world: World) -> None:
    assert fired(run_of(run_world, megasft_valid_data=[str(run_world.valid)])) == {}


def test_another_tokenizer_of_the_same_vocabulary_size_is_found(run_world: World) -> None:
    found = fired(run_of(run_world, megasft_data=[str(run_world.other)]))
    assert list(found) == ["other_tokenizer"]
    assert "2 of 512 ids differ; id 300 is" in found["other_tokenizer"][0].fact


def test_a_tokenizer_saved_again_is_the_same_one(run_world: World, tmp_path: Path) -> None:
    """Other releases write merges as pairs, and keys in another order; ids stay."""
    content = json.loads((run_world.tokenizer / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    content["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    assert merges and content["model"]["merges"] != merges
    model = convert(tmp_path / "again", run_world.tokenizer)
    (model / "hf" / "tokenizer.json").write_text(json.dumps(dict(reversed(content.items()))))

    assert fired(run_of(run_world, megasft_hf=str(model))) == {}


@pytest.mark.parametrize(
    ("part", "change", "difference"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "another pre-tokenizer"),
        ("normalizer", {"type": "NFC"}, "another normalizer"),
        ("model", {"merges": []}, "other merges"),
    ],
)
def test_the_same_ids_split_otherwise_are_another_tokenizer(
    run_world: World, tmp_path: Path, part: str, change: dict[str, Any], difference: str
) -> None:
    content = json.loads((run_world.tokenizer / "tokenizer.json").read_text())
    content[part] = {**(content[part] or {}), **change}
    model = convert(tmp_path / "changed", run_world.tokenizer)
    (model / "hf" / "tokenizer.json").write_text(json.dumps(content))

    found = fired(run_of(run_world, megasft_hf=str(model)))

    assert list(found) == ["other_tokenizer"]
    assert difference in found["other_tokenizer"][0].fact


def test_a_tokenizer_that_is_gone_cannot_be_compared_and_that_is_said(
    run_world: World, tmp_path: Path
) -> None:
    samples = [run_world_sample(run_world)]
    gone = write_store(tmp_path / "gone", samples, run_world.other_tokenizer, path="/nowhere")
    same = write_store(tmp_path / "same", samples, run_world.tokenizer, path="/nowhere")

    assert list(fired(run_of(run_world, megasft_data=[str(gone)]))) == ["uncomparable_tokenizer"]
    assert fired(run_of(run_world, megasft_data=[str(same)])) == {}


def test_a_folder_that_holds_another_tokenizer_by_now_is_not_compared(
    run_world: World, tmp_path: Path
) -> None:
    """The build used a file that was replaced since; what is there now says nothing about ids."""
    samples = [run_world_sample(run_world)]
    store = write_store(tmp_path / "replaced", samples, run_world.tokenizer, sha256="f" * 64)
    assert list(fired(run_of(run_world, megasft_data=[str(store)]))) == ["uncomparable_tokenizer"]


def test_a_tokenizer_nobody_knows_is_a_note(run_world: World, tmp_path: Path) -> None:
    samples = [run_world_sample(run_world)]
    unknown = write_store(tmp_path / "unknown", samples, run_world.tokenizer, sha256=None)

    assert list(fired(run_of(run_world, megasft_data=[str(unknown)]))) == ["unknown_tokenizer"]
    assert list(fired(run_of(run_world, megasft_hf=None))) == ["unknown_tokenizer"]


def test_without_a_model_validation_is_compared_with_training(run_world: World) -> None:
    valid = [str(run_world.other)]
    found = fired(run_of(run_world, megasft_hf=None, megasft_valid_data=valid))
    assert list(found) == ["unknown_tokenizer", "unlike_validation"]


def test_another_template_of_validation_is_remarked_on(run_world: World, tmp_path: Path) -> None:
    samples = [run_world_sample(run_world)]
    other = write_store(
        tmp_path / "other", samples, run_world.tokenizer, chat_template_sha256="1" * 64
    )
    found = fired(run_of(run_world, megasft_valid_data=[str(other)]))
    assert list(found) == ["unlike_template"]


def test_validation_on_what_is_trained_is_found_by_content_too(
    run_world: World, tmp_path: Path
) -> None:
    copied = shutil.copytree(run_world.store, tmp_path / "copied")
    assert list(fired(run_of(run_world, megasft_valid_data=[str(copied)]))) == ["same_data"]


def test_turns_that_end_where_generation_does_not_stop_are_found(
    run_world: World, tmp_path: Path
) -> None:
    model = convert(tmp_path / "model", run_world.tokenizer)
    stops = model / "hf" / "generation_config.json"
    for ids, names in (([0, 1], ["other_stop"]), ([0, 2], []), (2, [])):
        stops.write_text(json.dumps({"eos_token_id": ids}))
        assert list(fired(run_of(run_world, megasft_hf=str(model)))) == names


def test_stores_that_cannot_be_read_are_all_named(run_world: World) -> None:
    bad = [str(run_world.newer), str(run_world.half), str(run_world.folder / "nowhere")]
    args = SimpleNamespace(megasft_data=[str(run_world.store), *bad], megasft_valid_data=None)

    hits = list(stores.unreadable(cast(Subject, SimpleNamespace(args=args))))

    remedies = ["update megasft", "run `megasft build` again", "make one with `megasft build`"]
    assert len(hits) == len(remedies)
    for hit, path, remedy in zip(hits, bad, remedies, strict=True):
        assert hit.fact.startswith(path) and f"; {remedy}" in hit.message


def run_world_sample(world: World) -> Any:
    return open_store(world.store).sample(0)

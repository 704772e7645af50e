import re
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from megasft.cli.planned import DEFAULT_ALIGN_TOKENS, DEFAULT_SEED
from megasft.packing.order import RowOrder
from megasft.packing.plan import plan_rows
from megasft.store import open_store
from tests.tiny_tokenizer import make_tokenizer

from .conftest import Seen

Megasft = Callable[..., Seen]
NUM_SAMPLES, SEQ_LENGTH = 40, 256


@pytest.fixture
def store(tmp_path: Path, tokenizer_dir: Path, megasft: Megasft) -> Path:
    lines = []
    for i in range(NUM_SAMPLES):
        pair = [{"role": "user", "content": f"Hi {i}"}, {"role": "assistant", "content": "Yo " * i}]
        pair[1]["content"] = pair[1]["content"] or "[b]Yo[/b]"
        meta = {"meta": {"category_name": "chat"}} if i % 2 else {}
        lines.append({"messages": pair * (2 if i % 3 == 0 else 1)} | meta)
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n\n".join(map(orjson.dumps, lines)))
    output = tmp_path / "store"
    assert megasft("build", "-i", path, "--tokenizer", tokenizer_dir, "-o", output).code == 0
    return output


def samples_of(text: str) -> dict[int, list[int]]:
    """Row -> its samples, as printed."""
    found: dict[int, list[int]] = {}
    for kind, number in re.findall(r"^ *(row|sample) (\d+)", text, re.MULTILINE):
        if kind == "row":
            rows = found.setdefault(int(number), [])
        else:
            rows.append(int(number))
    return found


def test_a_sample_is_shown_with_its_source_line_turns_and_trained_text(
    store: Path, megasft: Megasft
) -> None:
    seen = megasft("trace", store, "--sample", 0)
    assert seen.code == 0
    place = f"{store.parent / 'chats.jsonl'}:1"
    assert seen.out.startswith(f"{place}\n")
    turns = open_store(store).sample(0).turns.tolist()
    assert len(turns) == 2
    for number, (start, num, _, message, _) in enumerate(turns):
        line = f"tokens {start} to {start + num - 1} trained ({num} labels), message {message}"
        assert re.search(rf"turn {number} +{re.escape(line)}", seen.out)
    assert "category    (none)" in seen.out
    assert seen.out.count("⟦[b]Yo[/b]<|im_end|>⟧") == 2
    other = megasft("trace", store, "--sample", 1).out
    assert f"{place[:-1]}3\n" in other  # blank lines are counted
    assert "category    chat" in other


def test_sample_row_and_step_agree_with_each_other_and_with_the_plan(
    store: Path, megasft: Megasft
) -> None:
    size = 3
    plan = plan_rows(
        open_store(store), row_tokens=SEQ_LENGTH, align_tokens=DEFAULT_ALIGN_TOKENS,
        seed=DEFAULT_SEED,
    )  # fmt: skip
    order = RowOrder(num_rows=len(plan), seed=DEFAULT_SEED)
    assert len(plan) > size
    run = ("--seq-length", SEQ_LENGTH, "--global-batch-size", size)

    trained: list[int] = []
    for step in range(1, -(-len(plan) // size) + 1):
        seen = samples_of(megasft("trace", store, "--step", step, *run).out)
        positions = range((step - 1) * size, step * size)
        expected = {order[k]: plan.rows[order[k]].tolist() for k in positions}
        assert seen == expected
        trained += [s for k in positions if k < len(plan) for s in seen[order[k]]]
    assert len(plan.too_long) < 5
    assert sorted([*trained, *plan.too_long]) == list(range(NUM_SAMPLES))

    for row in range(len(plan)):
        seen_row = megasft("trace", store, "--row", row, "--seq-length", SEQ_LENGTH).out
        assert samples_of(seen_row) == {row: plan.rows[row].tolist()}
    for sample in (0, 7, 38):
        text = megasft("trace", store, "--sample", sample, *run).out
        row = int(re.findall(r"^in row (\d+) of rows 0 to", text, re.MULTILINE)[0])
        step = int(re.findall(r"^trained first at step (\d+);", text, re.MULTILINE)[0])
        assert sample in plan.rows[row]
        assert row in samples_of(megasft("trace", store, "--step", step, *run).out)


def test_seed_and_alignment_are_those_of_the_plan(store: Path, megasft: Megasft) -> None:
    size = 2
    plan = plan_rows(open_store(store), row_tokens=SEQ_LENGTH, align_tokens=32, seed=5)
    order = RowOrder(num_rows=len(plan), seed=5)
    run = ("--seq-length", SEQ_LENGTH, "--seed", 5, "--align-tokens", 32)
    seen = megasft("trace", store, "--step", 1, "--global-batch-size", size, *run).out
    assert list(samples_of(seen)) == [order[0], order[1]]
    starts = [int(n) for n in re.findall(r"tokens at ([\d,]+)", seen)]
    assert len(starts) > 2
    assert not any(n % 32 for n in starts)


def test_a_sample_that_fits_no_row_is_called_left_out(store: Path, megasft: Megasft) -> None:
    longest = int(open_store(store).tokens.lengths.argmax())
    seen = megasft("trace", store, "--sample", longest, "--seq-length", 64)
    assert "longer than a row of 64 tokens: left out in training" in seen.out


def test_a_number_out_of_range_is_refused_with_the_range(store: Path, megasft: Megasft) -> None:
    seen = megasft("trace", store, "--sample", NUM_SAMPLES)
    assert (seen.code, f"has samples 0 to {NUM_SAMPLES - 1}" in seen.err) == (1, True)
    seen = megasft("trace", store, "--row", 9999, "--seq-length", SEQ_LENGTH)
    plan = plan_rows(
        open_store(store), row_tokens=SEQ_LENGTH, align_tokens=8, seed=DEFAULT_SEED
    )  # fmt: skip
    assert (seen.code, f"the plan has rows 0 to {len(plan) - 1}" in seen.err) == (1, True)
    run = ("--seq-length", SEQ_LENGTH, "--global-batch-size", 2)
    assert megasft("trace", store, "--step", 0, *run).code == 2
    assert "not a multiple" in megasft("trace", store, "--row", 0, "--seq-length", 250).err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "trace takes exactly one of --sample, --row, --step"),
        (["--sample", 1, "--row", 1], "--sample, --row is given"),
        (["--row", 1], "--row needs --seq-length"),
        (["--step", 1, "--seq-length", 64], "--step needs --global-batch-size"),
        (["--sample", 1, "--seed", 1], "--seed has no effect without --seq-length"),
        (["--row", 1, "--seq-length", 64, "--tokenizer", "x"], "--tokenizer has no effect"),
        (["--sample", 1, "--packer", "none"], "--packer has no effect without --seq-length"),
        (["--row", 1, "--seq-length", 64, "--packer", "x"], "--packer x is not one of balanced"),
    ],
)
def test_what_is_missing_or_without_effect_is_refused(
    store: Path, megasft: Megasft, flags: list[object], message: str
) -> None:
    seen = megasft("trace", store, *flags)
    assert seen.code == 1
    assert message in seen.err


def test_several_stores_and_a_mixture_are_traced_as_they_are_trained(
    store: Path, tokenizer_dir: Path, megasft: Megasft
) -> None:
    other = store.parent / "other"
    more = store.parent / "more.jsonl"
    pair = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
    more.write_bytes(b"\n".join([orjson.dumps({"messages": pair})] * 3))
    assert megasft("build", "-i", more, "--tokenizer", tokenizer_dir, "-o", other).code == 0
    mixture = store.parent / "mixture.yaml"
    mixture.write_text(
        "curriculum: sequential\nrest: drop\n"
        "parts: [{source: more, sample_rate: 2}, {source: chats.jsonl, category: chat}]"
    )
    run = ("--seq-length", SEQ_LENGTH, "--mixture", mixture)

    first = megasft("trace", store, other, "--sample", NUM_SAMPLES, *run)
    assert first.code == 0
    assert f"{more}:1\n" in first.out
    assert re.search(r"in 2 places: rows 0, [01] of rows 0 to", first.out)
    left_out = megasft("trace", store, other, "--sample", 0, *run).out
    assert "not drawn by the mixture: left out in training" in left_out
    step = megasft("trace", store, other, "--step", 1, "--global-batch-size", 1, *run).out
    (samples,) = samples_of(step).values()
    assert set(samples) <= {NUM_SAMPLES, NUM_SAMPLES + 1, NUM_SAMPLES + 2}  # stage one
    seen = megasft("trace", store, "--sample", 0, "--mixture", mixture)
    assert "--mixture has no effect without --seq-length" in seen.err


def test_text_is_shown_though_the_template_was_named_at_the_build(
    tmp_path: Path, megasft: Megasft
) -> None:
    tokenizer, template = make_tokenizer(tmp_path / "tokenizer"), tmp_path / "chat.jinja"
    (tokenizer / "chat_template.jinja").rename(template)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    (tmp_path / "chats.jsonl").write_bytes(orjson.dumps({"messages": messages}))
    flags = ("--tokenizer", tokenizer, "--chat-template", template, "-o", tmp_path / "store")
    assert megasft("build", "-i", tmp_path / "chats.jsonl", *flags).code == 0

    seen = megasft("trace", tmp_path / "store", "--sample", 0)
    assert seen.code == 0 and "⟦Yo<|im_end|>⟧" in seen.out, seen

import shutil
from pathlib import Path

import orjson
import pytest

from megasft.checks.data import run
from megasft.checks.data.run import RULES, LintOptions, lint_files, lint_store
from megasft.checks.engine import Finding, Report, Severity, in_order
from megasft.data.build import BuildOptions, Complaint, Progress, Tally, build
from megasft.data.formats import FieldMap
from megasft.errors import DataError
from megasft.store import open_store
from tests.tiny_tokenizer import make_tokenizer

from . import test_id_rules, test_record_rules, test_store_rules, test_text_rules
from .stores import STOP, Given, built, chat, found, lint, lint_records, made, write

DATA = Path(__file__).resolve().parents[4].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the checkout")

IN_TESTS_OF_THEIR_OWN = {
    "leading-newline", "nulls-padded", "record-rejected", "render-differs", "unknown-token",
    "special-token-in-text", "tool-arguments-twice", "tools-not-declared",
}  # fmt: skip


def test_every_rule_has_a_test_in_which_it_fires() -> None:
    tables = (test_id_rules, test_store_rules, test_text_rules, test_record_rules)
    fired = set().union(*(module.FIRES for module in tables)) | IN_TESTS_OF_THEIR_OWN
    assert fired == RULES.keys()


def test_a_sound_file_is_clean_and_everything_was_checked(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"), chat("Hi", "Bye", "Hi", "Yes"))
    report = lint_files((file,), LintOptions(tokenizer_dir))
    assert report.findings == report.unchecked == ()
    assert report.counts["turns"] == 3
    assert report.num_rules == len(RULES)
    assert not report.fails(strict=True)


def test_rejected_records_are_findings_by_reason_with_their_lines(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    file = write(tmp_path / "c.jsonl", chat("Hi", "Yo"), chat("Hi"), {}, chat("Hi", "Oh", "Ah"), {})
    report = lint_files((file,), LintOptions(tokenizer_dir))
    rejected = [f for f in report.findings if f.rule == "record-rejected"]
    assert [(f.count, f.population, f.examples) for f in rejected] == [
        (2, 5, (f"{file}:3", f"{file}:5")),
        (1, 5, (f"{file}:2",)),
    ]
    assert rejected[1].fact == "the record cannot become a sample: no assistant turn"
    assert rejected[1].detail.startswith(f"{file}:2: none of the 1 messages")
    assert report.fails(strict=False)


def test_a_build_that_begins_again_does_not_count_records_twice(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_twice(options: BuildOptions, *, on_bytes: Progress, on_rejected: Complaint) -> Tally:
        build(options, on_bytes=on_bytes, on_rejected=on_rejected)
        shutil.rmtree(options.output)
        on_bytes(-10)
        return build(options, on_bytes=on_bytes, on_rejected=on_rejected)

    monkeypatch.setattr(run, "build", build_twice)
    finding = lint_records(tmp_path, tokenizer_dir, chat("Hi", "Hello"), {})["record-rejected"]
    assert finding.count == 1


def test_a_file_of_which_nothing_is_left_is_still_a_report(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    report = lint_files((write(tmp_path / "c.jsonl", {}, {}),), LintOptions(tokenizer_dir))
    assert [(f.rule, f.count, f.share) for f in report.findings] == [("record-rejected", 2, 1.0)]
    assert "prompt-trained" in report.unchecked[0].rules
    with pytest.raises(DataError, match="is not a file"):
        lint_files((tmp_path / "no.jsonl",), LintOptions(tokenizer_dir))


def test_a_file_that_cannot_be_read_is_no_mere_finding(tmp_path: Path, tokenizer_dir: Path) -> None:
    bad = write(tmp_path / "a.jsonl", chat("Hi", "Hello"), {})
    cut = tmp_path / "b.json"
    cut.write_bytes(b"[{]")
    with pytest.raises(DataError, match=r"b\.json:1: not JSON"):
        lint_files((bad, cut), LintOptions(tokenizer_dir))


def test_conversations_that_differ_in_outer_blanks_alone_are_duplicates_in_a_file(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    records = [chat("Hi", "Hello"), chat("Hi", "Hello "), chat("Hi", "Hello!")]
    finding = lint_records(tmp_path, tokenizer_dir, *records)["duplicate-conversation"]
    assert (finding.count, finding.examples) == (1, (f"{tmp_path / 'chats.jsonl'}:2",))
    assert lint(built(tmp_path / "b", tokenizer_dir, *records)) == {}


def test_rules_that_need_the_tokenizer_say_so_without_it(tmp_path: Path) -> None:
    report = lint_store(made(tmp_path / "s", ([1, 5, 6, 7, STOP], [(2, 3)])), LintOptions())
    assert {u.why for u in report.unchecked} == {
        "store.json names no tokenizer; give it with --tokenizer DIR"
    }
    assert {"leading-newline", "thinking-kept", "prompt-trained"} <= {
        rule for u in report.unchecked for rule in u.rules
    }
    assert report.num_rules + len({r for u in report.unchecked for r in u.rules}) == len(RULES) - 1


def test_another_tokenizer_is_not_used(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = built(tmp_path, tokenizer_dir, chat("Hi", "Hello"))
    other = make_tokenizer(tmp_path / "other", vocab_size=600)
    with pytest.raises(DataError, match="is not the tokenizer the store was made with"):
        lint_store(store, LintOptions(other))
    file = store.path / "store.json"
    meta = orjson.loads(file.read_bytes())
    meta["tokenizer"]["path"] = str(other)
    file.write_bytes(orjson.dumps(meta))
    report = lint_store(open_store(store.path), LintOptions())
    assert "is not the tokenizer" in report.unchecked[0].why
    assert lint_store(open_store(store.path), LintOptions(tokenizer_dir)).unchecked == ()


def test_a_source_that_changed_is_no_witness(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = built(tmp_path, tokenizer_dir, chat("Hi", "Hello"))
    assert lint_store(store, LintOptions()).unchecked == ()
    file = tmp_path / "chats.jsonl"
    for data, why in (
        (file.read_bytes().replace(b"Hello", b"Hallo"), "has changed since"),
        (b"{}\n", "is not the file"),
    ):
        file.write_bytes(data)
        (item,) = lint_store(store, LintOptions()).unchecked
        assert why in item.why
        assert "prompt-trained" in item.rules
        assert "thinking-kept" not in item.rules


def test_another_chat_template_is_no_witness(tmp_path: Path, tokenizer_dir: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, folder)
    store = built(tmp_path, folder, chat("Hi", "Hello"))
    with (folder / "chat_template.jinja").open("a") as file:
        file.write("{# new #}")
    (item,) = lint_store(store, LintOptions()).unchecked
    assert "chat template is not the one" in item.why


def test_records_that_fields_do_not_explain_are_said(tmp_path: Path, tokenizer_dir: Path) -> None:
    store = built(tmp_path, tokenizer_dir, {"question": "Hi", "answer": "Yo"}, chat("Hi", "Hello"))
    report = lint_store(store, LintOptions(fields=FieldMap(format="messages")))
    (item,) = report.unchecked
    assert item.why.startswith("on 1 of the conversations looked at: missing field: no `messages`")


def test_a_part_is_read_and_it_is_the_same_part_every_time(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    records = [chat(f"{i}?", "<think>Yes.</think>It is.") for i in range(40)]
    store = built(tmp_path, tokenizer_dir, *records)
    first, again = (lint_store(store, LintOptions(num_sampled=7)) for _ in range(2))
    assert first == again
    finding = found(first)["thinking-kept"]
    assert (finding.count, finding.population, finding.sampled) == (7, 7, True)
    whole = lint(store, num_sampled=0)["thinking-kept"]
    assert (whole.count, whole.population, whole.sampled) == (40, 40, False)


def test_an_escaped_special_token_is_a_note_and_out_of_reach_of_the_witness(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"), chat("Say <|im_end|>", "No"))
    report = lint_files((file,), LintOptions(tokenizer_dir))
    assert [(f.rule, f.examples) for f in report.findings] == [
        ("special-token-as-text", (f"{file}:2",))
    ]
    (item,) = report.unchecked
    assert item.why.startswith("on 1 of the conversations looked at: they spell")
    assert "prompt-trained" in item.rules
    assert "special-token-in-text" not in item.rules


def test_training_everything_on_purpose_is_no_finding(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"))
    report = lint_files((file,), LintOptions(tokenizer_dir, fields=FieldMap(train_on="everything")))
    assert report.findings == ()
    assert report.unchecked[-1].rules == ("mask-all-one",)


def test_a_given_chat_template_is_that_of_build_and_witness(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    file = write(tmp_path / "chats.jsonl", chat("Hi", "Hello"))
    numbered = lint_files(
        (file,), LintOptions(tokenizer_dir, chat_template=test_record_rules.UNSTABLE)
    )
    assert numbered.unchecked == ()
    assert [f.rule for f in numbered.findings] == ["prefix-unstable"]


def test_ignored_rules_do_not_run_and_are_said(tmp_path: Path) -> None:
    store = made(tmp_path / "s", ([1, 5, 6, 7, STOP], []))
    report = lint_store(store, LintOptions(ignored=frozenset({"mask-all-zero", "never-stops"})))
    assert report.findings == ()
    assert report.unchecked[-1].rules == ("mask-all-zero", "never-stops")


def test_errors_come_first_then_shares() -> None:
    def finding(rule: str, severity: Severity, count: int) -> Finding:
        return Finding(rule=rule, severity=severity, count=count, population=10, unit="turns")

    report = Report(
        in_order(
            [
                finding("a", Severity.NOTE, 9),
                finding("b", Severity.WARNING, 1),
                finding("c", Severity.WARNING, 2),
                finding("d", Severity.ERROR, 1),
            ]
        ),
        num_rules=4,
        subject="x",
        counts={"samples": 10, "turns": 10, "tokens": 1000},
    )
    assert [f.rule for f in report.findings] == ["d", "c", "b", "a"]
    assert report.verdict() == (
        "x: 1 error, 2 warnings, 1 note in 10 samples, 10 turns, 1,000 tokens; 4 rules checked"
    )


@needs_data
@pytest.mark.parametrize(
    ("file", "num"),
    [
        pytest.param("gsm8k/train.jsonl", 7473, marks=pytest.mark.slow),
        ("sharegpt/dummy_conversation.json", 500),
    ],
)
def test_real_data_has_no_error(file: str, num: int, tokenizer_dir: Path) -> None:
    report = lint_files((DATA / file,), LintOptions(tokenizer_dir, num_sampled=200))
    assert report.counts["samples"] == num
    assert not report.fails(strict=False)
    assert report.unchecked == ()


def test_a_store_of_no_sample_is_checked_without_a_finding(tmp_path: Path) -> None:
    nothing: tuple[Given, ...] = ()
    assert lint(made(tmp_path / "s", *nothing)) == {}

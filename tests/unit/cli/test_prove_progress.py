"""What is seen of a long proof where a bar cannot be drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megasft.cli.main import app
from megasft.proof import prove
from megasft.proof.verdict import Verdict


def test_a_log_shows_how_far_it_is_and_what_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def proved(
        settings: prove.Settings,
        *,
        announce: Callable[[Sequence[int]], None],
        done: Callable[[Verdict], None],
    ) -> list[Verdict]:
        announce([1] * 45)
        exact = dict.fromkeys(("loss_error", "gradient_error", "parameter_error"), 0.0)
        verdicts = [
            Verdict("qwen3", "1 rank", 1, "turn", failure="x" * (i == 30), **exact)
            for i in range(45)
        ]
        for verdict in verdicts:
            done(verdict)
        return verdicts

    monkeypatch.setattr(prove, "prove", proved)
    result = CliRunner().invoke(app, ["prove", "--report", str(tmp_path / "proof.md")])

    assert result.exit_code == 1
    lines = result.output.splitlines()
    shown = [line for line in lines if line.endswith(" of 45 runs") or "not exact:" in line]
    assert shown == ["20 of 45 runs", "not exact: qwen3, 1 rank, turn: x", "40 of 45 runs"]

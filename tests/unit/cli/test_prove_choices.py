"""The choices `megasft prove` offers are what the proof has; --help does not import the proof."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megasft.cli.main import app
from megasft.cli.prove import Break, Loss, Model
from megasft.errors import FlagError
from megasft.proof.defects import DEFECTS
from megasft.proof.families import FAMILIES
from megasft.proof.layouts import DENSE, MOE
from megasft.proof.world import OBJECTIVES


def test_every_family_objective_and_defect_can_be_chosen() -> None:
    assert [str(m) for m in Model] == list(FAMILIES)
    assert [str(o) for o in Loss] == list(OBJECTIVES)
    assert [str(d) for d in Break] == list(DEFECTS)


def test_weights_are_proved_on_eight_layouts_and_more_in_few_runs() -> None:
    runs = [
        (family, layout, name)
        for family, one in FAMILIES.items()
        for layout in one.layouts
        for name in one.objectives(tuple(OBJECTIVES))
        if OBJECTIVES[name].turn_weights
    ]
    layouts = {layout for _, layout, _ in runs}
    assert len(layouts) >= 8 and len(runs) <= 17
    assert {name for _, _, name in runs} == {"weights", "normalized"}
    sizes = [(x.tp, x.cp, x.pp, x.dp, x.ep, x.mbs) for x in layouts]
    assert all(max(of_size) > 1 for of_size in zip(*sizes, strict=True))
    assert any(x.note == "dist opt" for x in layouts)
    assert layouts <= {*DENSE, *MOE}


def test_an_objective_that_no_chosen_model_is_run_with_is_refused(tmp_path: Path) -> None:
    flags = ("--model", "qwen3", "--loss", "router", "--report", str(tmp_path / "proof.md"))
    result = CliRunner().invoke(app, ["prove", *flags])
    with pytest.raises(FlagError, match="router is not run on qwen3; leave --model out"):
        raise result.exception or AssertionError(result.output)

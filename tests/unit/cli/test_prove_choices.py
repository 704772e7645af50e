"""The choices `megasft prove` offers are what the proof has; --help does not import the proof."""

from megasft.cli.prove import Break, Loss, Model
from megasft.proof.defects import DEFECTS
from megasft.proof.families import FAMILIES
from megasft.proof.world import OBJECTIVES


def test_every_family_objective_and_defect_can_be_chosen() -> None:
    assert [str(m) for m in Model] == list(FAMILIES)
    assert [str(o) for o in Loss] == list(OBJECTIVES)
    assert [str(d) for d in Break] == list(DEFECTS)

from itertools import pairwise

import pytest

from megasft.proof.layouts import DENSE, MOE, select
from megasft.ranks.layout import Layout


@pytest.mark.parametrize(("layouts", "least"), [(DENSE, 20), (MOE, 8)])
def test_there_are_enough_layouts_and_their_names_tell_them_apart(
    layouts: tuple[Layout, ...], least: int
) -> None:
    assert len(layouts) >= least
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        assert layout.dp * layout.tp * layout.cp * layout.pp == layout.ranks, layout.name
        assert 8 % (layout.dp * layout.mbs) == 0, layout.name
        assert 4 % (layout.pp * layout.vp) == 0, layout.name


def test_names_and_flags_say_the_same() -> None:
    layout = Layout(8, tp=2, sp=True, cp=2, pp=2, vp=2, mbs=2, note="dist opt", more=("--x",))

    assert layout.name == "TP 2 + SP x CP 2 x PP 2 x VP 2, mbs 2, dist opt"
    flags = layout.flags(num_layers=8)
    pairs = dict(pairwise(flags))
    assert pairs["--num-layers-per-virtual-pipeline-stage"] == "2"
    assert pairs["--context-parallel-size"] == "2" and flags[-2:] == ["--sequence-parallel", "--x"]
    assert "--expert-model-parallel-size" not in flags


def test_layouts_are_chosen_by_ranks_and_by_parts_of_names() -> None:
    assert {x.ranks for x in select(DENSE, max_ranks=2, names=[])} == {1, 2}
    chosen = [x.name for x in select(DENSE, max_ranks=4, names=["cp 4"])]
    assert chosen == ["CP 4", "CP 4, gather"]

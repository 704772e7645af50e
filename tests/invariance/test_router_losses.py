"""MoE balancing and z-loss add one and the same gradient, whatever the objective and the layout."""

from itertools import chain
from pathlib import Path

import pytest
import torch

from checkpoint_convert.tensor_map import to_hf
from megasft.proof.oracle import router_losses, saved_names
from megasft.proof.world import AUX_COEFF, OBJECTIVES, Z_COEFF, make_world, padded_documents
from megasft.ranks.layout import Layout
from tests.invariance.added import added_gradients, relative

pytestmark = pytest.mark.slow

CP_EP = Layout(2, cp=2, ep=2)
# Two ranks with turns as the divisor are in test_layouts.py, as the objective "router".
LAYOUTS = (Layout(4, tp=2, sp=True, cp=2, ep=2), Layout(4, pp=2, vp=2, ep=2))
# The divisor is scaled in one place for all layouts, so the other objectives take the one that cuts
# rows and experts.
PAIRS = (*((layout, "turn") for layout in LAYOUTS), (CP_EP, "sample"), (CP_EP, "token"))


def test_router_losses_add_the_same_gradient_on_every_layout(tmp_path: Path) -> None:
    """With turns as the divisor Megatron would add it tokens-per-turn times too strong.

    Mirrors ``TopKRouter`` and ``forward_step_calc_loss`` of megatron-core 0.19.2. Also compared
    with the definition in float64. Not covered: ``global_aux_loss``, which depends on the layout.
    """
    world = make_world(tmp_path, "qwen2_moe")
    side = OBJECTIVES["router"].flags[-6:]

    def flags(layout: Layout, objective: str, is_on: bool) -> list[str]:
        return [*world.flags(layout, OBJECTIVES[objective]), *(side if is_on else ())]

    runs = added_gradients(PAIRS, flags=flags, folder=tmp_path)
    assert len(runs) == len(PAIRS)

    world.hf.zero_grad()
    rows = [padded_documents(row) for row in world.samples(chain(*world.micro_batches()))]
    router_losses(world.hf, rows, aux_coeff=AUX_COEFF, z_coeff=Z_COEFF).backward()
    gradients = {
        p: torch.zeros_like(p) if p.grad is None else p.grad for p in world.hf.parameters()
    }
    truth = saved_names(world.hf, gradients)
    wanted = torch.cat([truth[name].flatten() for name in sorted(truth)])
    assert wanted.norm() > 0.01

    for run in runs:
        found = to_hf(run.gradients, world.model, verify=False)
        vector = torch.cat([found[name].flatten() for name in sorted(truth)])
        where = f"{run.layout.name}, {run.objective}"
        assert relative(vector, wanted) < 1e-4, where
        assert relative(run.vector, runs[0].vector) < 1e-4, where

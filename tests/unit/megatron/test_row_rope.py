"""Rows rotate bit by bit as in Megatron's loop over documents, forward and backward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

from megasft.cp_layout import zigzag_positions
from megasft.megatron.core_attention import packed_row
from megasft.megatron.row_rope import HeadRope, LatentRope

HEAD = 16
Make = Callable[[], Any]


def plain(**changes: Any) -> Any:
    given = {"rotary_percent": 1.0, "use_cpu_initialization": True} | changes
    return RotaryEmbedding(HEAD, **given)


def yarn() -> Any:
    return YarnRotaryEmbedding(
        HEAD,
        *(1.0, False, None, 10_000.0, True),
        scaling_factor=4.0,
        original_max_position_embeddings=64,
        mscale=0.7,
        mscale_all_dim=0.0,
    )


KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "llama3": (lambda: plain(rope_scaling=True, rotary_base=500), {}),
    "partial": (lambda: plain(rotary_percent=0.5), {}),
    "interleaved": (lambda: plain(rotary_interleaved=True), {"rotary_interleaved": True}),
    "interpolated": (lambda: plain(seq_len_interpolation_factor=2.5), {}),
    "yarn": (
        yarn,
        {"yarn_rotary_scaling_factor": 4.0, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.0},
    ),
}


@pytest.fixture(autouse=True)
def _tables_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def row_of(seed: int, cp_size: int, cp_rank: int) -> tuple[Any, torch.Tensor]:
    """Return a random row of documents of different lengths, and its boundaries."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, rng.integers(1, 9)) * 2 * cp_size
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    whole = np.concatenate([np.arange(length) for length in lengths])
    mine = whole[zigzag_positions(cu_seqlens, cp_rank=cp_rank, cp_size=cp_size)]
    boundaries = torch.from_numpy(cu_seqlens.astype(np.int32))
    row = packed_row(boundaries, torch.from_numpy(mine), cp_rank=cp_rank, cp_size=cp_size)
    return row, boundaries


def in_loop(
    heads: torch.Tensor, boundaries: torch.Tensor, row: Any, rotary: Any, **how: Any
) -> Any:
    group = SimpleNamespace(size=lambda: row.layout.cp_size, rank=lambda: row.layout.cp_rank)
    # A table that is as long as the row would mean something else to Megatron.
    table = rotary.get_emb(int(boundaries[-1]) + 1)
    angles, scale = table if isinstance(table, tuple) else (table, 1.0)
    return _apply_rotary_pos_emb_thd(heads, boundaries, angles, mscale=scale, cp_group=group, **how)


def gradients(rotate: Callable[[torch.Tensor], torch.Tensor], heads: torch.Tensor) -> Any:
    heads = heads.detach().clone().requires_grad_(True)
    out = rotate(heads)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view(out.shape)
    (out * weights.to(out.dtype)).sum().backward()
    return out.detach(), heads.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_rotate_as_in_megatrons_loop(kind: str, dtype: torch.dtype) -> None:
    make, settings = KINDS[kind]
    rotary = make()
    rope = HeadRope(rotary, SimpleNamespace(**({"rotary_interleaved": False} | settings)))
    for seed in range(50):
        cp_size = 1 + seed % 2
        row, boundaries = row_of(seed, cp_size, seed // 2 % cp_size)
        rope.get_rotary_seq_len(None, None, None, None, row)
        generator = torch.Generator().manual_seed(seed)
        heads = torch.randn(len(row.positions), 3, HEAD, generator=generator).to(dtype)
        interleaved = settings.get("rotary_interleaved", False)
        found = gradients(lambda h, row=row, dtype=dtype: row.rotation(dtype).of(h), heads)
        wanted = gradients(
            lambda h, b=boundaries, row=row, i=interleaved: in_loop(
                h, b, row, rotary, rotary_interleaved=i
            ),
            heads,
        )
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), seed
        assert not torch.equal(found[0], heads)


@pytest.mark.parametrize("make", [plain, yarn])
def test_the_angles_of_latent_attention_are_those_of_each_token(make: Make) -> None:
    rope = LatentRope(make())
    for seed in range(50):
        row, boundaries = row_of(seed, 1 + seed % 2, 0)
        rope.get_rotary_seq_len(None, None, None, None, row)
        found = rope()
        angles, scale = found if isinstance(found, tuple) else (found, 1.0)
        table = make().get_emb(int(boundaries[-1]))
        wanted, wanted_scale = table if isinstance(table, tuple) else (table, 1.0)
        assert torch.equal(angles, wanted[row.positions, 0]) and scale == wanted_scale


def test_a_row_is_gathered_once_for_all_layers() -> None:
    row, _ = row_of(3, 1, 0)
    rope = HeadRope(plain(), SimpleNamespace(rotary_interleaved=False))
    rope.get_rotary_seq_len(None, None, None, None, row)
    assert row.rotation(torch.float32) is row.rotation(torch.float32)

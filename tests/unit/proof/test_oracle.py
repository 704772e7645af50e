"""The truth itself, against torch's own loss and optimizer on one sequence at a time."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from megasft.proof import families
from megasft.proof.float64 import strict_float64, widen
from megasft.proof.oracle import Adam, adam_step, mean_loss, saved_names
from megasft.proof.samples import sample
from megasft.schema import turn_records

TALK = sample([3, 1, 4, 1, 5, 9, 2, 6], (2, 1), (4, 3))
SHORT = sample([7, 7, 8], (1, 2))
SILENT = sample([1, 2, 3])


@pytest.fixture(scope="module")
def model() -> Any:
    return widen(families.build("llama", seed=0))


def label_losses(model: Any, tokens: list[int]) -> torch.Tensor:
    """Cross entropy of every token but the first, by torch, of a whole sample at once."""
    with strict_float64():
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
    return cross_entropy(logits[:-1], torch.tensor(tokens[1:]), reduction="none")


def test_each_mean_is_its_definition(model: Any) -> None:
    talk = label_losses(model, TALK.tokens.tolist())
    short = label_losses(model, SHORT.tokens.tolist())
    turns = [talk[1:2], talk[3:6], short[0:2]]
    labels = torch.cat(turns)
    expected = {
        "turn": (sum(t.mean() for t in turns) / 3, 3),
        "sample": ((torch.cat(turns[:2]).mean() + turns[2].mean()) / 2, 2),
        "token": (labels.mean(), 6),
    }
    for objective, (loss, units) in expected.items():
        found = mean_loss(model, [TALK, SHORT, SILENT], objective=objective)
        assert found[1] == units
        assert float(found[0].detach()) == pytest.approx(float(loss.detach()), rel=1e-12)


def test_weights_multiply_turns_and_divide_by_their_sum_where_normalized(model: Any) -> None:
    heavy = TALK._replace(turns=turn_records(TALK.turns[:, :4].tolist(), [0.5, 3.0]))
    talk, short = (label_losses(model, one.tokens.tolist()).detach() for one in (heavy, SHORT))
    turns = [0.5 * talk[1:2], 3 * talk[3:6], short[0:2]]
    # One label of weight 0.5 and three of 3 in the first sample, two of 1 in the other.
    sums = {
        "turn": (sum(t.mean() for t in turns), 3, 4.5),
        "sample": (torch.cat(turns[:2]).mean() + turns[2].mean(), 2, 9.5 / 4 + 1),
        "token": (torch.cat(turns).sum(), 6, 11.5),
    }
    for objective, (total, units, weight) in sums.items():
        for what, divisor in (("use", units), ("normalize", weight)):
            found = mean_loss(model, [heavy, SHORT], objective=objective, turn_weights=what)
            assert found[1] == units
            assert float(found[0].detach()) == pytest.approx(float(total) / divisor, rel=1e-12)
        plain, ignored = (
            mean_loss(model, [one, SHORT], objective=objective, turn_weights="ignore")[0]
            for one in (TALK, heavy)
        )
        assert torch.equal(plain, ignored)


def test_dft_weighs_by_a_probability_without_gradient(model: Any) -> None:
    ce = label_losses(model, SHORT.tokens.tolist())
    p = torch.exp(-ce).detach()

    loss, _ = mean_loss(model, [SHORT], objective="token", dft_alpha=0.3)

    assert float(loss.detach()) == pytest.approx(
        float((ce.detach() * (0.3 * p + 0.7)).mean()), rel=1e-12
    )
    by_hand = torch.autograd.grad((ce * (0.3 * p + 0.7)).mean(), list(model.parameters()))
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, by_hand, strict=True))


@pytest.mark.parametrize("shape", [(4, 3), (5,)])
@pytest.mark.parametrize("size", [0.01, 10.0])
def test_the_first_step_is_torchs_adamw_on_clipped_gradients(
    shape: tuple[int, ...], size: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * size
    adam = Adam(lr=0.1, clip_grad=1.0, weight_decay=0.2, eps=1e-5)
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_([parameter], 1.0))
    decay = 0.2 if len(shape) > 1 else 0.0
    torch.optim.AdamW([parameter], lr=0.1, eps=1e-5, weight_decay=decay).step()

    found = adam_step(start, gradient, norm, adam)

    assert (found - start).abs().max() > 0.05
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-6, atol=1e-9)


def test_values_come_under_the_names_of_a_saved_folder_and_the_model_stays(model: Any) -> None:
    before = [p.clone() for p in model.parameters()]
    values = {p: torch.full_like(p, float(i)) for i, p in enumerate(model.parameters())}

    saved = saved_names(model, values)

    names = {n: i for i, (n, _) in enumerate(model.named_parameters())}
    assert set(saved) == set(names), "tied embeddings have one name"
    assert all(bool((saved[name] == i).all()) for name, i in names.items())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

"""The loss by its definition: plain Hugging Face in float64, one sequence per conversation.

Shares nothing with what it judges but the store's reader: no rows, no shifting helper, no masks, no
Megatron. Each conversation is run as its own sequence, and the mean is taken over all turns at
once. The optimizer step is written out, too. Nothing is computed in less than float64
(``float64.py``).
"""

import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megasft.proof.float64 import strict_float64
from megasft.schema import Sample

Tensors = dict[str, torch.Tensor]


class Truth(NamedTuple):
    """What a global batch's first step must give.

    Attributes:
        loss: Mean over the units.
        units: Turns, samples or labels.
        gradients: float64, by the names of a saved Hugging Face folder.
        parameters: After the optimizer step; the same names.
        grad_norm: Of all gradients together, before clipping.
    """

    loss: float
    units: int
    gradients: Tensors
    parameters: Tensors
    grad_norm: float


class Adam(NamedTuple):
    """The optimizer of a proof's runs, in Megatron's words."""

    lr: float
    clip_grad: float
    weight_decay: float
    eps: float

    @property
    def flags(self) -> tuple[str, ...]:
        """Megatron's flags."""
        values = (
            *(("--lr", self.lr), ("--clip-grad", self.clip_grad)),
            *(("--weight-decay", self.weight_decay), ("--adam-eps", self.eps)),
        )
        return (*(f"{text}" for pair in values for text in pair), "--lr-decay-style", "constant")


def turn_losses(model: Any, sample: Sample) -> list[torch.Tensor]:
    """Return the cross entropy of each label of each turn; one forward pass per sample."""
    with strict_float64():
        logits = model(input_ids=torch.tensor([sample.tokens.tolist()])).logits[0]
    losses = []
    for start, size in sample.turns[:, :2].tolist():
        log_probs = torch.log_softmax(logits[start - 1 : start + size - 1], dim=-1)
        labels = torch.tensor(sample.tokens[start : start + size].tolist())
        losses.append(-log_probs[torch.arange(size), labels])
    return losses


def weights_in(sample: Sample) -> list[float]:
    """Return the weight of each turn: the last number of its record, read as a float's bits."""
    return [struct.unpack("<f", struct.pack("<i", turn[-1]))[0] for turn in sample.turns.tolist()]


def mean_loss(
    model: Any,
    samples: Iterable[Sample],
    *,
    objective: str,
    dft_alpha: float = 0.0,
    turn_weights: str = "use",
) -> tuple[torch.Tensor, int]:
    """Average over all turns, samples or labels of a global batch.

    DFT multiplies each cross entropy by ``alpha * p + 1 - alpha``, p being a constant for the
    gradient; the weight of its turn multiplies it, too.

    Args:
        model: Hugging Face model in float64.
        samples: The global batch.
        objective: ``turn``, ``sample`` or ``token``.
        dft_alpha: Strength of DFT.
        turn_weights: ``normalize`` divides by the sum of the units' weights instead of their
            number; ``ignore`` has every turn weigh 1.

    Returns:
        float64 [] with its graph, and the number of units.
    """
    assert next(model.parameters()).dtype == torch.float64
    total, units, weight_sum = torch.zeros((), dtype=torch.float64), 0, 0.0
    for sample in (s for s in samples if len(s.turns)):
        weights = [1.0] * len(sample.turns) if turn_weights == "ignore" else weights_in(sample)
        losses = [
            w * ce * (dft_alpha * torch.exp(-ce.detach()) + 1 - dft_alpha)
            for w, ce in zip(weights, turn_losses(model, sample), strict=True)
        ]
        of_labels = [w for w, turn in zip(weights, losses, strict=True) for _ in turn]
        if objective == "turn":
            parts, count, weight = [turn.mean() for turn in losses], len(losses), sum(weights)
        elif objective == "sample":
            parts, count = [torch.cat(losses).mean()], 1
            weight = sum(of_labels) / len(of_labels)
        else:
            parts, count = [torch.cat(losses).sum()], len(of_labels)
            weight = sum(of_labels)
        total, units = total + torch.stack(parts).sum(), units + count
        weight_sum += weight
    divisor = weight_sum if turn_weights == "normalize" else units
    return total / (divisor or 1), units


def router_losses(
    model: Any, micro_batches: list[list[list[int]]], *, aux_coeff: float, z_coeff: float
) -> torch.Tensor:
    """Average the routers' side losses over the micro-batches of a global batch.

    With ``V`` tokens in a micro-batch, ``c_e`` of which choose expert ``e`` (``k`` of ``E`` each),
    and ``P_e`` the sum of its probabilities, balancing is ``E / (k V^2) Σ_e P_e c_e``; z is the
    mean of ``logsumexp(logits)^2``. Layers are summed.

    Source: arXiv 2101.03961 (balancing), arXiv 2202.08906 (z).

    Args:
        model: Hugging Face model in float64 with a router ``mlp.gate`` in each sparse layer.
        micro_batches: Token ids of the documents that are routed together, padding included.
        aux_coeff: Weight of the balancing loss.
        z_coeff: Weight of the z-loss.
    """
    top_k = model.config.num_experts_per_tok
    total = torch.zeros((), dtype=torch.float64)
    for documents in micro_batches:
        for logits_VE in _router_logits(model, documents):
            size, num_experts = logits_VE.shape
            chosen = logits_VE.topk(top_k, dim=1).indices
            count_E = torch.bincount(chosen.flatten(), minlength=num_experts)
            sum_E = logits_VE.softmax(dim=1).sum(dim=0)
            balance = num_experts / (top_k * size**2) * (sum_E * count_E).sum()
            z = logits_VE.logsumexp(dim=1).square().mean()
            total = total + aux_coeff * balance + z_coeff * z
    return total / len(micro_batches)


def _router_logits(model: Any, documents: list[list[int]]) -> list[torch.Tensor]:
    """Return float64 [V, E] per sparse layer: what the router says of every token."""
    seen: dict[Any, list[torch.Tensor]] = {}

    def see(router: Any, inputs: Any, _: Any) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        seen.setdefault(router, []).append(torch.nn.functional.linear(hidden, router.weight))

    routers = [m for name, m in model.named_modules() if name.endswith(".mlp.gate")]
    hooks = [router.register_forward_hook(see) for router in routers]
    with strict_float64():
        for document in documents:
            model(input_ids=torch.tensor([document]))
    for hook in hooks:
        hook.remove()
    return [torch.cat(logits) for logits in seen.values()]


def first_step(
    model: Any,
    samples: Iterable[Sample],
    *,
    objective: str,
    adam: Adam,
    dft_alpha: float = 0.0,
    turn_weights: str = "use",
    side_loss: Callable[[], torch.Tensor] | None = None,
) -> Truth:
    """Compute loss, gradients and the parameters after one step of Adam.

    Args:
        model: Hugging Face model in float64; left as it was.
        samples: The global batch.
        objective: ``turn``, ``sample`` or ``token``.
        adam: The optimizer's settings.
        dft_alpha: Strength of DFT.
        turn_weights: As of ``mean_loss``.
        side_loss: Added to the loss for the gradient; what is reported is the loss without it.
    """
    model.zero_grad()
    loss, units = mean_loss(
        model, samples, objective=objective, dft_alpha=dft_alpha, turn_weights=turn_weights
    )
    if units:
        loss.backward()  # type: ignore[no-untyped-call]
    if side_loss is not None:
        side_loss().backward()  # type: ignore[no-untyped-call]
    gradients = {p: _gradient(p) for p in model.parameters()}
    norm = float(sum(float((g**2).sum()) for g in gradients.values()) ** 0.5)
    after = {p: adam_step(p.detach(), g, norm, adam) for p, g in gradients.items()}
    return Truth(
        loss=float(loss.detach()),
        units=units,
        gradients=saved_names(model, gradients),
        parameters=saved_names(model, after),
        grad_norm=norm,
    )


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def adam_step(
    parameter: torch.Tensor, gradient: torch.Tensor, norm: float, adam: Adam
) -> torch.Tensor:
    """Return a parameter after the first step of AdamW on a clipped gradient.

    In the first step the bias-corrected moments are ``g`` and ``g ** 2``, so the update is
    ``g / (|g| + eps)``. Vectors (norms, biases) do not decay.

    Source: arXiv 1711.05101; the clip coefficient ``clip / (norm + 1e-6)`` is Megatron's.
    """
    coefficient = min(1.0, adam.clip_grad / (norm + 1e-6))
    g = gradient * coefficient
    decay = adam.weight_decay if parameter.dim() > 1 else 0.0
    return parameter * (1 - adam.lr * decay) - adam.lr * g / (g.abs() + adam.eps)


def saved_names(model: Any, values: dict[torch.nn.Parameter, torch.Tensor]) -> Tensors:
    """Return one value per parameter under the names a saved folder has.

    Some classes name and stack tensors otherwise in memory than on disk (experts); the library's
    own ``save_pretrained`` translates, so it is asked to save the values as if they were weights.
    Buffers are left out.
    """
    from safetensors.torch import load_file

    kept = {p: p.data for p in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.detach().clone()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved: Tensors = load_file(Path(folder) / "model.safetensors")
            buffers = dict(model.named_buffers())
            return {name: value for name, value in saved.items() if name not in buffers}
    finally:
        for parameter, data in kept.items():
            parameter.data = data

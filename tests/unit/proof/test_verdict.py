import math
from dataclasses import replace

import torch

from megasft.megatron.capture import Piece, _join
from megasft.proof import verdict
from megasft.proof.verdict import Verdict, relative_error, worst

GOOD = Verdict("qwen3", "CP 2", 2, "turn", 1e-8, 1e-6, "w", 1e-8, 1e-6)


def test_a_verdict_is_exact_only_when_every_error_is_small() -> None:
    assert GOOD.is_exact
    for wrong in (
        {"loss_error": 1.01 * verdict.LOSS_TOLERANCE},
        {"gradient_error": 1.01 * verdict.GRADIENT_TOLERANCE},
        {"parameter_error": 1.01 * verdict.PARAMETER_TOLERANCE},
        {"gradient_error": math.nan},
        {"loss_error": math.nan},
        {"failure": "AuditError"},
    ):
        assert not replace(GOOD, **wrong).is_exact, wrong


def test_the_worst_tensor_is_named_and_nan_is_worse_than_anything() -> None:
    wanted = {name: torch.ones(4) for name in "abc"}
    found = {"a": torch.ones(4), "b": torch.full((4,), 1.5), "c": torch.ones(4)}
    assert worst(found, wanted) == (0.5, "b")

    found["c"] = torch.tensor([1.0, math.nan, 1.0, 1.0])
    error, name = worst(found, wanted)
    assert math.isnan(error) and name == "c"


def test_the_error_of_a_tensor_that_should_be_zero_is_its_size() -> None:
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


def test_pieces_make_a_whole_and_a_missing_one_leaves_nan() -> None:
    shape = (2, 2, 3)  # layers before the tensor's own axes
    pieces = [
        Piece("w", shape, (layer, row, 0), torch.full((1, 3), 10.0 * layer + row))
        for layer in (0, 1)
        for row in (0, 1)
    ]

    whole = _join(pieces)["w"]
    assert whole[:, :, 0].tolist() == [[0.0, 1.0], [10.0, 11.0]]
    assert int(_join(pieces[1:])["w"].isnan().sum()) == 3

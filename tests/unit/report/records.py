"""Records as a run of four steps might make them; no two of their numbers are the same."""

from dataclasses import replace

from megasft.report.record import Losses, Means, Speed, StepRecord, ValidationRecord

LOSSES = Losses(
    loss=1.25,
    token_loss=1.5,
    sample_loss=1.375,
    turn_loss=1.125,
    dft_loss=0.25,
    p_correct=0.375,
    labels=1200,
    turns=40,
    samples=30,
    divisor=40.0,
    categories={
        "maths": Means(loss=1.0, turn_loss=0.75, p_correct=0.5, labels=800, turns=30),
        "stem_zh/phy": Means(loss=2.5, turn_loss=2.0, p_correct=0.25, labels=400, turns=10),
    },
    turn_positions={"1": Means(1.75, 1.625, 0.625, 700, 28)},
    turn_lengths={"16-63": Means(1.875, 1.0625, 0.875, 900, 35)},
)
STEP = StepRecord(
    step=2,
    num_steps=4,
    epoch=0.4,
    losses=LOSSES,
    padding=0.03125,
    speed=Speed(seconds=0.2, tokens=2000.0, labels=600.0, tflops=3.5, mfu=None),
    grad_norm=0.75,
    learning_rate=1e-05,
    memory_gib=2.5,
    is_skipped=False,
    time=1000.0,
)
VALIDATION = ValidationRecord(step=2, sets={"talk": LOSSES, "none": None}, time=1001.0)


def step(number: int, *, loss: float = 1.25) -> StepRecord:
    return replace(STEP, step=number, losses=replace(LOSSES, loss=loss))

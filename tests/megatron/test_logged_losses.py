"""What a run logs: training and validation losses equal their definition.

Layouts are the business of ``tests/invariance``, which compares every gradient.
"""

import pytest

from megasft.proof.samples import weighted
from megasft.store import TokenStore
from tests.megatron.conftest import World
from tests.megatron.runs import scalars, train
from tests.stores import sample, write_store

pytestmark = pytest.mark.slow


@pytest.mark.long  # test_layouts.py and test_report.py compare both, run by run
def test_every_objective_and_the_validation_loss_equal_their_definition(world: World) -> None:
    """Validation takes the same road: sum over sum over a whole store of any size.

    With weights of turns the logged losses are those that are optimised, in one run with a
    validation store that is reported by its name.
    """
    cases = [("turn", 0.0), ("sample", 0.0), ("token", 0.0), ("turn", 0.8)]
    # A learning rate of 0 leaves the weights alone, so validation after the step is comparable.
    still = ("--micro-batch-size", 2, "--lr", 0, "--context-parallel-size", 2)
    still = (*still, "--eval-micro-batch-size", 4)
    runs = [
        world.flags(f"{o}-{a}", "--megasft-loss", o, "--megasft-dft-alpha", a, *still)
        for o, a in cases
    ]
    weighty = with_weights(world)
    data = ("--megasft-data", weighty["train"].path)
    heavy = {
        "token-use": ("token", 0.0, "use", weighty["valid"].path),
        "sample-normalize": ("sample", 0.5, "normalize", f"heavy={weighty['valid'].path}"),
        "turn-ignore": ("turn", 0.0, "ignore", weighty["valid"].path),
    }
    for name, (o, a, what, valid) in heavy.items():
        more = ("--megasft-loss", o, "--megasft-dft-alpha", a, "--megasft-turn-weights", what)
        runs.append(world.flags(name, *more, *still, *data, "--megasft-valid-data", valid))
    said = train(2, runs, world.folder / "objectives")

    losses = set()
    for objective, alpha in cases:
        name = f"{objective}-{alpha}"
        logged = scalars(world.folder / name)
        expected = world.oracle(objective, dft_alpha=alpha)
        assert logged["lm loss"][1] == pytest.approx(expected.loss, rel=1e-5), name
        assert logged["grad-norm"][1] == pytest.approx(expected.grad_norm, rel=1e-4), name
        losses.add(round(expected.loss, 3))
        valid = world.oracle(objective, samples=world.valid_samples, dft_alpha=alpha)
        assert logged["lm loss validation"][1] == pytest.approx(valid.loss, rel=1e-5), name
    for name, (objective, alpha, what, _) in heavy.items():
        logged = scalars(world.folder / name)
        samples = {"lm loss": world.first_batch(weighty["train"])}
        valid_samples = [weighty["valid"].sample(i) for i in range(len(weighty["valid"]))]
        samples["lm loss validation"] = valid_samples
        if what == "normalize":
            samples["lm loss heavy validation"] = valid_samples
        for tag, of_tag in samples.items():
            truth = world.oracle(objective, samples=of_tag, dft_alpha=alpha, turn_weights=what)
            assert logged[tag][1] == pytest.approx(truth.loss, rel=1e-5), (name, tag)
        if what != "ignore":
            losses.add(round(logged["lm loss"][1], 3))
    assert len(losses) == len(cases) + 2, "the losses must differ for this test to say anything"
    for what in ("use", "normalize", "ignore"):
        said_twice = said.count(f"(--megasft-turn-weights {what})") == 2 * 2
        assert said_twice, "of both stores, on both ranks"


def with_weights(world: World) -> dict[str, TokenStore]:
    """The stores of the world, with random weights of turns."""
    stores = {"train": world.store, "valid": world.valid}
    samples = {name: [one.sample(i) for i in range(len(one))] for name, one in stores.items()}
    return {
        name: write_store(world.folder / f"weighted-{name}", weighted(samples[name], seed=n))
        for n, name in enumerate(stores)
    }


def test_a_validation_set_smaller_than_a_batch_is_evaluated_whole(world: World) -> None:
    """What a batch lacks is filled with rows that weigh nothing; sum over sum, on every rank."""
    ids = [(7 * i) % 251 for i in range(60)]
    many_turns = sample(ids, *((i, 1) for i in range(1, 60, 2)))
    small = write_store(world.folder / "small", [many_turns])
    layouts = {"DP 2": (), "CP 2": ("--context-parallel-size", 2)}
    flags = ("--megasft-valid-data", small.path, "--lr", 0)
    train(
        2,
        [world.flags(f"small {n}", *flags, *more) for n, more in layouts.items()],
        world.folder / "smallest",
    )

    valid = world.oracle("turn", samples=[many_turns])
    assert valid.units == 30
    for name in layouts:
        logged = scalars(world.folder / f"small {name}")
        assert logged["lm loss validation"][1] == pytest.approx(valid.loss, rel=1e-5), name

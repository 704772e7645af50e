from megasft.packing.order import RowOrder


def test_each_epoch_trains_each_row_once_in_another_order() -> None:
    order = RowOrder(num_rows=50, seed=3)
    epochs = [[order[k] for k in range(50 * e, 50 * (e + 1))] for e in range(3)]

    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_position_means_the_same_row_from_wherever_one_starts() -> None:
    whole = RowOrder(num_rows=7, seed=3)
    run = [whole[k] for k in range(30)]

    for start in (6, 7, 20):
        fresh = RowOrder(num_rows=7, seed=3)
        assert [fresh[k] for k in range(start, 30)] == run[start:]
    # A loader may also step back over an epoch's edge.
    assert [whole[k] for k in (15, 13, 14, 0)] == [run[k] for k in (15, 13, 14, 0)]


def test_another_seed_is_another_order() -> None:
    a, b = (RowOrder(num_rows=50, seed=s) for s in (1, 2))
    assert [a[k] for k in range(50)] != [b[k] for k in range(50)]


def test_stages_are_trained_one_after_the_other_in_every_epoch() -> None:
    order = RowOrder(num_rows=20, seed=3, stages=(0, 5, 5, 20))
    epochs = [[order[k] for k in range(20 * e, 20 * (e + 1))] for e in range(3)]

    for epoch in epochs:
        assert sorted(epoch[:5]) == list(range(5))
        assert sorted(epoch[5:]) == list(range(5, 20))
    assert epochs[0][:5] != epochs[1][:5]
    assert epochs[0][5:] != sorted(epochs[0][5:])


def test_one_stage_is_the_order_of_a_plan_without_stages() -> None:
    plain, staged = RowOrder(num_rows=30, seed=5), RowOrder(num_rows=30, seed=5, stages=(0, 30))
    assert [plain[k] for k in range(90)] == [staged[k] for k in range(90)]

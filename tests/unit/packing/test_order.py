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

"""The order of the training stream: every sample once an epoch, wherever a run stops."""

import numpy as np
import pytest

from w2s_train.shards.order import StreamOrder

COUNTS = [10, 0, 7, 1, 12, 10]
N = sum(COUNTS)


@pytest.mark.parametrize("window", [0, 1, 8, 20, 1000])
@pytest.mark.parametrize("counts", [COUNTS, [5], [0, 1]])
def test_every_sample_once_an_epoch(counts: list[int], window: int):
    order, n = StreamOrder(counts, seed=0, window=window), sum(counts)
    epochs = [order.at(e * n, (e + 1) * n).rows for e in range(3)]
    for rows in epochs:
        assert sorted(rows) == list(range(n))
    if n > 5 and window:
        assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("window", [0, 8, 1000])
def test_any_position_can_be_asked_for(window: int):
    """Pieces of any length, asked for by an order that has seen nothing else, join to the whole."""
    whole = StreamOrder(COUNTS, seed=3, window=window).at(0, 5 * N)
    rng = np.random.default_rng(0)
    for _ in range(50):
        first = int(rng.integers(4 * N))
        last = first + int(rng.integers(1, N))
        piece = StreamOrder(COUNTS, seed=3, window=window).at(first, last)
        assert np.array_equal(piece.rows, whole.rows[first:last])
        assert np.array_equal(piece.mirrored, whole.mirrored[first:last])


def test_the_window_bounds_how_far_samples_move():
    """A window of 8 holds two shards of 4: samples leave their shard's place, not the window."""
    order = StreamOrder([4] * 10, seed=1, window=8)
    rows = order.at(0, 40).rows
    shards = rows // 4
    for first in range(0, 40, 8):
        assert len(set(shards[first : first + 8])) == 2
    assert any(len(set(shards[first : first + 4])) == 2 for first in range(0, 40, 8))
    stored = StreamOrder([4] * 10, seed=1, window=0).at(0, 40).rows
    assert all((np.diff(stored[first : first + 4]) == 1).all() for first in range(0, 40, 4))


def test_seeds_and_epochs_differ():
    orders = {seed: StreamOrder([100], seed=seed, window=100).at(0, 200).rows for seed in (0, 1)}
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0][:100], orders[0][100:])
    # Shuffled for good: neighbours are rarely neighbours again.
    assert (np.abs(np.diff(orders[0][:100])) == 1).sum() < 10


def test_half_are_mirrored_independently_of_the_epoch():
    places = StreamOrder([1000], seed=0, window=1000).at(0, 20_000)
    assert places.mirrored.mean() == pytest.approx(0.5, abs=0.02)
    by_row = np.zeros(1000)
    np.add.at(by_row, places.rows, places.mirrored)
    assert by_row.std() == pytest.approx(np.sqrt(20 / 4), rel=0.1)  # a fair coin, thrown 20 times


def test_upcoming_shards_are_those_of_the_next_window():
    order = StreamOrder([4] * 10, seed=2, window=8)
    for epoch in range(2):
        for first in range(0, 40, 8):
            position = 40 * epoch + first
            following = set(order.at(position + 8, position + 16).rows // 4)
            assert set(order.upcoming(position + 3)) == following

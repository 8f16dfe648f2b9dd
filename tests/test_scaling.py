"""Scaling on paper: bytes around a ring, FLOPs of a network, what the backward pass hides."""

import sys

import pytest
import torch
from conftest import ROOT

from w2s_train.models import DiT

sys.path.append(str(ROOT / "benchmarks"))
from scaling import BUCKET, Link, step_on_paper, volume  # noqa: E402


def ring(n: int, pieces: list[list[float]]) -> int:
    """All-reduce vectors of n numbers around a ring; numbers that each process sends."""
    sent = 0
    for round_ in range(2 * (n - 1)):
        before = [list(vector) for vector in pieces]
        for rank in range(n):
            place, receiver = (rank - round_) % n, (rank + 1) % n
            if round_ < n - 1:
                pieces[receiver][place] += before[rank][place]
            else:
                pieces[receiver][place] = before[rank][place]
        sent += 1
    return sent


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_a_ring_sends_so_much(n: int):
    """A real ring on vectors of n numbers: all have the sum, and the count is the formula's."""
    vectors = [[float((rank + 2) ** place) for place in range(n)] for rank in range(n)]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    assert 4 * ring(n, vectors) == pytest.approx(volume(n, n))
    assert all(vector == total for vector in vectors)


def test_what_is_hidden():
    """A fast link hides all but the last bucket; a slow one waits for what the step cannot hide."""
    with torch.device("meta"):
        network = DiT()
    numbers = sum(p.numel() for p in network.parameters() if p.requires_grad)
    fast = step_on_paper(network, Link("fast", 8, 1e15))
    assert fast.exposed == pytest.approx(fast.sending * BUCKET / (4 * numbers))
    slow = step_on_paper(network, Link("slow", 8, 1e6))
    assert slow.exposed == pytest.approx(slow.sending - slow.compute * 2 / 3)
    assert fast.share < 0.001 and slow.share > 0.99

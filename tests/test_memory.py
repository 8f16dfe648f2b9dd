"""The count of what a step keeps, against the tensors that autograd saves."""

import sys

import pytest
import torch
from conftest import ROOT, quick

from w2s_train.models import DiT

sys.path.insert(0, str(ROOT / "benchmarks"))
from memory import activations, memory  # noqa: E402

SIZES = dict(input_size=32, in_channels=4, hidden_size=64, depth=12, num_heads=4, num_classes=10)


def saved(network: DiT, rows: int, half: bool) -> int:
    """Bytes of all tensors, less those of the network, that are saved for the backward pass."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages, keep = dict[int, int](), list[torch.Tensor]()

    def pack(x: torch.Tensor) -> torch.Tensor:
        keep.append(x)  # or its address would be used again
        if x.untyped_storage().data_ptr() not in own:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x, t, y = torch.randn(rows, 4, 32, 32), torch.rand(rows), torch.arange(rows) % 10
    context = torch.autocast("cpu", torch.bfloat16, enabled=half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), context:
        network(x, t, y).velocity.float().square().mean()
    return sum(storages.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("group", quick([0, 1, 2, 3], 0, 2))
def test_activations(half: bool, group: int):
    network, item = DiT(**SIZES, gradient_checkpointing=group), 2 if half else 4
    weights = memory(network, 4, item=item).half_weights if group == 0 else 0
    counted = activations(network, 4, group, item)[0] + weights
    assert saved(network, 4, half) == pytest.approx(counted, rel=0.1)

"""How many evaluations of a network an image takes."""

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn


class Evaluations:
    """Counts evaluations, in whole networks, by the blocks that are evaluated.

    A block is of a class that diffusers' registry knows. One that is left out is entered, and runs
    nothing: what is counted is the first module inside. A call that enters no block, for a network
    without such blocks or with another network in its place, is one evaluation.

    Args:
        network: As the pipeline calls it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.blocks = [block for block in network.modules() if _is_registered(block)]
        self.calls: list[int] = []  # blocks evaluated, for each call of the network
        self.met: list[bool] = []  # whether one was entered

    def total(self) -> float:
        """Since counting began."""
        calls = zip(self.calls, self.met, strict=True)
        return sum(ran / len(self.blocks) if met else 1.0 for ran, met in calls)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Within the context, from 0 on."""
        self.calls, self.met = [], []
        with contextlib.ExitStack() as stack:
            stack.callback(self.network.register_forward_pre_hook(self._call).remove)
            for block in self.blocks:
                inner = next(block.children())
                stack.callback(block.register_forward_pre_hook(self._enter).remove)
                stack.callback(inner.register_forward_pre_hook(self._block).remove)
            yield

    def _call(self, *_: Any) -> None:
        self.calls.append(0)
        self.met.append(False)

    def _enter(self, *_: Any) -> None:
        self.met[-1] = True

    def _block(self, *_: Any) -> None:
        self.calls[-1] += 1


def _is_registered(block: nn.Module) -> bool:
    try:
        TransformerBlockRegistry.get(type(block))
    except ValueError:
        return False
    return True

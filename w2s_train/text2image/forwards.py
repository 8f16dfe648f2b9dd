"""Networks and blocks whose forward is another for one call, and as it was after it.

The forward is an attribute of the module itself: what is kept from step to step is the same object,
so that compiled code is found again, and nothing of it is left when the call has ended, by whatever
exception.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]


def _put_back(module: nn.Module, before: Forward | None) -> None:
    if before is None:
        vars(module).pop("forward", None)
    else:
        module.forward = before


@contextlib.contextmanager
def replaced(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Modules with other forwards, within the context."""
    with contextlib.ExitStack() as stack:
        for module, forward in forwards:
            stack.callback(_put_back, module, vars(module).get("forward"))
            module.forward = forward
        yield


class Armed:
    """A network's forward for its next call, which puts the former back when it ends.

    Args:
        network: What is called next; compiled or not.
        run: Is called instead, with the former forward before the arguments.
    """

    def __init__(self, network: nn.Module, run: Forward) -> None:
        disarm(network)
        self.network, self.run = network, run
        self.before, self.former = vars(network).get("forward"), network.forward
        self.__wrapped__ = self.former  # pipelines read a network's signature
        network.forward = self

    @torch.compiler.disable(recursive=False)  # only what is inside is compiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.run(self.former, *args, **kwargs)
        finally:
            disarm(self.network)


def disarm(network: nn.Module) -> None:
    """Put a network's own forward back, where a call was prepared and has not come."""
    armed = vars(network).get("forward")
    if isinstance(armed, Armed):
        _put_back(network, armed.before)

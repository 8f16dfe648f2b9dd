"""Compiling networks."""

from typing import Literal

import torch
from torch import nn

from w2s_train.models.dit import DiT


def compile_networks(module: nn.Module, how: bool | Literal["blocks"]) -> None:
    """Compile every `DiT` in ``module`` in place, which keeps the names of parameters.

    Shapes are static: each number of rows, and each kind of pass, is a graph of its own.

    Args:
        module: Holds the networks.
        how: True for each as a whole; "blocks" for one block that serves all, which is quicker to
            compile ("regional compilation" in PyTorch's documentation) and a little slower to run.
    """
    if not how:
        return
    # Strong, averaged and weak networks share one forward: each is a variant of it.
    torch._dynamo.config.recompile_limit = 64
    for network in module.modules():
        if isinstance(network, DiT):
            for part in network.blocks if how == "blocks" else [network]:
                part.compile(dynamic=False)

"""What a network has to offer: a protocol, and no class to inherit from.

Objective, weak sources, sampler, guidance and averages take any `torch.nn.Module` with

    null_class: int                     the label that means "no class"
    forward(x_t, t, y) -> output        x_t (B, C, H, W); t (B,), 0 (data) to 1; y (B,) int64
    output.velocity                     (B, C, H, W)

that is deterministic, drops no labels itself and uses every parameter in every pass. The rest is
optional, and what needs one that is not there says so in one line:

    shape: (C, H, W)                    sampling; data are compared with it
    num_classes: int                    labels of data and samples are compared with it
    arguments: dict                     of its constructor, plain values: rebuilds it from a file
    depth: int                          number of blocks, for the two that follow
    forward(keep_hidden=BLOCKS)         `weak.IntermediateHead`, `weak.LayerSkip`: as `DiT.forward`
      -> output.hidden, output.cond     has it, with what `DiTOutput` says; `align`, too, which
    hidden_size: int                    needs the width D of these tokens
    make_head() -> nn.Module            `weak.IntermediateHead`: (tokens, cond) -> velocity
    forward(skip_blocks=, resume=)      `weak.LayerSkip`, `weak.RandomBlocks`; with `resume=` alone
                                        `weak.ShuffledTokens`; `weak.DroppedTokens`, which goes on
                                        from fewer tokens than there are, a square number of them
    forward(places=)                    with it: which these are, (B, n), if the network can be told
    blocks: nn.ModuleList               `compile: blocks`
    add_scales(names)                   scales that segments draw, and `guidance.Inbuilt`: from then
    scales: list[str]                   on the K names are inputs, in this order, in ``arguments``,
    forward(scales=)                    too; scales (B, K), None and 0 alike, and before training
                                        any, compute what the network without them does
    scales_from: int                    with `weak.LayerSkip`: the first block that sees scales

`ScaleInputs` brings the last four to a network with ``hidden_size``, ``depth`` and ``arguments``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.interpolant import NoisySample
from w2s_train.models.dit import DiTOutput

PLAIN = (str, int, float, bool, type(None))


class Network(Protocol):
    """The part that every network has; a parser compares `forward` with a class that it is given.

    What stands below `forward` is there in every `torch.nn.Module`.
    """

    @property
    def null_class(self) -> int:
        """The label that means "no class"."""

    def forward(self, x_t: Any, t: Any, y: Any, /) -> Any:
        """An output with ``velocity`` (B, C, H, W), of x_t (B, C, H, W), t (B,) and y (B,)."""

    __call__: Callable[..., Any]

    @property
    def parameters(self) -> Callable[..., Iterator[nn.Parameter]]: ...  # noqa: D102
    @property
    def state_dict(self) -> Callable[..., dict[str, Any]]: ...
    @property
    def load_state_dict(self) -> Callable[..., Any]: ...
    @property
    def requires_grad_(self) -> Callable[..., Any]: ...
    @property
    def eval(self) -> Callable[..., Any]: ...


def check_network(network: Any) -> Network:
    """The network, if it has what every network needs.

    Raises:
        UserError: It is no module, or has no whole-numbered ``null_class``; or its ``arguments``
            could not be kept in a checkpoint.
    """
    name = type(network).__name__
    if not isinstance(network, nn.Module):
        raise UserError(f"network={name}: must be a torch.nn.Module")
    if not isinstance(getattr(network, "null_class", None), int):
        raise UserError(f"network={name}: must have null_class, an int (docs/networks.md)")
    if not _is_plain(getattr(network, "arguments", None)):
        raise UserError(f"network={name}: its arguments must be plain values (docs/networks.md)")
    return cast(Network, network)


def offered(network: Network | nn.Module, part: str, *names: str) -> Any:
    """Attributes of a network that are optional; one of them, or a tuple.

    Args:
        network: Any.
        part: Who needs them, for the message.
        names: Attributes; ``name=`` for a keyword of `forward`, which is not returned.

    Raises:
        UserError: The network does not have them all.
    """
    keywords = inspect.signature(network.forward).parameters
    has = {n: n[:-1] in keywords if n.endswith("=") else hasattr(network, n) for n in names}
    if missing := [f"forward({n})" if n.endswith("=") else n for n in names if not has[n]]:
        raise UserError(
            f"network={type(network).__name__}: must have {', '.join(missing)} for {part} "
            "(docs/networks.md)"
        )
    values = tuple(getattr(network, n) for n in names if not n.endswith("="))
    return values[0] if len(values) == 1 else values


def middle_blocks(depth: int, first: int | None, last: int | None) -> tuple[int, int]:
    """First and last block, counted from 0; None are those of the middle third.

    Raises:
        UserError: Blocks that the network does not have, or in the wrong order.
    """
    first = depth // 3 if first is None else first
    last = depth - 1 - depth // 3 if last is None else last
    if not 0 <= first <= last < depth:
        raise UserError(f"first={first}, last={last}: must be 0 <= first <= last < {depth}")
    return first, last


def plain_tokens(
    network: Any, block: int, strong: DiTOutput, noisy: NoisySample, y: Tensor
) -> Tensor:
    """Tokens (B, N, D) behind a block, without scales: those of the strong pass, where it is so.

    Args:
        network: The one of the strong pass.
        block: One that the pass has kept.
        strong: The pass, which may have been told scales.
        noisy: Where it was.
        y: With what labels (B,).
    """
    if not getattr(network, "scales", []) or block < getattr(network, "scales_from", 0):
        return strong.hidden[block]
    options: Any = dict(keep_hidden=(block,), skip_blocks=range(block + 1, network.depth))
    return network(noisy.x_t, noisy.t, y, **options).hidden[block]


def as_output(output: Any, x_t: Tensor) -> DiTOutput:
    """What any network returns at x_t, as our own returns it; the velocity in float32.

    Raises:
        UserError: It has no velocity, or one of another shape.
    """
    velocity = getattr(output, "velocity", None)
    if not isinstance(velocity, Tensor) or velocity.shape != x_t.shape:
        found = tuple(getattr(velocity, "shape", ())) or type(output).__name__
        raise UserError(
            f"network: must return an output with velocity {tuple(x_t.shape)}, not {found} "
            "(docs/networks.md)"
        )
    if isinstance(output, DiTOutput):
        return output._replace(velocity=velocity.float())
    hidden, cond = (
        getattr(output, "hidden", {}),
        getattr(output, "cond", velocity.flatten(1)[:, :0]),
    )
    return DiTOutput(velocity.float(), velocity[:, :0], hidden, cond)


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(each) for each in value)
    return isinstance(value, PLAIN)

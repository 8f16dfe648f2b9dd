"""A network's blocks, of which a weak pass leaves some out."""

import functools
import inspect
from collections.abc import Collection
from typing import Any

from diffusers.hooks._common import _ATTENTION_CLASSES
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from w2s_train.errors import UserError
from w2s_train.text2image.base import is_unet
from w2s_train.text2image.forwards import Forward, replaced

OFFLOADING = "group_offloading"  # diffusers' name of its hook


class Tokens:
    """What the strong pass of a step leaves to its weak pass: streams of tokens, by argument."""

    def __init__(self) -> None:
        self.streams: dict[str, Tensor] = {}


class Block:
    """A block that can be passed over, and where its tokens can be kept or put back.

    Args:
        block: One of a class that diffusers' registry knows.
        tokens: Where they are kept.
    """

    def __init__(self, block: nn.Module, tokens: Tokens) -> None:
        self.block, self.tokens = block, tokens
        cls = type(unwrap_module(block))
        known = TransformerBlockRegistry.get(cls)
        self.names = list(inspect.signature(cls.forward).parameters)[1:]
        image = known.hidden_states_argument_name  # Z-Image has another: its first
        image = image if image in self.names else self.names[0]
        order = {image: known.return_hidden_states_index}
        if known.return_encoder_hidden_states_index is not None:
            order[known.encoder_hidden_states_argument_name] = (
                known.return_encoder_hidden_states_index
            )
        self.returned = sorted(order, key=lambda name: order[name])
        self.forward: Forward = block.forward

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[name] if name in kwargs else args[self.names.index(name)]

    def returning(self, streams: dict[str, Tensor]) -> Any:
        """As the block returns them."""
        found = tuple(streams[name] for name in self.returned)
        return found if len(found) > 1 else found[0]

    def keep(self, *args: Any, **kwargs: Any) -> Any:
        """The block itself; its tokens are kept."""
        for name in self.returned:
            self.tokens.streams[name] = self.argument(name, args, kwargs)
        return self.forward(*args, **kwargs)

    def skip(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens as they come."""
        return self.returning({name: self.argument(name, args, kwargs) for name in self.returned})

    def resume(self, *args: Any, **kwargs: Any) -> Any:
        """The tokens that were kept."""
        return self.returning(self.tokens.streams)

    def run_on_kept(self, *args: Any, **kwargs: Any) -> Any:
        """The block itself, on the tokens that were kept."""
        given = dict(zip(self.names, args, strict=False)) | kwargs | self.tokens.streams
        return self.forward(**given)


class Stack:
    """The blocks of one network: two kinds of passes, and what they share.

    Args:
        network: As the pipeline calls it.
        fqn: Attribute of the network that has the blocks in a row.
        chosen: Their numbers, from 0.
        share_prefix: The weak pass starts at the first of them, with the strong pass's tokens.
        perturb: The chosen blocks stay, and each token attends to itself alone.

    Raises:
        UserError: There are no such blocks, of no known class, or in groups that are offloaded
            together; a UNet with ``share_prefix``.
    """

    def __init__(
        self,
        network: nn.Module,
        fqn: str,
        chosen: Collection[int],
        share_prefix: bool,
        perturb: bool,
    ) -> None:
        self.network, self.fqn = network, fqn
        self.asked = (fqn, tuple(chosen), share_prefix, perturb)
        self.chosen, self.perturb, self.tokens = sorted(chosen), perturb, Tokens()
        blocks = _blocks(unwrap_module(network), fqn)
        _check(unwrap_module(network), fqn, blocks, self.chosen, share_prefix)
        self.blocks = [Block(block, self.tokens) for block in blocks[: self.chosen[-1] + 1]]
        self.first = self.chosen[0] if share_prefix else 0
        self.attentions = self._attentions() if perturb else []

    def fits(self, network: nn.Module, asked: tuple[Any, ...]) -> bool:
        """Whether these are the network's blocks still, which compiled ones may stand in place of,
        and what is asked for is the same.
        """
        if network is not self.network or asked != self.asked:
            return False
        there = list(_blocks(unwrap_module(network), self.fqn))[: len(self.blocks)]
        return len(there) == len(self.blocks) and all(
            block.block is own for block, own in zip(self.blocks, there, strict=True)
        )

    def strong(self, former: Forward, *args: Any, **kwargs: Any) -> Any:
        """The network itself, of which the weak pass uses the first blocks."""
        self.tokens.streams.clear()
        block = self.blocks[self.first]
        block.forward = block.block.forward  # offloading may have replaced it
        with replaced([(block.block, block.keep)] if self.first else []):
            return former(*args, **kwargs)

    def weak(self, former: Forward, *args: Any, **kwargs: Any) -> Any:
        """The network less the chosen blocks, or with them perturbed."""
        forwards: dict[int, Forward] = {i: self.blocks[i].skip for i in range(self.first)}
        if not self.perturb:
            forwards |= {i: self.blocks[i].skip for i in self.chosen}
        if self.first:
            block = self.blocks[self.first]
            block.forward = block.block.forward
            forwards[self.first] = block.run_on_kept if self.perturb else block.resume
        pairs = [(self.blocks[i].block, forward) for i, forward in forwards.items()]
        pairs += [(m, functools.partial(_attend_to_itself, m, m.forward)) for m in self.attentions]
        try:
            with replaced(pairs):
                return former(*args, **kwargs)
        finally:
            self.tokens.streams.clear()

    def _attentions(self) -> list[nn.Module]:
        """The self-attention of the chosen blocks."""
        inside = (m for i in self.chosen for m in self.blocks[i].block.modules())
        found: list[nn.Module] = [m for m in inside if isinstance(m, _ATTENTION_CLASSES)]
        found = [m for m in found if not getattr(m, "is_cross_attention", False)]
        if not found:
            raise UserError("perturb=True: must be false for blocks without diffusers' attention")
        return found


class Perturbation(AttentionScoreSkipFunctionMode):
    """Diffusers' mode, which may find no attention to change: this one knows."""

    found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            value = (kwargs or {}).get("value", args[2] if len(args) > 2 else None)
            self.found |= output is value
        return output


def _attend_to_itself(attention: nn.Module, former: Forward, *args: Any, **kwargs: Any) -> Any:
    """An attention whose every token sees its own value alone; one that looks elsewhere as it is.

    Joint attention gets the text's tokens, too, and has projections for them.
    """
    elsewhere = kwargs.get("encoder_hidden_states", (*args, None, None)[1])
    if elsewhere is not None and getattr(attention, "added_kv_proj_dim", None) is None:
        return former(*args, **kwargs)
    with Perturbation() as mode:
        output = former(*args, **kwargs)
    if not mode.found:
        raise UserError(
            "perturb=True: must be false, the attention here has no scores to leave out"
        )
    return output


def _blocks(network: nn.Module, fqn: str) -> nn.ModuleList:
    try:
        found = network.get_submodule(fqn)
    except AttributeError:
        found = network
    if not isinstance(found, nn.ModuleList):
        there = [name for name, m in network.named_modules() if isinstance(m, nn.ModuleList)]
        stacks = [name for name in there if "." not in name]
        raise UserError(f"fqn={fqn}: must be blocks of {type(network).__name__}, such as {stacks}")
    return found


def _check(
    network: nn.Module, fqn: str, blocks: nn.ModuleList, chosen: list[int], share_prefix: bool
) -> None:
    if chosen[-1] >= len(blocks):
        raise UserError(f"skip_layers={chosen}: must be below {len(blocks)}, the blocks of {fqn}")
    if share_prefix and is_unet(network):
        raise UserError("share_prefix=True: must be false for a UNet, whose blocks are no one row")
    for block in blocks:
        cls = type(unwrap_module(block))
        try:
            TransformerBlockRegistry.get(cls)
        except ValueError as error:
            raise UserError(
                f"fqn={fqn}: has blocks of {cls.__name__}, must be of a class that diffusers' "
                "TransformerBlockRegistry has"
            ) from error
        registry = getattr(block, "_diffusers_hook", None)
        offloading = registry.get_hook(OFFLOADING) if registry else None
        if offloading is not None and len(offloading.group.modules) > 1:
            number = len(offloading.group.modules)
            raise UserError(f"num_blocks_per_group={number}: must be 1 where blocks are left out")

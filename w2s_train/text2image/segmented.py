"""Segmented guidance: away from no prompt at high noise, away from a weaker network below."""

import json
import operator
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from w2s_train.errors import UserError, one_line, require
from w2s_train.files import expanded
from w2s_train.guidance.base import extrapolate
from w2s_train.text2image.base import NEGATIVE, PROMPT, WEAK, Guider
from w2s_train.text2image.blocks import Stack
from w2s_train.text2image.forwards import Forward

INPUTS = ("in_channels", "joint_attention_dim", "pooled_projection_dim")  # what both networks get


class SegmentedGuidance(Guider):
    """SGG without training (Yuan et al., 2026, arXiv 2603.20584), two evaluations a step.

    Steps at high noise are guided by v_null + ``guidance_scale`` (v - v_null) (Ho & Salimans,
    2022), v_null being the velocity of the negative prompt; the others by v + ``weak_scale``
    (v - v_weak), v_weak being that of a weaker network with the same prompt: some blocks left out
    (skip-layer guidance), their attention perturbed (PAG, Ahn et al., 2024), or another network
    (autoguidance, Karras et al., 2024). The authors' release for Stable Diffusion 3.5 is the
    default, at 2 evaluations instead of its 2.5. A scale that does nothing takes one evaluation.

    Args:
        guidance_scale: At high noise; 1 is no guidance.
        weak_scale: At low noise; 0 is no guidance.
        skip_layers: Blocks that the weak pass leaves out, from 0; () with ``weak``.
        border: Noise level sigma, 1 being noise alone, from which on noise is high; None with
            ``switch``.
        switch: Share of the steps, to the nearest, in which noise is high: 0.5 is the first half.
        fqn: Attribute of the network that has the blocks: ``transformer_blocks``,
            ``single_transformer_blocks``, ``blocks`` or ``layers``.
        share_prefix: The weak pass takes what comes before the first block that it leaves out
            from the strong pass: the same output bit for bit, and fewer block evaluations.
        enabled: False guides nothing.
        guidance_delta: The guidance scale falls linearly over its steps, from this much above to
            as much below; needs ``switch``, since by ``border`` their number is not known.
        weak_delta: The same, of the weak scale.
        perturb: Blocks of ``skip_layers`` stay, and each of their tokens attends to itself alone.
        weak: Folder of a weaker network of the same class, as diffusers saves it.

    Raises:
        UserError: A number out of its range; neither or both of ``border`` and ``switch``, or of
            ``skip_layers`` and ``weak``; from `check`, blocks that do not exist or are of a class
            unknown to diffusers, a UNet with ``share_prefix``.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 4.5,
        weak_scale: float = 3.0,
        skip_layers: tuple[int, ...] = (7, 8, 9),
        border: float | None = 0.75,
        switch: float | None = None,
        fqn: str = "transformer_blocks",
        share_prefix: bool = True,
        enabled: bool = True,
        guidance_delta: float = 0.0,
        weak_delta: float = 0.0,
        perturb: bool = False,
        weak: str | None = None,
    ) -> None:
        super().__init__(enabled)
        self.guidance_scale = require("guidance_scale", guidance_scale, "[0, inf)")
        self.weak_scale = require("weak_scale", weak_scale, "[0, inf)")
        self.guidance_delta = require("guidance_delta", guidance_delta, f"[0, {guidance_scale}]")
        self.weak_delta = require("weak_delta", weak_delta, f"[0, {weak_scale}]")
        self.skip_layers = _numbers(skip_layers)
        self.register_to_config(skip_layers=self.skip_layers)
        self.weak = None if weak is None else str(expanded("weak", weak))
        self.border, self.switch = _one_of(border, switch)
        self.fqn, self.share_prefix, self.perturb = fqn, share_prefix, perturb
        _check_weakness(self.skip_layers, self.weak, perturb)
        for name in ("guidance_delta", "weak_delta"):
            if border is not None and getattr(self, name):
                raise UserError(f"{name}={getattr(self, name)}: must be 0 with border; give switch")
        self._stack: Stack | None = None
        self._weak_network: nn.Module | None = None
        self._weak_read: tuple[Any, ...] | None = None  # where that one is from, and as what
        self._weak_taken: tuple[Any, ...] | None = None  # where, and beside which network

    @property
    def all_high(self) -> bool:
        """Whether no step can be at low noise."""
        return self.border == 0 or self.switch == 1

    @property
    def negative(self) -> bool:
        constant = self.guidance_scale == 1 and not self.guidance_delta
        return self._enabled and self.switch != 0 and not constant

    def place(self) -> tuple[bool, float]:
        """Whether noise is high at the current step, and how far its steps are, in [0, 1]."""
        if self.border is not None:
            return self._sigma >= self.border, 0.5
        assert self.switch is not None
        first_low = round(self.switch * self._num_inference_steps)
        high = self._step < first_low
        done = self._step - (0 if high else first_low)
        steps = first_low if high else self._num_inference_steps - first_low
        return high, done / (steps - 1) if steps > 1 else 0.0

    def passes(self) -> list[str]:
        high, progress = self.place()
        scale, delta = (
            (self.guidance_scale, self.guidance_delta)
            if high
            else (self.weak_scale, self.weak_delta)
        )
        self._scale = scale + delta * (1.0 - 2.0 * progress)
        if high:
            return [PROMPT] if self._scale == 1 else [PROMPT, NEGATIVE]
        return [PROMPT] if self._scale == 0 else [PROMPT, WEAK]

    def combine(self, velocities: dict[str, Tensor]) -> Tensor:
        prompt = velocities[PROMPT]
        if NEGATIVE in velocities:
            return extrapolate(velocities[NEGATIVE], prompt, self._scale)
        return extrapolate(prompt, velocities[WEAK], -self._scale)

    def check(self, denoiser: nn.Module) -> None:
        idle = not self._enabled or self.all_high or not (self.weak_scale or self.weak_delta)
        if idle:
            return
        if self.weak is not None:
            if self._weak_taken != (self.weak, denoiser):
                _check_weak(self.weak, denoiser)
            return
        asked = (self.fqn, tuple(self.skip_layers), self.share_prefix, self.perturb)
        if self._stack is None or not self._stack.fits(denoiser, asked):
            self._stack = Stack(denoiser, *asked)

    def forward_at(self, kind: str, denoiser: nn.Module) -> Forward | None:
        if WEAK not in self._kinds:
            return None
        if self.weak is not None:
            return self._other(denoiser) if kind == WEAK else None
        assert self._stack is not None
        return self._stack.weak if kind == WEAK else self._stack.strong

    def _other(self, denoiser: nn.Module) -> Forward:
        """The weaker network, read before its first pass."""
        own: Any = unwrap_module(denoiser)
        asked = (self.weak, type(own), own.dtype)
        if self._weak_network is None or self._weak_read != asked:
            try:
                read = type(own).from_pretrained(self.weak, dtype=own.dtype, use_safetensors=True)
            except (OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"weak={self.weak}: must be a folder that diffusers' {type(own).__name__} has "
                    f"saved ({one_line(error)[:200]})"
                ) from error
            self._weak_network, self._weak_read = read.eval(), asked
        self._weak_taken = (self.weak, denoiser)
        network = self._weak_network

        def run(former: Forward, *args: Any, **kwargs: Any) -> Any:
            given = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            return network.to(next(given).device)(*args, **kwargs)

        return run

    def describe(self) -> str:
        cfg = f"cfg({_said(self.guidance_scale, self.guidance_delta)})"
        how = "attention of blocks" if self.perturb else "blocks"
        source = self.weak or f"less {how} {list(self.skip_layers)} of {self.fqn}"
        name = "autoguidance" if self.weak else "pag" if self.perturb else "slg"
        low = f"{name}({_said(self.weak_scale, self.weak_delta)}, {source})"
        high, low = cfg if self.negative else "none", low if self.weak_scale else "none"
        if not self._enabled or high == low or self.all_high:
            return high if self._enabled else "none"
        if self.switch == 0:
            return low
        where = f"sigma < {self.border:g}" if self.switch is None else f"from {self.switch:g} on"
        return f"segmented({where}: {low}, before: {high})"


def _said(scale: float, delta: float) -> str:
    return f"{scale:g}" if not delta else f"{scale + delta:g} to {scale - delta:g}"


def _one_of(border: float | None, switch: float | None) -> tuple[float | None, float | None]:
    if (border is None) == (switch is None):
        named = "null" if border is None else border
        raise UserError(f"border={named}: must be given, or else switch, but not both")
    if border is not None:
        return require("border", border, "[0, 1]"), None
    assert switch is not None
    return None, require("switch", switch, "[0, 1]")


def _numbers(skip_layers: Any) -> tuple[int, ...]:
    """Blocks as a tuple, of what may come from Python or a file."""
    try:
        return tuple(operator.index(i) for i in skip_layers)
    except TypeError as error:
        raise UserError(f"skip_layers={skip_layers}: must be a list of whole numbers") from error


def _check_weakness(skip_layers: tuple[int, ...], weak: str | None, perturb: bool) -> None:
    if bool(skip_layers) == (weak is not None):
        named = list(skip_layers)
        raise UserError(f"skip_layers={named}: must be given, or else weak, but not both")
    if any(i < 0 for i in skip_layers) or len({*skip_layers}) < len(skip_layers):
        raise UserError(f"skip_layers={list(skip_layers)}: must be different, and from 0 on")
    if weak is not None and perturb:
        raise UserError(f"perturb={perturb}: must be false with weak")
    parts = [*Path(weak).glob("*.safetensors")] if weak is not None else []
    if weak is not None and not ((Path(weak) / "config.json").is_file() and parts):
        raise UserError(
            f"weak={weak}: must be a folder of a network that diffusers has saved, as safetensors"
        )


def _check_weak(weak: str, denoiser: nn.Module) -> None:
    """Refuse, by its settings, a network that cannot take the other one's inputs."""
    own: Any = unwrap_module(denoiser)
    try:
        there = dict(json.loads((Path(weak) / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"weak={weak}: must have a config.json of diffusers") from error
    if there.get("_class_name", type(own).__name__) != type(own).__name__:
        raise UserError(f"weak={weak}: must be a {type(own).__name__}, is a {there['_class_name']}")
    for key in INPUTS:
        mine = own.config.get(key)
        if key in there and mine is not None and there[key] != mine:
            raise UserError(f"weak={weak}: {key}={there[key]}: must be {mine}, the network's")

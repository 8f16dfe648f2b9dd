"""Fine-tuning: weights of another network, as far as they fit, and what becomes of the rest.

Position tables are resampled to another number of patches, as is usual for vision transformers;
where classes are others, each begins as the null class did, which was trained on all images.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from w2s_train.checkpoint_file import read_checkpoint
from w2s_train.errors import UserError

SCALES = "scale_embedder.mlps."  # of ScaleInputs
POSITIONS, LABELS = "pos_embed", "y_embedder.embedding_table.weight"  # of DiT and its relatives
# Arguments that shapes do not tell, or tell badly; with others the weights mean something else.
UNSEEN = ("hidden_size", "num_heads", "time_scale", "time_shift", "scales_from", "rope", "data_on")
LEAST = 0.1  # share of a network's numbers below which it has not been warmed up
AVERAGE, OBJECTIVE = "ema.module.", "objective."


class Fit(NamedTuple):
    """What one state gives another."""

    state: dict[str, Tensor]  # complete: what does not fit is as it was
    changed: list[str]  # what is taken over in another form
    left: list[str]  # what has nothing to take over
    unused: list[str]  # what nothing takes over
    share: float  # of the numbers of the other one


def fitted(given: dict[str, Any], own: dict[str, Any]) -> Fit:
    """The weights of ``given`` for a network with the weights ``own``, name by name."""
    state, changed, left = dict[str, Tensor](), list[str](), Counter[str]()
    tensors = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        theirs = given.get(key)
        if not isinstance(theirs, Tensor):
            left[_part(key)] += 1
        elif theirs.shape == value.shape:
            state[key] = theirs
        elif key == POSITIONS and _is_grid(theirs, value):
            state[key] = resampled(theirs, value.shape[1])
            changed.append(f"{key}: resampled from {theirs.shape[1]} to {value.shape[1]} patches")
        elif key == LABELS and theirs.shape[1:] == value.shape[1:]:
            state[key] = theirs[-1:].expand_as(value)
            changed.append(
                f"{len(value) - 1} classes instead of {len(theirs) - 1}: all begin as none"
            )
        else:
            left[f"{key}, {tuple(value.shape)} and not {tuple(theirs.shape)}"] += 1
    new = [f"new: {name}" + (f" ({n} tensors)" if n > 1 else "") for name, n in left.items()]
    unused = Counter(_part(key) for key in given if key not in own and key[-11:] != "extra_state")
    taken = sum(value.numel() for value in state.values())
    total = sum(value.numel() for value in tensors.values())
    return Fit(
        own | state, changed, new, [f"not taken: {x}" for x in unused], taken / max(total, 1)
    )


def by_name(state: dict[str, Any], theirs: list[str], ours: list[str]) -> dict[str, Any]:
    """A state with the embedding of each scale in the place that the scale has among ``ours``.

    One that is not there is kept under its name, which nothing takes.
    """
    moved = {}
    for key, value in state.items():
        if key.startswith(SCALES):
            number, _, rest = key.removeprefix(SCALES).partition(".")
            name = dict(enumerate(theirs)).get(int(number), number)
            key = f"{SCALES}{ours.index(name)}.{rest}" if name in ours else f"scale {name}"
        moved[key] = value
    return moved


def _is_grid(one: Tensor, other: Tensor) -> bool:
    """Whether two tables of positions (1, N, D) are of square grids, and of one width."""
    squares = (math.isqrt(table.shape[1]) ** 2 == table.shape[1] for table in (one, other))
    return one.ndim == other.ndim == 3 and one.shape[::2] == other.shape[::2] and all(squares)


def resampled(table: Tensor, patches: int) -> Tensor:
    """A table of positions (1, N, D) of a square grid for another one, bicubic; exact for ramps."""
    old, new = math.isqrt(table.shape[1]), math.isqrt(patches)
    grid = table.float().transpose(1, 2).unflatten(2, (old, old))
    return (
        F.interpolate(grid, (new, new), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    )


def _part(key: str) -> str:
    """The part of a network that a weight is of: its name up to the first number."""
    words = key.split(".")
    first = next((i for i, word in enumerate(words) if word.isdecimal()), 0)
    return ".".join(words[: first + 1])


@torch.no_grad()
def warm_start(module: Any, path: str) -> str:
    """Begin with what fits of a checkpoint: the averaged weights, and those of weak sources.

    Copies of the network, in averages and weak sources, are made of the new weights.

    Args:
        module: A `DiffusionModule` before its first step.
        path: A checkpoint of ours, or the folder of a run: its last one.

    Returns:
        What has changed and what does not fit, in one line.

    Raises:
        UserError: No checkpoint of ours, of another kind of network, or one of which next to
            nothing fits.
    """
    content = _read(path, module.network)
    given = content["state_dict"]
    names = ((content["network"] or {}).get("init_args") or {}).get("scales") or []
    averaged = by_name(_within(AVERAGE, given), names, getattr(module.network, "scales", []))
    fit = fitted(averaged, module.network.state_dict())
    if fit.share < LEAST:
        raise UserError(
            f"start_from={path}: {fit.share:.1%} of the network's weights fit, must be {LEAST:.0%} "
            f"or more; {'; '.join(fit.left[:2])}"
        )
    for network in (module.network, *(each.module for each in (module.ema, *module.more_ema))):
        network.load_state_dict(fit.state)
    module.objective.bind(module.network, module.label_dropout)
    for guidance in module.guidances:
        guidance.bind(module.network, module.objective)
    everyone = (*module.objective.segments, *module.objective.lookers)
    alone = {id(p) for each in everyone for p in getattr(each.weak, "learned", ())}
    parameters = module.objective.named_parameters()
    own = {name: p for name, p in parameters if p.requires_grad or id(p) in alone}
    heads = fitted(_within(OBJECTIVE, given), own)
    for name, parameter in own.items():
        parameter.copy_(heads.state[name])
    said = "; ".join([*fit.changed, *fit.left, *fit.unused, *heads.left])
    return f"start_from={path}: {said or 'everything fits'}"


def _read(path: str, network: Any) -> dict[str, Any]:
    """The checkpoint, if its network computes what ours would with its weights."""
    file = Path(path) / "checkpoints" / "last.ckpt" if Path(path).is_dir() else Path(path)
    try:
        content = read_checkpoint(str(file))
    except UserError as error:
        reason = str(error).replace("path=", "start_from=", 1)
        raise UserError(
            f"{reason}; published weights are read by model.network=w2s_train.models.published_sit"
        ) from error
    made = content["network"] or {}
    theirs, ours = made.get("init_args", made), getattr(network, "arguments", {})
    for name in UNSEEN:
        if theirs.get(name) != ours.get(name) and name in theirs and name in ours:
            raise UserError(
                f"start_from={path}: has {name} {theirs[name]}, must have {ours[name]} as the "
                "network"
            )
    return content


def _within(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    """The part of a state below a prefix, which is taken off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

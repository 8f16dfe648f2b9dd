"""Which folders of images form the sweep of classifier-free guidance's scales."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from w2s_train.compare.images import Folder

ENOUGH = 3  # scales, of which a sweep is one


@dataclass(frozen=True)
class Sweep:
    """Folders that differ in the scale of classifier-free guidance alone, by ascending scale."""

    folders: list[Folder]
    scales: list[float]


def find_sweep(folders: Sequence[Folder]) -> Sweep:
    """The largest family of folders with classifier-free guidance, one folder a scale.

    Args:
        folders: Sorted by name; of two with one scale the first counts.
    """
    families: dict[str, dict[float, Folder]] = {}
    for folder in folders:
        given = folder.protocol["guidance_settings"]
        if (scale := scale_of(given)) is not None:
            families.setdefault(_rest(given), {}).setdefault(scale, folder)
    if not families:
        return Sweep([], [])
    family = max(families.values(), key=len)
    scales = sorted(family)
    return Sweep([family[scale] for scale in scales], scales)


def scale_of(settings: dict[str, Any]) -> float | None:
    """The scale s of v_null + s (v - v_null) at every step; None where that is not the guidance.

    Args:
        settings: ``guidance_settings`` of the protocol.
    """
    kind = settings["class"].rpartition(".")[2]
    scale = settings.get("guidance_scale")
    if not isinstance(scale, int | float) or not settings.get("enabled", True):
        return None
    if kind == "ClassifierFreeGuidance":
        # "Original" is v + s (v - v_null), whose s is smaller by one.
        return scale + 1.0 if settings.get("use_original_formulation") else float(scale)
    everywhere = settings.get("border") == 0 or settings.get("switch") == 1
    constant = not settings.get("guidance_delta")
    return float(scale) if kind == "SegmentedGuidance" and everywhere and constant else None


def _rest(settings: dict[str, Any]) -> str:
    """What else of classifier-free guidance is not as usual; of our own class nothing can be."""
    usual = {"guidance_rescale": 0.0, "start": 0.0, "stop": 1.0}
    if settings["class"].rpartition(".")[2] != "ClassifierFreeGuidance":
        return "{}"
    return json.dumps(
        {key: x for key in usual if (x := settings.get(key)) not in (None, usual[key])}
    )

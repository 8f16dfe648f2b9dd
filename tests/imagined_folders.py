"""Folders of `lightning imagine`, written by hand."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

CFG = "diffusers.guiders.classifier_free_guidance.ClassifierFreeGuidance"
SEGMENTED = "w2s_train.text2image.segmented.SegmentedGuidance"
PROTOCOL = {
    "model": {"name": "sd35_medium", "sha256": "aa"},
    "pipeline": "StableDiffusion3ModularPipeline",
    "guidance": "",
    "guidance_settings": {},
    "steps": 28,
    "height": 16,
    "width": 16,
    "max_sequence_length": 256,
    "negative_prompt": "",
    "dtype": "bfloat16",
    "device": "cuda",
    "versions": {"torch": "2.15.0"},
    "git_commit": "6b7eb92",
}


def cfg(scale: float, **more: Any) -> dict[str, Any]:
    """Settings of diffusers' classifier-free guidance."""
    usual = {"guidance_rescale": 0.0, "use_original_formulation": False, "start": 0.0, "stop": 1.0}
    return {"class": CFG, "guidance_scale": scale, **usual, "enabled": True} | more


def segmented(**more: Any) -> dict[str, Any]:
    """Settings of our segmented guidance."""
    usual = {"guidance_scale": 4.5, "weak_scale": 3.0, "border": 0.75, "switch": None}
    return {"class": SEGMENTED, **usual, "guidance_delta": 0.0, "enabled": True} | more


def write_images(
    folder: Path,
    guidance: dict[str, Any],
    score: Callable[[int, int], float] = lambda prompt, seed: 1.0,
    prompts: int = 4,
    seeds: int = 2,
    name: str = "hps_v2.1",
    png: bool = False,
    **protocol: Any,
) -> Path:
    """Write a folder of images.

    Args:
        folder: Where.
        guidance: Its settings.
        score: Of a prompt and a seed, counted from 0.
        prompts: How many.
        seeds: The same.
        name: Of the score.
        png: Whether there are images, too.
        **protocol: Changes of it.
    """
    folder.mkdir(parents=True)
    words = f"{guidance['class'].rpartition('.')[2]}({guidance['guidance_scale']})"
    content: dict[str, Any] = {"schema": 1, "judges": {name: "0123"}, "images": []}
    content["protocol"] = copy.deepcopy(PROTOCOL) | protocol
    content["protocol"] |= {"guidance": words, "guidance_settings": guidance}
    for i in range(prompts):
        for seed in range(seeds):
            entry = {"prompt": f"prompt {i}", "category": None, "seed": seed}
            entry |= {"file": f"prompt-{i}-{seed}.png", "evaluations": 56.0, "seconds": 2.0}
            content["images"].append(entry | {"scores": {name: score(i, seed)}})
            if png:
                Image.new("RGB", (16, 16), (30 * i, 90 * seed, 120)).save(folder / entry["file"])
    (folder / "imagine.json").write_text(json.dumps(content))
    return folder


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the record of a folder."""
    path = folder / "imagine.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))

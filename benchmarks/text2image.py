"""Times guidance of a text-to-image network: seconds in the transformer per image.

    python benchmarks/text2image.py --rounds 9 --json OUT.json

The network is Stable Diffusion 3's, of 24 blocks and random weights, in the steps that its pipeline
takes. Arms are timed in turn, step by step, so that a busy machine slows all alike; a ratio is the
median over rounds of an arm's time over that of the first.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from common import about, parse, synchronize, write_json
from torch import nn

from w2s_train.text2image import Guider, SegmentedGuidance
from w2s_train.text2image.grid import times_of

ARMS: dict[str, dict[str, Any]] = {
    "cfg": dict(border=0.0),
    "segmented": {},
    "unshared": dict(share_prefix=False),
    "slg": dict(border=None, switch=0.0),
    "none": dict(guidance_scale=1.0, weak_scale=0.0),
}
BLOCKS, TOKENS = 24, 154  # two text encoders' and T5's 77 tokens each, side by side


def network_of(width: int) -> Any:
    """Stable Diffusion 3's transformer with random weights."""
    import diffusers

    heads = width // 64
    options = dict(sample_size=32, patch_size=2, num_layers=BLOCKS, attention_head_dim=64)
    options |= dict(num_attention_heads=heads, joint_attention_dim=width, pos_embed_max_size=32)
    options |= dict(caption_projection_dim=64 * heads, pooled_projection_dim=width)
    cls: Any = diffusers.SD3Transformer2DModel
    return cls(**options).eval()


@torch.no_grad()
def step(guider: Guider, network: nn.Module, inputs: dict[str, Any], at: tuple[int, int]) -> float:
    """Seconds in the network during one step, of which ``at`` is the number and how many."""
    sigma = times_of(at[1], 3.0)[at[0]]
    guider.set_state(*at, torch.tensor(1000 * sigma))
    texts = inputs["texts"]
    seconds = 0.0
    for batch in guider.prepare_inputs({"texts": (texts, texts.clone())}):
        guider.prepare_models(network)
        rows = len(inputs["latents"])
        timestep = torch.full((rows,), 1000 * sigma, device=texts.device)
        synchronize()
        start = time.perf_counter()
        network(inputs["latents"], batch.texts, inputs["pooled"], timestep, return_dict=False)
        synchronize()
        seconds += time.perf_counter() - start
        guider.cleanup_models(network)
    return seconds


def measure(arms: list[str], width: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Seconds per image of each arm, and ratios to the first."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = network_of(width).to(device)
    inputs = dict(latents=torch.randn(1, 16, 32, 32), texts=torch.randn(1, TOKENS, width))
    inputs = {
        name: a.to(device) for name, a in (inputs | dict(pooled=torch.randn(1, width))).items()
    }
    guiders = {name: SegmentedGuidance(**ARMS[name]) for name in arms}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):  # the first warms up
        sums = dict.fromkeys(arms, 0.0)
        for number in range(steps):
            for name in arms if (i + number) % 2 else arms[::-1]:
                sums[name] += step(guiders[name], network, inputs, (number, steps))
        for name in arms if i else ():
            times[name].append(sums[name])
    entries = []
    for name in arms:
        pairs = zip(times[name], times[arms[0]], strict=True)
        low, ratio, high = statistics.quantiles([mine / first for mine, first in pairs], n=4)
        entry: dict[str, Any] = dict(arm=name, guidance=guiders[name].describe(), width=width)
        entry |= dict(blocks=BLOCKS, steps=steps, rounds=rounds, ratio=ratio)
        entries.append(
            entry | dict(ratio_quartiles=[low, high], seconds=statistics.median(times[name]))
        )
    return entries


def main() -> None:
    """Measure, print a table, write JSON."""
    lists: dict[str, tuple[str, list[str]]] = {"arms": ("cfg,segmented,unshared", list(ARMS))}
    numbers = {
        "rounds": (9, 2, "of images"),
        "width": (256, 64, "of the network, a multiple of 64"),
        "steps": (28, 2, "of an image"),
        "threads": (1, 1, "on the CPU"),
    }
    args = parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]), lists, numbers)
    torch.set_num_threads(args.threads)
    entries = measure(args.arms, args.width, args.steps, args.rounds)
    for e in entries:
        low, high = e["ratio_quartiles"]
        print(f"{e['arm']:10} {e['seconds']:8.2f} s  {e['ratio']:.3f} ({low:.3f} to {high:.3f})")
    if args.json:
        write_json(args.json, [entry | about() for entry in entries])


if __name__ == "__main__":
    main()

"""Times what Muon, and averages for after training, add to a step with AdamW.

    python benchmarks/optimizer.py --depth 2 --rows 10 --rounds 5 --json OUT.json

The parts of a step are timed in turn, round after round, at the shapes of B/2 (or another width):
forward and backward pass of so many rows, a step of fused AdamW, one of Muon, one update of two
averages. All are nearly proportional to the number of blocks. Ratios are for a step of
``--global_rows``, whose passes take as many times longer, to one with AdamW; medians over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import about, synchronize, write_json

from w2s_train.callbacks import PowerAverages
from w2s_train.models import DiT
from w2s_train.muon import MuonWithAdamW
from w2s_train.posthoc.averages import trained


def seconds(call: Callable[[], object]) -> float:
    """Of one call, on the device."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def parts(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed."""
    network = DiT(hidden_size=args.width, num_heads=args.width // 64, depth=args.depth).to(device)
    averages = PowerAverages()
    averages.averages = [
        [p.detach().clone() for p in trained(network).values()] for _ in averages.stds
    ]
    averages.time = averages.time.to(device)
    named = list(trained(network).items())
    adamw = torch.optim.AdamW([p for _, p in named], 1e-6, fused=True)
    muon, good = MuonWithAdamW(named, 1e-6), torch.tensor(True, device=device)
    x, t = torch.randn(args.rows, 4, 32, 32, device=device), torch.rand(args.rows, device=device)
    y = torch.randint(1000, (args.rows,), device=device)

    def passes() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            network(x, t, y).velocity.square().mean().backward()

    return {
        "passes": passes,
        "adamw": adamw.step,
        "muon": muon.step,
        "averages": lambda: averages.update(network, args.rows, good),
    }


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    numbers = dict(width=768, depth=12, rows=10, global_rows=256, rounds=5)
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timed = parts(args, device)
    found: dict[str, list[float]] = {name: [] for name in timed}
    for i in range(args.rounds + 1):
        for name, call in timed.items():
            took = seconds(call)
            found[name] += [took] if i else []  # the first round makes states
    rounds = [dict(zip(found, each, strict=True)) for each in zip(*found.values(), strict=True)]
    base = [args.global_rows / args.rows * each["passes"] + each["adamw"] for each in rounds]
    muon = [b + r["muon"] - r["adamw"] for b, r in zip(base, rounds, strict=True)]
    both = [b + r["averages"] for b, r in zip(base, rounds, strict=True)]
    entry = about() | {name: getattr(args, name) for name in numbers}
    entry["seconds"] = {name: statistics.median(each) for name, each in found.items()}
    for name, other in (("muon", muon), ("averages", both)):
        ratio = statistics.median(b / a for a, b in zip(base, other, strict=True))
        entry[f"{name}_ratio"] = ratio
        print(f"{name:9} {ratio:.4f} of a step with AdamW of {args.global_rows} rows")
    print(entry["seconds"])
    if args.json:
        write_json(args.json, [entry])


if __name__ == "__main__":
    main()

"""Times the training step of each recipe, as ratios to the baseline's.

    python benchmarks/step.py --networks tiny,s2 --recipes none,mg,branch --json OUT.json

The step is that of the real module and objective: label dropout, timesteps and noise, strong and
weak passes, backward, optimizer, averages, weak sources; on random data, past the start of every
schedule. All recipes of a network are timed in turn, in one process, round after round; a ratio is
the median over rounds of the recipe's time over that of ``none`` in the same round.
"""

import argparse
import contextlib
import json
import platform
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from w2s_train.callbacks.run_record import git_commit
from w2s_train.command import compose
from w2s_train.module import DiffusionModule

ROOT = Path(__file__).resolve().parent.parent
# Sizes, and the batch that fits a CPU.
LATENT = dict(input_size=32, patch_size=2, in_channels=4)
NETWORKS: dict[str, tuple[dict[str, int], int]] = {
    "tiny": (
        dict(input_size=8, patch_size=2, in_channels=1, hidden_size=64, depth=4, num_heads=4),
        64,
    ),
    "small": (
        dict(input_size=16, patch_size=2, in_channels=4, hidden_size=192, depth=12, num_heads=6),
        16,
    ),
    "s2": (LATENT | dict(hidden_size=384, depth=12, num_heads=6), 8),
    "b2": (LATENT | dict(hidden_size=768, depth=12, num_heads=12), 8),
}
STEPS_BEFORE = 1500  # of a plan of 1,800: every schedule has started
STEPS_TIMED = 8  # a multiple of the co-trained network's interval


class Timed:
    """One recipe, ready to take steps."""

    def __init__(self, network: str, recipe: str, batch: int, device: torch.device) -> None:
        sizes, default_batch = NETWORKS[network]
        options = [f"--model.network.init_args.{k}={v}" for k, v in sizes.items()]
        overlay = ROOT / "configs" / "weak" / f"{recipe}.yaml"
        files = ["-c", str(ROOT / "configs" / "digits_w2s.yaml"), "-c", str(overlay)]
        command = compose(["fit", *files, *options], run=False)
        self.module: DiffusionModule = command.model.to(device)
        self.module.plan(1800)
        for segment in self.module.objective.segments:
            if not segment.weak.ready:  # an early state: any weights take the same time
                segment.weak.set_extra_state({"taken": True, "old_enough": True})
        self.trainer: Any = SimpleNamespace(
            world_size=1,
            precision="32-true",
            global_step=STEPS_BEFORE,
            precision_plugin=SimpleNamespace(forward_context=contextlib.nullcontext),
        )
        self.module.trainer = self.trainer
        self.optimizer = self.module.configure_optimizers()
        n, network_ = batch or default_batch, self.module.network
        shape = (n, network_.in_channels, network_.input_size, network_.input_size)
        labels = torch.randint(network_.num_classes, (n,), device=device)
        self.batch = {"image": torch.randn(shape, device=device), "label": labels}

    def step(self) -> None:
        """One optimizer step, as the trainer takes it."""

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = self.module.training_step(self.batch, 0)
            loss.backward()
            return loss

        self.module.optimizer_step(0, 0, self.optimizer, closure)
        self.trainer.global_step += 1

    def seconds(self) -> float:
        """Per step, over a few steps."""
        _synchronize()
        began = time.perf_counter()
        for _ in range(STEPS_TIMED):
            self.step()
        _synchronize()
        return (time.perf_counter() - began) / STEPS_TIMED


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(network: str, recipes: list[str], rounds: int, batch: int) -> list[dict[str, Any]]:
    """Times of all recipes of one network."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timed = {recipe: Timed(network, recipe, batch, device) for recipe in recipes}
    for recipe in timed.values():
        recipe.seconds()
    times: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for i in range(rounds):
        print(f"{network}: round {i + 1} of {rounds}", flush=True)
        for name, recipe in timed.items():
            times[name].append(recipe.seconds())
    entries = []
    for name in recipes:
        ratios = [a / b for a, b in zip(times[name], times["none"], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        entries.append(
            {
                "network": network,
                "recipe": name,
                "precision": "32-true",
                "compile": False,
                "batch": len(timed[name].batch["label"]),
                "seconds": statistics.median(times[name]),
                "ratio": ratio,
                "ratio_quartiles": [low, high],
                "rounds": rounds,
            }
        )
    return entries


def main() -> None:
    """Measure, print a table, write JSON."""
    known = sorted(path.stem for path in (ROOT / "configs" / "weak").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="tiny", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--recipes", default=",".join(known), help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=0, help="rows; 0 is each network's own")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    networks, recipes = args.networks.split(","), args.recipes.split(",")
    for name, given, allowed in (("networks", networks, NETWORKS), ("recipes", recipes, known)):
        if unknown := set(given) - set(allowed):
            raise SystemExit(
                f"error: {name}={','.join(sorted(unknown))}: must be of {list(allowed)}"
            )
    if args.rounds < 3:
        raise SystemExit(f"error: rounds={args.rounds}: must be at least 3, for quartiles")
    torch.set_num_threads(args.threads)
    recipes = ["none", *(r for r in recipes if r != "none")]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    about = {"git_commit": git_commit(), "machine": machine, "torch": torch.__version__}
    entries = [e | about for n in networks for e in measure(n, recipes, args.rounds, args.batch)]
    for e in entries:
        low, high = e["ratio_quartiles"]
        print(
            f"{e['network']:5} {e['recipe']:17} {1000 * e['seconds']:8.1f} ms   "
            f"{e['ratio']:.2f}  ({low:.2f} to {high:.2f})"
        )
    if args.json:
        args.json.write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()

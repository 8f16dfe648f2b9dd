"""The synthetic study: when does which guidance help, at sampling and as a training target?

    python experiments/leaves/study.py            # trains what is missing, then scores and draws

Trains `few.yaml` and `many.yaml` with the targets in `arms/`, three seeds each, and compares
with guidance at sampling of the unguided network. What is finished is kept, stopped runs go on.
Writes results.json, tables.md and the figures beside this file.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from leaves import TIMES, Leaves, sample_scores, velocity_errors
from make import prepare

from w2s_train.guidance import Autoguidance, ClassifierFree, Guidance, Segmented, Unguided
from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT, saved_network
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Heun
from w2s_train.scores import git_commit
from w2s_train.timesteps import Uniform
from w2s_train.weak import Checkpoint

HERE = Path(__file__).parent
RUNS = Path("runs/leaves")
REGIMES = {  # config, classes, depth, optimizer steps
    "few": ("few", 4, 3, 4000),
    "many": ("many", 24, 1, 640),
    "many, under-trained": ("many", 24, 1, 160),
}
ARMS = ("none", "cfg", "autoguidance", "sgg")
SEEDS = (0, 1, 2)
SCALES = (1.2, 1 / (1 - 0.3), 2.0)  # the second is what the training targets amount to
BORDERS = (0.2, 0.5)
POINTS, STEPS = 4800, 16
LINEAR = LinearInterpolant()
METRICS = ("velocity_error", "energy_distance", "coverage", "outliers")
Entry = dict[str, Any]


def train(regime: str, arm: str, seed: int) -> Path:
    """The checkpoints of one run, which is trained if it is not there."""
    config, _, _, steps = REGIMES[regime]
    folder = RUNS / f"{config}-{steps}-{arm}-{seed}"
    if not (folder / "scores.json").is_file():  # written at the last step
        command = [sys.executable, "-m", "w2s_train", "fit", "--allow_imports", "leaves"]
        command += ["-c", str(HERE / f"{config}.yaml")]
        command += ["-c", str(HERE / "arms" / f"{arm}.yaml"), "--seed_everything", str(seed)]
        command += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps)]
        command += ["--model.objective.init_args.total_steps", str(steps)]
        command += ["--checkpoint.every_n_train_steps", str(steps // 16), "--ckpt_path", "last"]
        command += ["--trainer.default_root_dir", str(folder)]
        print(" ".join(command), flush=True)
        path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        subprocess.run(command, check=True, env=environment)
    return folder / "checkpoints"


def guidances(early: Path) -> list[tuple[str, float, Guidance]]:
    """Name, scale and guidance of everything that is tried at sampling."""
    tried: list[tuple[str, float, Guidance]] = []
    for scale in SCALES:
        cfg, auto = ClassifierFree(scale), Autoguidance(scale, Checkpoint(str(early), "raw"))
        tried += [("cfg", scale, cfg), ("autoguidance", scale, auto)]
        for border in BORDERS:
            low = Autoguidance(scale, Checkpoint(str(early), "raw"))
            name = f"sgg, border {border}"
            tried.append((name, scale, Segmented(border, low, ClassifierFree(scale))))
    return tried


@torch.no_grad()
def score(leaves: Leaves, network: DiT, guidance: Guidance, keep: bool) -> Entry:
    """All metrics of one network under one guidance; with ``keep``, some of the points."""
    guidance.bind(network, WeakToStrongObjective(LINEAR, Uniform()))
    y, sampler = torch.arange(POINTS) % leaves.num_classes, Heun(STEPS)
    field = guidance.field(network, y, sampler.times())
    noise = torch.randn(POINTS, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    points = sampler(field, noise, lambda: noise).flatten(1)
    result: Entry = dict(sample_scores(leaves, points, y))
    few = y[:4000]
    errors = velocity_errors(leaves, guidance.field(network, few, sampler.times()), few, LINEAR)
    result |= {"velocity_errors": errors, "velocity_error": statistics.fmean(errors)}
    if keep:
        result["points"] = [[round(c, 4) for c in p] for p in points[:2400].tolist()]
    return result


def evaluate(regime: str, seed: int) -> list[Entry]:
    """Every method of one regime and seed."""
    config, classes, depth, steps = REGIMES[regime]
    found_before = RUNS / f"{config}-{steps}-{seed}.json"
    if found_before.is_file():
        return json.loads(found_before.read_text())
    leaves, entries = Leaves(classes, depth), []
    folders = {arm: train(regime, arm, seed) for arm in ARMS}
    early = folders["none"] / f"step-{steps // 4:06d}.ckpt"  # what the arms take, too
    tried = [("sampling", name, scale, g) for name, scale, g in guidances(early)]
    tried += [("training", arm, SCALES[1] if arm != "none" else 1.0, Unguided()) for arm in ARMS]
    tried.append(("weak", "the weak network", 1.0, Unguided()))
    for where, name, scale, guidance in tried:
        arm = name if where == "training" else "none"
        network = saved_network(str(folders[arm] / "last.ckpt")).eval()
        if where == "weak":
            network = saved_network(str(early), "raw").eval()
        keep = seed == 0 and scale in (1.0, SCALES[1])
        found = score(leaves, network, guidance, keep)
        entries.append(dict(regime=regime, seed=seed, where=where, name=name, scale=scale) | found)
        print(regime, seed, where, name, f"{scale:.3g}", found["energy_distance"], flush=True)
    y = torch.arange(POINTS) % classes
    true = leaves.sample(y, torch.Generator().manual_seed(99 + seed))
    data = dict(regime=regime, seed=seed, where="data", name="true points", scale=1.0)
    entries.append(data | sample_scores(leaves, true, y) | {"velocity_error": 0.0})
    found_before.write_text(json.dumps(entries))
    return entries


def label(entry: Entry) -> str:
    """Where and how a result was guided."""
    if entry["name"] == "none":
        return "no guidance"
    if entry["where"] in ("data", "weak"):
        return entry["name"]
    scale = "w = 0.3" if entry["where"] == "training" else f"s = {entry['scale']:.3g}"
    return f"{entry['where']}: {entry['name']}, {scale}"


def groups(entries: list[Entry], regime: str) -> dict[str, list[Entry]]:
    """The entries of a regime by label, one per seed."""
    found = defaultdict(list)
    for entry in entries:
        if entry["regime"] == regime:
            found[label(entry)].append(entry)
    return found


def table(entries: list[Entry], regime: str) -> str:
    """Mean and standard deviation over seeds, as Markdown; the best of each column in bold."""
    rows = groups(entries, regime)
    means = {
        name: {m: statistics.fmean(e[m] for e in group) for m in METRICS}
        for name, group in rows.items()
    }
    rivals = [name for name in rows if name not in ("true points", "the weak network")]
    best = {}
    for m in METRICS:
        choose = max if m == "coverage" else min
        best[m] = choose((means[name][m], name) for name in rivals)[1]
    columns = [*METRICS, "energy / unguided"]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    plain = [e["energy_distance"] for e in rows["no guidance"]]
    for name, group in rows.items():
        cells = []
        for m in METRICS:
            spread = statistics.stdev(e[m] for e in group)
            digits = 4 if m == "energy_distance" else 3
            cell = f"{means[name][m]:.{digits}f} ± {spread:.{digits}f}"
            cells.append(f"**{cell}**" if best[m] == name else cell)
        # Seed by seed: what training left behind differs more than the methods do.
        ratios = [e["energy_distance"] / p for e, p in zip(group, plain, strict=True)]
        cells.append(f"{statistics.fmean(ratios):.2f} ± {statistics.stdev(ratios):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_errors(entries: list[Entry]) -> None:
    """Error to the optimal velocity over noise levels, relative to no guidance."""
    figure, axes = plt.subplots(2, len(REGIMES), figsize=(15, 7.5), sharex=True)
    for row, where in zip(axes, ("sampling", "training"), strict=True):
        for axis, regime in zip(row, REGIMES, strict=True):
            rows = groups(entries, regime)
            plain = [e["velocity_errors"] for e in rows["no guidance"]]
            for group in rows.values():
                if group[0]["where"] != where or abs(group[0]["scale"] - SCALES[1]) > 1e-9:
                    continue
                ratios = torch.tensor([e["velocity_errors"] for e in group]) / torch.tensor(plain)
                mean, spread = ratios.mean(0), ratios.std(0)
                (line,) = axis.plot(TIMES, mean, label=group[0]["name"])
                axis.fill_between(
                    TIMES, mean - spread, mean + spread, alpha=0.2, color=line.get_color()
                )
            axis.axhline(1, color="grey", lw=0.8)
            axis.set_title(f"{regime}; guided at {where}, effective scale 1.43", fontsize=10)
            axis.set_yscale("log")
            axis.set_ylabel("error / error without guidance")
            axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("t  (0 is data, 1 is noise)")
    figure.tight_layout()
    figure.savefig(HERE / "errors.png", dpi=100)


def draw_clouds(entries: list[Entry], regime: str) -> None:
    """Points of seed 0 over the true density, for the methods at an effective scale of 1.43."""
    leaves = Leaves(*REGIMES[regime][1:3])
    shown = [e for e in entries if e["regime"] == regime and "points" in e]
    side = torch.linspace(-2.5, 2.5, 220)
    grid = torch.cartesian_prod(side, side)
    null = torch.full((len(grid),), leaves.num_classes)
    density = leaves.log_density(grid, torch.zeros(len(grid)), null).exp().view(220, 220).T
    columns = 4
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(13, 3.4 * lines))
    for axis in axes.flat:
        axis.axis("off")
    for axis, entry in zip(axes.flat, shown, strict=False):
        axis.imshow(density.sqrt(), origin="lower", extent=(-2.5, 2.5, -2.5, 2.5), cmap="Greys")
        x, y = torch.tensor(entry["points"]).T
        axis.scatter(x, y, s=1.2, c=torch.arange(len(x)) % leaves.num_classes, cmap="tab20")
        axis.set_xlim(-2.5, 2.5)
        axis.set_ylim(-2.5, 2.5)
        axis.set_title(label(entry), fontsize=9)
    figure.tight_layout()
    name = "_".join(regime.replace(",", "").split())
    figure.savefig(HERE / f"clouds_{name}.png", dpi=80)


def main() -> None:
    """Train, score, write."""
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    prepare()
    entries = [e for seed in SEEDS for regime in REGIMES for e in evaluate(regime, seed)]
    about: Entry = {
        "git_commit": git_commit(),
        "machine": platform.processor() or platform.machine(),
    }
    about |= {"torch": torch.__version__, "points": POINTS, "sampler": f"Heun {STEPS}"}
    runs = [json.loads(path.read_text())[-1] for path in sorted(RUNS.glob("*/scores.json"))]
    about["trained_at"] = sorted({run["protocol"]["git_commit"] for run in runs})
    lean = [{k: v for k, v in e.items() if k != "points"} for e in entries]
    (HERE / "results.json").write_text(json.dumps({"about": about, "results": lean}, indent=1))
    tables = []
    for regime, (_, classes, depth, steps) in REGIMES.items():
        title = f"{regime}: {classes} classes, depth {depth}, {steps:,} steps"
        tables.append(f"## {title}\n\n{table(entries, regime)}\n")
    (HERE / "tables.md").write_text("\n".join(tables))
    print("\n".join(tables))
    draw_errors(entries)
    for regime in REGIMES:
        draw_clouds(entries, regime)


if __name__ == "__main__":
    main()

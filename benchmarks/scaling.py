"""What more processes bring: measured on two CPU processes, and worked out for 8 and 64 GPUs.

    python benchmarks/scaling.py measure [--steps 100] [--rounds 3] [--json OUT.json]
    python benchmarks/scaling.py paper

Measured is `lightning fit -c configs/digits_w2s.yaml` as a user runs it, with the same rows per
process: alone, twice at the same time without knowing of each other, and as two processes of one
run. The second shows what sharing the machine costs, the third what communication costs on top.

On paper, a ring of n processes sends 2 (n - 1) / n times the bytes of the gradients per step and
process. The backward pass takes two thirds of the step, and all but the last bucket of gradients
are sent while it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from common import about, on_paper, parse, write_json
from flops import PEAKS, step_flops

from w2s_train.models import DiT

ROWS = 64  # per process, measured
GLOBAL_BATCH = 256  # on paper
UTILIZATION = 0.5  # share of the GPU's FLOP/s in use
BUCKET = 25 * 2**20  # bytes that DDP sends at once


class Link(NamedTuple):
    """What the slowest part of the ring runs over."""

    name: str
    processes: int
    speed: float  # bytes per second and direction


LINKS = (
    Link("8 GPUs of a node, NVLink 450 GB/s", 8, 450e9),
    Link("8 nodes, 8 x 400 Gb/s each", 64, 8 * 50e9),
    Link("8 nodes, 1 x 400 Gb/s each", 64, 50e9),
)

# ---- on paper ----------------------------------------------------------------------------------


def volume(numbers: int, processes: int) -> float:
    """Bytes that each process sends per step: float32 gradients around a ring, twice."""
    return 2 * (processes - 1) / processes * 4 * numbers


class Step(NamedTuple):
    """Seconds of one step on paper."""

    compute: float
    sending: float
    exposed: float  # of the sending, what the backward pass does not hide

    @property
    def share(self) -> float:
        """Of the step, that is spent waiting for the others."""
        return self.exposed / (self.compute + self.exposed)


def step_on_paper(network: DiT, link: Link) -> Step:
    """The step of a plain velocity objective at the global batch."""
    numbers = sum(p.numel() for p in network.parameters() if p.requires_grad)
    sending = volume(numbers, link.processes) / link.speed
    flops = step_flops(network, GLOBAL_BATCH) / link.processes
    compute = flops / (PEAKS["NVIDIA H100 80GB HBM3"] * UTILIZATION)
    last = sending * min(1, BUCKET / (4 * numbers))
    return Step(compute, sending, max(sending - compute * 2 / 3, last))


def paper() -> None:
    """Print the table."""
    print("| network | ring | sent per step, GB | sending, ms | step, ms | exposed, ms | share |")
    print("|---|---|---|---|---|---|---|")
    for name in ("b2", "xl2"):
        network = on_paper(name)
        numbers = sum(p.numel() for p in network.parameters() if p.requires_grad)
        for link in LINKS:
            step = step_on_paper(network, link)
            times = " | ".join(f"{1000 * x:.2f}" for x in (step.sending, step.compute))
            sent = volume(numbers, link.processes) / 1e9
            last = f"{1000 * step.exposed:.2f} | {step.share:.1%}"
            print(f"| {name} | {link.name} | {sent:.2f} | {times} | {last} |")


# ---- measured ----------------------------------------------------------------------------------


def seconds_per_step(processes: int, together: int, steps: int) -> float:
    """The mean of the second half of a fit, or of several fits at the same time."""
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(i) for i in range(together)]
        children = [start(folder, processes, steps) for folder in folders]
        for child in children:
            output, _ = child.communicate()
            if child.returncode:
                raise RuntimeError(f"the fit ended with {child.returncode}: {output[-2000:]}")
        return statistics.mean(second_half(folder, steps) for folder in folders)


def start(folder: Path, processes: int, steps: int) -> subprocess.Popen[str]:
    """A fit of 2 x steps with an evaluation in the middle and at the end."""
    command = [sys.executable, "-m", "w2s_train", "fit", "-c", "configs/digits_w2s.yaml"]
    command += [f"--trainer.max_steps={2 * steps}", f"--trainer.val_check_interval={steps}"]
    command += [f"--trainer.devices={processes}", "--data.num_generated=8", "--data.num_workers=0"]
    command += [f"--data.global_batch_size={ROWS * processes}", f"--data.batch_size={ROWS}"]
    command += [f"--trainer.default_root_dir={folder}", "--model.sampler.init_args.steps=2"]
    command += ["--trainer.strategy=ddp"] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, env=environment, **pipes)


def second_half(folder: Path, steps: int) -> float:
    """Seconds per step between the two evaluations of a fit."""
    scores = json.loads((folder / "scores.json").read_text())
    seconds = {score["step"]: score["protocol"]["training_seconds"] for score in scores}
    return (seconds[2 * steps] - seconds[steps]) / steps


def measure(steps: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which all three take their turn."""
    cases = {"alone": (1, 1), "side_by_side": (1, 2), "two_processes": (2, 1)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(seconds_per_step(*case, steps))
    alone, beside, two = times.values()
    pairs = list(zip(alone, beside, two, strict=True))
    return {
        "step_ms": {name: [round(1000 * x, 2) for x in each] for name, each in times.items()},
        "throughput_ratio": round(statistics.median(2 * a / c for a, _, c in pairs), 3),
        "ratio_without_communication": round(statistics.median(2 * a / b for a, b, _ in pairs), 3),
        "communication_share": round(statistics.median(1 - b / c for _, b, c in pairs), 3),
        "rows_per_process": ROWS,
        "steps": steps,
    }


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "paper"))
    numbers = {"steps": (100, 1, "between two evaluations"), "rounds": (3, 1, "of three fits")}
    given = parse(parser, {}, numbers)
    if given.what == "paper":
        return paper()
    result = measure(given.steps, given.rounds) | about()
    print(json.dumps(result, indent=1))
    if given.json:
        write_json(given.json, [result])


if __name__ == "__main__":
    main()

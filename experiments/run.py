"""Train the arms of a study: every arm with every seed, as its study.yaml says.

    python experiments/run.py mnist                 everything that is not done yet
    python experiments/run.py mnist --arms none sgg --seeds 10 --jobs 2
    python experiments/run.py mnist --commands      only print the commands

Runs live in runs/STUDY/ARM-SEED, go on where they were stopped, and leave what
experiments/remake.py needs in experiments/STUDY/runs/ARM-SEED: config, environment and scores.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("config.yaml", "environment.json", "scores.json")


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        study: Name of the study's folder.
        arm: Name of the arm.
        seed: ``seed_everything``.
        command: Words of the command, to be run in the root of the checkout.
    """

    study: str
    arm: str
    seed: int
    command: list[str]

    @property
    def name(self) -> str:
        """As in the comparison."""
        return f"{self.arm}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return ROOT / "runs" / self.study / self.name

    @property
    def record(self) -> Path:
        """Where its scores are kept."""
        return ROOT / "experiments" / self.study / "runs" / self.name


def load(study: str) -> dict[str, Any]:
    """The study's description.

    Raises:
        SystemExit: There is none of that name.
    """
    path = ROOT / "experiments" / study / "study.yaml"
    if not path.is_file():
        names = sorted(p.parent.name for p in path.parent.parent.glob("*/study.yaml"))
        sys.exit(f"error: study={study}: must be one of {', '.join(names)}")
    return dict(yaml.safe_load(path.read_text()))


def options_of(arm: str | dict[str, Any]) -> list[str]:
    """The words that an arm adds: those of a text, or options with their values as JSON."""
    if isinstance(arm, str):
        return shlex.split(arm)
    return [word for key, value in arm.items() for word in (key, json.dumps(value))]


def jobs(study: str, arms: list[str] | None = None, seeds: list[int] | None = None) -> list[Job]:
    """Its runs, all arms of a seed before the next seed.

    Raises:
        SystemExit: There is no such study or arm.
    """
    about = load(study)
    unknown = sorted(set(arms or []) - set(about["arms"]))
    if unknown:
        sys.exit(f"error: arms={unknown[0]}: must be one of {', '.join(about['arms'])}")
    chosen = [arm for arm in about["arms"] if arms is None or arm in arms]
    found = []
    for seed in seeds or about["seeds"]:
        for arm in chosen:
            words = shlex.split(about["command"].format(arm=arm, seed=seed))
            found.append(Job(study, arm, seed, [*words, *options_of(about["arms"][arm])]))
    return found


def is_done(job: Job) -> bool:
    """Its last score is recorded."""
    return (job.record / "scores.json").is_file()


def keep(job: Job) -> None:
    """Copy what a comparison needs, and the last grid of the first seed."""
    job.record.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(job.folder / name, job.record / name)
    if job.seed == load(job.study)["seeds"][0]:
        last = max((job.folder / "grids").glob("*.png"))
        (job.record / "grids").mkdir(exist_ok=True)
        shutil.copyfile(last, job.record / "grids" / last.name)


def train(job: Job) -> int:
    """Run one command, its output in a file; return its status."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    output = job.folder.with_name(f"{job.name}.log")
    began = time.monotonic()
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    with output.open("a") as log:
        status = subprocess.run(
            job.command,
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            check=False,
        ).returncode
    if status == 0:
        keep(job)
        last = json.loads((job.record / "scores.json").read_text())[-1]
        said = f"{last['metric']} {last['value']:.4g} at step {last['step']}"
    else:
        said = f"status {status}, see {output}"
    print(f"{job.study} {job.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    return status


def main() -> None:
    """Parse, and run what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--commands", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args()
    found = jobs(options.study, options.arms, options.seeds)
    if options.commands:
        print("\n".join(shlex.join(job.command) for job in found))
        return
    left = [job for job in found if not is_done(job)]
    print(f"{options.study}: {len(found) - len(left)} of {len(found)} runs are done", flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        sys.exit(max(pool.map(train, left), default=0))


if __name__ == "__main__":
    main()

"""Train the arms of a study: every arm with every seed, as its study.yaml says.

    python experiments/run.py mnist                 everything that is not done yet
    python experiments/run.py mnist --arms none sgg --seeds 10 --jobs 2
    python experiments/run.py mnist --limit 500     stop after as many seconds
    python experiments/run.py mnist --commands      only print the commands

Runs live in runs/STUDY/ARM-SEED and leave what experiments/remake.py needs in
experiments/STUDY/runs/ARM-SEED: config, environment and scores. Ctrl-C or the limit stops them with
a checkpoint each, and the same command goes on; the status is then 75.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("config.yaml", "environment.json", "scores.json")
STOPPED = 75  # status of a fit that was asked to stop, and of a study with such fits
GRACE = 60.0  # seconds that a stopped run has for its checkpoint


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


def options_of(added: str | dict[str, Any], names: dict[str, Any]) -> list[str]:
    """The words that an arm adds: those of a text, or options with their values as JSON."""
    if isinstance(added, str):
        return shlex.split(added.format(**names))
    words = []
    for key, value in added.items():
        words += [key, value.format(**names) if isinstance(value, str) else json.dumps(value)]
    return words


def jobs(study: str, arms: list[str] | None = None, seeds: list[int] | None = None) -> list[Job]:
    """Its runs, all arms of a seed before the next seed.

    Raises:
        SystemExit: There is no such study or arm.
    """
    about = load(study)
    every: dict[str, list[int]] = about["seeds"]
    if isinstance(every, list):
        every = dict.fromkeys(about["arms"], every)
    unknown = sorted(set(arms or []) - set(every))
    if unknown:
        sys.exit(f"error: arms={unknown[0]}: must be one of {', '.join(every)}")
    chosen = {arm: seeds or own for arm, own in every.items() if arms is None or arm in arms}
    found = []
    for seed in sorted(set().union(*chosen.values())):
        for arm in (arm for arm, own in chosen.items() if seed in own):
            names = {"arm": arm, "seed": seed}
            words = shlex.split(about["command"].format(**names))
            found.append(Job(study, arm, seed, words + options_of(about["arms"][arm], names)))
    return found


def is_done(job: Job) -> bool:
    """Its last score is recorded."""
    return (job.record / "scores.json").is_file()


def keep(job: Job) -> None:
    """Copy what a comparison needs, and the last grid of an arm's first seed."""
    job.record.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(job.folder / name, job.record / name)
    if job.seed == jobs(job.study, [job.arm])[0].seed:
        for last in sorted((job.folder / "grids").glob("*.png"))[-1:]:
            (job.record / "grids").mkdir(exist_ok=True)
            shutil.copyfile(last, job.record / "grids" / last.name)


class Runner:
    """Runs jobs until a time or a signal stops them.

    Args:
        limit: Seconds from now on; None is no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.deadline = math.inf if limit is None else time.monotonic() + limit
        self.asked = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: self.asked.set())

    @property
    def over(self) -> bool:
        """No further step is wanted."""
        return self.asked.is_set() or time.monotonic() > self.deadline

    def train(self, job: Job) -> int:
        """Run one command, its output in a file; return its status."""
        if self.over:
            return STOPPED
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        output = job.folder.with_name(f"{job.name}.log")
        began = time.monotonic()
        print(f"{job.study} {job.name}: started, see {output}", flush=True)
        with output.open("a") as log:
            status = self._wait(
                subprocess.Popen(
                    [sys.executable, "-m", "w2s_train", *job.command[1:]],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={"OMP_NUM_THREADS": "1", **os.environ},
                    start_new_session=True,  # a Ctrl-C reaches it once, through us
                )
            )
        said = f"status {status}, see {output.name}"
        if status == 0:
            keep(job)
            last = json.loads((job.record / "scores.json").read_text())[-1]
            said = f"{last['metric']} {last['value']:.4g} at step {last['step']}"
        print(f"{job.study} {job.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        return status

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        """The status of a process, which is asked to end when the time is over."""
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if self.over:
                    break
        process.terminate()
        try:
            return process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def main() -> None:
    """Parse, and run what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit", type=float, help="seconds after which everything is stopped")
    parser.add_argument("--commands", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args()
    found = jobs(options.study, options.arms, options.seeds)
    if options.commands:
        print("\n".join(shlex.join(job.command) for job in found))
        return
    left = [job for job in found if not is_done(job)]
    print(f"{options.study}: {len(found) - len(left)} of {len(found)} runs are done", flush=True)
    runner = Runner(options.limit)
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(runner.train, left))
    failed = [status for status in statuses if status not in (0, STOPPED)]
    sys.exit(failed[0] if failed else max(statuses, default=0))


if __name__ == "__main__":
    main()

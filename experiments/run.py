"""Train the arms of a study: every arm with every seed, as its study.yaml says.

    python experiments/run.py mnist                 everything that is not done yet
    python experiments/run.py mnist --arms none head_above --seeds 10 --jobs 2
    python experiments/run.py mnist --limit 500     stop after as many seconds
    python experiments/run.py mnist --arms none --seeds 10 --again    from scratch, as a check
    python experiments/run.py mnist_gpu --cpu       every arm once in a few steps, to try it
    python experiments/run.py mnist --commands      only print the commands

Runs live in runs/STUDY/ARM-SEED and leave what experiments/remake.py needs in
experiments/STUDY/runs/ARM-SEED: config, environment and scores. Ctrl-C or the limit stops them with
a checkpoint each, and the same command goes on; the status is then 75. With --again they live in
runs/again and are compared with what is recorded, which stays. With --cpu they live in runs/cpu, as
do their records, and have the words that the study adds as `cpu`.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from w2s_train.compare.numbers import half_width
from w2s_train.errors import PREEMPTED
from w2s_train.files import atomic_write
from w2s_train.scores import read_scores

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("config.yaml", "environment.json")  # of trainings; beside scores.json
GRACE = 60.0  # seconds that a stopped run has for its checkpoint
LEAST = 90.0  # seconds before the limit in which nothing is started: it would end before a step


@dataclass(frozen=True)
class Job:
    """One run.

    Args:
        study: Name of the study's folder.
        arm: Name of the arm.
        seed: ``seed_everything``.
        command: Words of the command, to be run in the root of the checkout.
        folder: Where it runs.
        records: Folder of what its study's runs have left.
    """

    study: str
    arm: str
    seed: int
    command: list[str]
    folder: Path
    records: Path

    @property
    def name(self) -> str:
        """As in the comparison."""
        return f"{self.arm}-{self.seed}"

    @property
    def record(self) -> Path:
        """Where its scores are kept."""
        return self.records / self.name

    @property
    def is_recorded(self) -> bool:
        """It ran to its end."""
        return (self.record / "scores.json").is_file()


def load(study: str) -> dict[str, Any]:
    """The study's description; ``seeds`` by arm.

    Raises:
        SystemExit: There is none of that name.
    """
    path = ROOT / "experiments" / study / "study.yaml"
    if not path.is_file():
        names = sorted(p.parent.name for p in path.parent.parent.glob("*/study.yaml"))
        sys.exit(f"error: study={study}: must be one of {', '.join(names)}")
    about = dict(yaml.safe_load(path.read_text()))
    if isinstance(about["seeds"], list):
        about["seeds"] = dict.fromkeys(about["arms"], about["seeds"])
    return about


def options_of(added: str | dict[str, Any], seed: int) -> list[str]:
    """The words that an arm adds: those of a text, or options with their values as JSON.

    {seed} in the value of an option is the seed.
    """
    if isinstance(added, str):
        return shlex.split(added)
    words = []
    for key, value in added.items():
        words += [key, value.format(seed=seed) if isinstance(value, str) else json.dumps(value)]
    return words


def chosen(name: str, wanted: Sequence[Any] | None, allowed: Sequence[Any]) -> list[Any]:
    """What is wanted, once each, by default everything.

    Raises:
        SystemExit: It is not allowed.
    """
    for item in wanted or ():
        if item not in allowed:
            sys.exit(f"error: {name}={item}: must be one of {', '.join(map(str, allowed))}")
    return list(dict.fromkeys(wanted or allowed))


def jobs(
    study: str,
    arms: list[str] | None = None,
    seeds: list[int] | None = None,
    kind: Literal["", "again", "cpu"] = "",
) -> list[Job]:
    """Its runs, all arms of a seed before the next seed; of kind "cpu" those of the first seed.

    "again" checks recorded results from scratch, "cpu" tries a GPU's study in a few steps; each
    has folders of its own.

    Raises:
        SystemExit: There is no such study, arm or seed, or it has no words for a CPU.
    """
    about = load(study)
    own: dict[str, list[int]] = about["seeds"]
    base = Path("runs", kind, study)
    records = Path("experiments", study, "runs")
    if kind == "cpu":
        if "cpu" not in about:
            sys.exit(f"error: cpu={study}: must be a study whose study.yaml has `cpu`")
        own, records = {arm: had[:1] for arm, had in own.items()}, base / "records"
    arms = chosen("arms", arms, list(own))
    found = []
    for seed in chosen("seeds", seeds, sorted(set().union(*own.values()))):
        for arm in (arm for arm in arms if seed in own[arm]):
            place = base / f"{arm}-{seed}"
            words = command(about["command"], about["arms"][arm], seed, place)
            words += shlex.split(about["cpu"]) if kind == "cpu" else []
            found.append(Job(study, arm, seed, words, ROOT / place, ROOT / records))
    if not found:
        had = "; ".join(f"{arm} has {', '.join(map(str, own[arm]))}" for arm in arms)
        wanted = ", ".join(map(str, seeds or ()))
        sys.exit(f"error: seeds={wanted}: must be of these arms: {had}")
    return found


def command(common: str, added: str | dict[str, Any], seed: int, place: Path) -> list[str]:
    """The words of a run: what is common to its study, what its arm adds, seed and folder."""
    words = shlex.split(common) + options_of(added, seed)
    words += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(place)]
    return words + (["--ckpt_path", "last"] if words[1] == "fit" else [])


def keep(job: Job) -> None:
    """Copy what a comparison needs, and grids of an arm's first seed; the scores last.

    Of a training it is the last grid, else those of guidances.
    """
    job.record.mkdir(parents=True, exist_ok=True)
    trained = job.command[1] == "fit"
    kept = [job.folder / name for name in KEPT] if trained else []
    if job.seed == load(job.study)["seeds"][job.arm][0]:
        grids = sorted((job.folder / "grids").glob("*.png" if trained else "step-*-*-*.png"))
        kept += grids[-1:] if trained else grids
    for path in kept:
        copy = job.record / path.relative_to(job.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    with atomic_write(job.record / "scores.json") as file:
        file.write((job.folder / "scores.json").read_bytes())


def last_value(folder: Path) -> float:
    """The last score of a run by the first of its metrics and guidances, whichever follow."""
    scores = read_scores(folder)
    first = (scores[0].metric, scores[0].guidance)
    return [score for score in scores if (score.metric, score.guidance) == first][-1].value


def against_record(job: Job) -> str:
    """What a run that was made again says about the one that is recorded."""
    same = [other for other in jobs(job.study, [job.arm]) if other.is_recorded]
    values = {other.seed: last_value(other.record) for other in same}
    value = last_value(job.folder)
    recorded = ", ".join(f"{v:.6g} (seed {seed})" for seed, v in values.items()) or "nothing"
    said = f"{value:.6g}; recorded: {recorded}"
    if len(values) < 2:
        return said
    mean = statistics.fmean(values.values())
    width = half_width(statistics.stdev(values.values()), len(values))
    place = "inside" if abs(value - mean) <= width else "outside of"
    return f"{said}; {place} their mean's interval, {mean - width:.6g} to {mean + width:.6g}"


class Runner:
    """Runs jobs until a time or a signal stops them.

    Args:
        limit: Seconds from now on; None is no limit.
        again: Recorded runs are made again.
    """

    def __init__(self, limit: float | None, again: bool) -> None:
        self.deadline = math.inf if limit is None else time.monotonic() + limit
        self.again = again
        self.asked = threading.Event()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: self.asked.set())

    def is_over(self, left: float = 0.0) -> bool:
        """Somebody asked to stop, or fewer seconds are left."""
        return self.asked.is_set() or time.monotonic() + left > self.deadline

    def train(self, job: Job) -> int:
        """Run one command, its output in a file; return its status."""
        if self.is_over(LEAST):
            return PREEMPTED
        if self.again and job.folder.exists():
            shutil.rmtree(job.folder)
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        output = job.folder.with_name(f"{job.name}.log")
        began = time.monotonic()
        print(f"{job.study} {job.name}: started, see {output}", flush=True)
        with output.open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "w2s_train", *job.command[1:]],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # a Ctrl-C reaches it once, through us
            )
            status = self._wait(process)
        said = f"status {status}, see {output.name}"
        if status == 0 and self.again:
            said = against_record(job)
        elif status == 0:
            keep(job)
            said = f"{last_value(job.record):.4g}"
        print(f"{job.study} {job.name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
        return status

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        """The status of a process, which is asked to end when the time is over."""
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if self.is_over():
                    break
        process.terminate()
        try:
            return process.wait(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return PREEMPTED  # by us: it goes on from an older checkpoint


def main() -> None:
    """Parse, and run what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--limit", type=float, help="seconds after which everything is stopped")
    kinds = parser.add_mutually_exclusive_group()
    for kind, meaning in (
        ("again", "check recorded results from scratch"),
        ("cpu", "try it in a few steps; for a GPU's study"),
    ):
        kinds.add_argument(f"--{kind}", action="store_const", dest="kind", const=kind, help=meaning)
    parser.set_defaults(kind="")
    parser.add_argument("--commands", action="store_true", help="print the commands, run nothing")
    options = parser.parse_args()
    if options.jobs < 1:
        sys.exit(f"error: jobs={options.jobs}: must be at least 1")
    if options.limit is not None and not options.limit > 0:
        sys.exit(f"error: limit={options.limit:g}: must be seconds above 0")
    found = jobs(options.study, options.arms, options.seeds, options.kind)
    if options.commands:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as `| head` expects
        print("\n".join(f"OMP_NUM_THREADS=1 {shlex.join(job.command)}" for job in found))
        return
    again = options.kind == "again"
    left = [job for job in found if again or not job.is_recorded]
    print(f"{options.study}: {len(found) - len(left)} of {len(found)} runs are done", flush=True)
    runner = Runner(options.limit, again)
    with ThreadPoolExecutor(options.jobs) as pool:
        statuses = list(pool.map(runner.train, left))
    if waiting := statuses.count(PREEMPTED):
        print(f"{options.study}: {waiting} runs are left, for a call with the time to start them")
    failed = [status for status in statuses if status not in (0, PREEMPTED)]
    sys.exit(failed[0] if failed else max(statuses, default=0))


if __name__ == "__main__":
    main()

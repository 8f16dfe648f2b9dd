"""A process that dies or hangs ends the run, and is named: faults row 14."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from faulty import inject
from ranks import start_ranks, wait

from w2s_train.errors import PEER_LOST, UserError
from w2s_train.running.watch import Beat, Peer, Stage, Watch, identity, judge

PEERS = [Peer(rank, f"n{rank}", 100 + rank, "") for rank in range(3)]
TIMEOUT = 6.0  # seconds


def beats(*positions: tuple[int, Stage, int], idle: float = 100.0) -> list[Beat]:
    return [Beat(9, *position, step=4, idle=idle) for position in positions]


FORWARD, BACKWARD = Stage.IN_THE_FORWARD_PASS, Stage.IN_THE_BACKWARD_PASS
WAITS, BETWEEN = (5, BACKWARD, 0), (4, Stage.BETWEEN_TWO_BATCHES, 2)


def decide(known: list[Beat], silence: tuple[float, ...] = (0, 0, 0)):
    return judge(PEERS, known, list(silence), silent=30, idle=60)


def test_who_gives_no_sign():
    found = decide(beats(WAITS, WAITS, WAITS), (0, 40, 2))
    assert found.ranks == [1] and not found.alive
    assert found.line == "rank 1 (host n1, pid 101): no sign of life for 40 s, last seen at step 4"
    assert decide(beats(WAITS, BETWEEN, WAITS), (0, 0, 40)).ranks == [2]
    # Rank 0 holds the store: without it nothing is heard of anyone.
    assert decide(beats(WAITS, WAITS, WAITS), (40, 40, 40)).ranks == [0]
    assert decide(beats(WAITS, WAITS, WAITS), (0, 20, 2)) is None


def test_who_is_behind():
    found = decide(beats(WAITS, WAITS, BETWEEN))
    assert found.ranks == [2] and found.alive
    assert "stuck for 100 s at step 4, between two batches; the others wait for it" in found.line
    assert decide(beats(WAITS, (5, FORWARD, 0), WAITS)).ranks == [1]
    assert decide(beats((4, Stage.VALIDATING, 7), (4, Stage.VALIDATING, 8), WAITS)).ranks == [0]
    assert decide(beats(BETWEEN, BETWEEN, WAITS)).ranks == [0, 1]
    # It moves, however slowly; all compile or sample; one is done.
    assert decide(beats(WAITS, WAITS, BETWEEN, idle=20.0)) is None
    assert decide(beats(WAITS, WAITS, WAITS)) is None
    assert decide([*beats(WAITS, WAITS), Beat(-1, *BETWEEN)], (0, 0, 99)) is None


def test_identity_is_of_one_process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert identity(os.getpid()) == identity(os.getpid()) != identity(child.pid) != ""
    child.communicate(b"\n")
    assert identity(child.pid) == ""


def test_a_timeout_is_above_zero():
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(UserError, match="timeout_minutes="):
            Watch(wrong)


def run(fault: str, rank: int, launcher: list[str], *options: str) -> tuple[int, str, float]:
    """Status, output, and seconds from the fault until no process has the output open."""
    command = [*launcher, str(ROOT / "tests/faulty.py"), fault, str(rank), "fit"]
    for config in ("configs/digits_w2s.yaml", "tests/tiny.yaml"):
        command += ["-c", config]
    command += ["--trainer.max_steps=1000000", "--trainer.val_check_interval=500000"]
    command += ["--trainer.devices=2", "--trainer.callbacks=null", "--data.num_workers=1"]
    command += [f"--watch.timeout_minutes={TIMEOUT / 60}", *options]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    end = time.time()
    found = re.search(r"FAULT (\d+) ([\d.]+)", done.stdout)
    assert found, done.stdout
    named = f"rank {rank} (host {socket.gethostname()}, pid {found[1]})"
    return done.returncode, done.stdout.replace(named, "WHO"), end - float(found[2])


SILENT = r"error: WHO: no sign of life for \d+ s, last seen at step \d+; rank %d ends"
STUCK = r"error: WHO: stuck for \d+ s at step \d, %s; the others wait for it; rank %s ends"
BAD = "error: WHO failed: ValueError: a bad thing; rank %d ends"
KILLED = -signal.SIGKILL
# What happens to which rank, the status that it ends with, and what the other one says.
RANKS = [
    ("kill", 0, KILLED, SILENT),
    ("stop", 0, KILLED, SILENT),
    pytest.param("stop", 1, KILLED, SILENT, marks=pytest.mark.long),
    ("stuck", 1, PEER_LOST, STUCK % ("in the forward pass", "%d")),
    ("evaluation", 1, KILLED, SILENT),
    ("data", 0, PEER_LOST, STUCK % ("between two batches", "%d")),
    pytest.param("error", 0, 1, BAD, marks=pytest.mark.long),
    ("error", 1, 1, BAD),
    ("user_error", 1, 1, "error: WHO failed: UserError: data.x=1: must be 2; rank %d ends"),
]


@pytest.mark.slow
@pytest.mark.fault("14  a process dies or hangs")
@pytest.mark.parametrize(("fault", "rank", "status", "line"), RANKS)
def test_ranks(command, tmp_path: Path, fault: str, rank: int, status: int, line: str):
    """Two processes of a launcher that does not care how they end."""
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks=null"]
    options += ["--trainer.max_steps=1000000", "--trainer.val_check_interval=500000"]
    options += [f"--watch.timeout_minutes={TIMEOUT / 60}", "--data.num_workers=1"]
    if fault == "evaluation":  # in which the others wait for nobody, for minutes
        options += ["--trainer.val_check_interval=3", "--data.num_generated=60000"]
        options += ["--trainer.callbacks=w2s_train.callbacks.SampleGrid"]
        options += ["--trainer.callbacks.num_images=60000"]  # without it nobody takes them in

    def work(number: int) -> None:
        inject(fault, rank)
        command("fit", *options)

    children = start_ranks(work, 2, tmp_path / "log")
    statuses, end = wait(children), time.time()
    mine, others = (tmp_path / f"log.{r}" for r in (rank, 1 - rank))
    found = re.search(r"FAULT (\d+) ([\d.]+)", mine.read_text())
    assert found, mine.read_text()
    who = f"rank {rank} (host {socket.gethostname()}, pid {children[rank]})"
    output = others.read_text().replace(who, "WHO")
    assert re.search(line % (1 - rank), output), output
    assert statuses[rank] == status and statuses[1 - rank] == PEER_LOST, output
    print(f"{fault} {rank}: {end - float(found[2]):.1f} s")
    assert end - float(found[2]) < TIMEOUT + 20


@pytest.mark.slow
@pytest.mark.fault("14  a process dies or hangs")
@pytest.mark.parametrize(
    ("fault", "status", "line"),
    [
        pytest.param("kill", PEER_LOST, SILENT % 0, marks=pytest.mark.long),
        ("early", 1, "ended with status 1 before the processes met"),
    ],
)
def test_local(digits: None, tmp_path: Path, fault: str, status: int, line: str):
    """Processes that Lightning starts; the shell sees the status of rank 0."""
    folder = f"--trainer.default_root_dir={tmp_path}/run"
    code, output, seconds = run(fault, 1, [sys.executable], folder, "--trainer.strategy=ddp")
    assert re.search(line, output), output
    assert code == status, output
    print(f"{fault}: {seconds:.1f} s")
    assert seconds < TIMEOUT + 20


@pytest.mark.slow
@pytest.mark.fault("14  a process dies or hangs")
@pytest.mark.long
def test_torchrun(digits: None, tmp_path: Path):
    """Its own status is always 1; the processes say the rest."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += [f"--master_port={29500 + os.getpid() % 1000}"]
    folder = f"--trainer.default_root_dir={tmp_path}/run"
    code, output, seconds = run("stop", 1, launcher, folder)
    assert re.search(SILENT % 0, output), output
    assert code == 1
    print(f"torchrun: {seconds:.1f} s")
    assert seconds < TIMEOUT + 20


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault("14  a process dies or hangs")
def test_forked(digits: None, tmp_path: Path):
    """The process that forks reaps the dead one and says so itself."""
    folder = f"--trainer.default_root_dir={tmp_path}/run"
    options = (folder, "--trainer.strategy=ddp_fork")
    code, output, seconds = run("kill", 1, [sys.executable], *options)
    assert "stopped: rank 1 (pid " in output, output
    assert code == PEER_LOST
    assert seconds < TIMEOUT + 20

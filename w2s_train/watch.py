"""Which process of a run died or hangs: every process tells the others each second how far it is.

The store that they tell it to is one of its own: the client of the process group's store may be
waiting in the main thread. Rank 0 holds it, and who cannot reach it knows that rank 0 is gone.
"""

import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed

from w2s_train.errors import PEER_LOST, Stopped, UserError, one_line

BEAT = 1.0  # seconds between two signs of life
LOOK = 5.0  # seconds without one, after a collective has failed, that tell a dead process
GRACE = 30.0  # seconds that a process whose error ends it has for its own clean-up
DOING = (
    "setting up",
    "in the forward pass",
    "in the backward pass",
    "taking the step",
    "between two batches",
    "validating",
    "done with validating",
)
SETUP, FORWARD, BACKWARD, STEP, BETWEEN, VALIDATING, VALIDATED = range(len(DOING))
# Of collectives that failed; errors of other back ends have a type.
MESSAGES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "monitoredBarrier")


class Peer(NamedTuple):
    """A process of the run."""

    rank: int
    host: str
    pid: int
    identity: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


class Beat(NamedTuple):
    """What a process says of itself."""

    number: int = 0  # of this beat; -1 once the process is done
    batch: int = 0  # of training
    stage: int = SETUP
    meetings: int = 0  # collectives since the batch began
    step: int = 0  # of the optimizer
    idle: float = 0.0  # seconds for which its main thread has not moved

    @property
    def position(self) -> tuple[int, int, int]:
        """Comparable between processes: who waits for others has got further than they have."""
        return self.batch, self.stage, self.meetings


class Verdict(NamedTuple):
    """Processes that keep the others from going on."""

    ranks: list[int]
    reason: str


def judge(
    beats: dict[int, Beat], silence: dict[int, float], silent: float, idle: float
) -> Verdict | None:
    """Who died or hangs: whoever gives no sign, else whoever stands still behind the others.

    Processes that all stand at the same place wait for nobody: they compile, or sample.

    Args:
        beats: By rank.
        silence: Seconds since a process's last beat, by rank.
        silent: Seconds without a beat from which on a process counts as dead or stopped.
        idle: Seconds without a move from which on a process behind the others counts as stuck.
    """
    running = {rank: beat for rank, beat in beats.items() if beat.number >= 0}
    quiet = [rank for rank in running if silence[rank] >= silent]
    if quiet:
        ranks = [0] if 0 in quiet else quiet  # without rank 0 nothing is known of the others
        seconds, step = silence[ranks[0]], running[ranks[0]].step
        return Verdict(ranks, f"no sign of life for {seconds:.0f} s, last seen at step {step}")
    places = [beat.position for beat in running.values()]
    if not places or min(places) == max(places):
        return None
    stuck = [r for r, b in running.items() if b.position == min(places) and b.idle >= idle]
    if not stuck:
        return None
    beat = running[stuck[0]]
    where = f"{DOING[beat.stage]}, at step {beat.step}"
    return Verdict(stuck, f"stuck for {beat.idle:.0f} s {where}; the others wait for it")


def identity(pid: int) -> str:
    """Boot, pid namespace, pid and start: what no other process has; "" if there is none."""
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {pid} {start}"
    except OSError:
        return ""


def is_of_peers(error: BaseException) -> bool:
    """Whether a collective failed, as it does on the processes whose peer died."""
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in MESSAGES)
    return known or isinstance(error, torch.distributed.DistError)


class Watch:
    """Ends this process with status 76 when another one keeps it from going on, and says who.

    Two threads: one talks to the store, which may take for ever if rank 0 is stopped; the other
    decides. A process that hangs on this machine is killed, so that the job ends as a whole.

    Args:
        timeout_minutes: For which the main thread may stand still while another one is behind, such
            as one that compiles, saves or scores alone.

    Raises:
        UserError: ``timeout_minutes`` not above 0.
    """

    def __init__(self, timeout_minutes: float = 15.0) -> None:
        if not 0 < timeout_minutes < math.inf:
            raise UserError(f"timeout_minutes={timeout_minutes}: must be above 0")
        self.timeout = 60 * timeout_minutes  # seconds
        self.batch = self.step = self.meetings = self.moves = 0
        self.stage = SETUP
        self.idle = 0.0
        self.running = False
        self.looking = 0.0  # since when the others' beats are read; 0 if they are not
        self.failed: BaseException | None = None  # why a collective of the main thread failed
        self.ending = 0.0  # when an error of this process began to end it
        self.report = ""
        self.fault: dict[str, Any] = {}  # the first report of all processes
        self.seen = 0.0  # since when it is known

    # ---- the main thread -------------------------------------------------------------------

    def start(self, rank: int, host: str, exchange: Callable[[Any], list[Any]]) -> None:
        """Begin, on all processes together.

        Args:
            rank: Of this process.
            host: Where the others reach rank 0.
            exchange: Gives what every process has passed, in the order of ranks.
        """
        wait = timedelta(seconds=60)
        port = 0
        if rank == 0:
            self.store = torch.distributed.TCPStore(
                host, 0, None, True, wait, wait_for_workers=False
            )
            port = self.store.port
        me = Peer(rank, socket.gethostname(), os.getpid(), identity(os.getpid()))
        everyone = exchange([port, *me])
        self.peers, self.rank = [Peer(*about) for _, *about in everyone], rank
        if rank == 0:
            for key in ("fault", *range(len(everyone))):
                self.store.set(str(key), "")
        exchange(None)  # now all keys are there
        if rank > 0:
            self.store = torch.distributed.TCPStore(host, everyone[0][0], None, False, wait)
        self.store.set_timeout(timedelta(days=10000))  # a wait cut short leaves half an answer
        self.beats = {peer.rank: Beat() for peer in self.peers}
        self.heard = dict.fromkeys(self.beats, time.monotonic())
        self.running, self.wake = True, threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._talk, self._decide)]
        for thread in self.threads:
            thread.start()

    def begin(self, batch: int, step: int) -> None:
        """A training batch is there."""
        self.batch, self.step, self.meetings = batch, step, 0
        self.at(FORWARD)

    def at(self, stage: int) -> None:
        """The main thread has come to a stage of its batch."""
        self.stage = stage
        self.moves += 1

    def meet(self) -> None:
        """The main thread enters a collective."""
        self.meetings += 1
        self.moves += 1

    def finish(self) -> None:
        """No one needs this process any more."""
        if self.running and not self.ending:
            self.running = False
            self.wake.set()
            for thread in self.threads:
                thread.join(LOOK)

    def end(self, error: BaseException) -> None:
        """An error ends this process: tell the others, or wait for the end if it is another's."""
        if isinstance(error, Stopped):
            self.finish()
        if not self.running:
            return
        if is_of_peers(error):
            self.failed = error
            self.threads[1].join()  # it ends the process
        self.ending = time.monotonic()
        self._tell(Verdict([self.rank], f"failed: {one_line(error)}"), ending=True)

    # ---- the threads -----------------------------------------------------------------------

    def _talk(self) -> None:
        """Tell and ask, until there is no store any more."""
        count = 0
        while count >= 0:
            count = count + 1 if self.running else -1
            beat = Beat(count, self.batch, self.stage, self.meetings, self.step, self.idle)
            try:
                self.store.set(str(self.rank), json.dumps(beat))
                fault = self.store.compare_set("fault", "", self.report)
                texts = self.store.multi_get(list(map(str, self.beats))) if self.looking else []
            except torch.distributed.DistError:
                return  # rank 0 is gone: its silence tells
            self._hear(json.loads(fault or "{}"), [Beat(*json.loads(t or "[]")) for t in texts])
            self.wake.wait(BEAT)
            self.wake.clear()

    def _hear(self, fault: dict[str, Any], beats: list[Beat]) -> None:
        now = time.monotonic()
        self.heard[0] = now  # rank 0 has answered
        for rank, beat in enumerate(beats):
            if beat.number != self.beats[rank].number:
                self.beats[rank], self.heard[rank] = beat, now
        if fault and not self.fault:
            self.fault, self.seen = fault, now

    def _decide(self) -> None:
        """Look at the others where the main thread does not move."""
        moves, last = -1, time.monotonic()
        while self.running:
            time.sleep(BEAT / 2)
            now = time.monotonic()
            if moves != self.moves or now - last > LOOK:  # it moved, or this process was stopped
                moves, self.idle, self.looking = self.moves, 0.0, 0.0
            self.idle += now - last
            last = now
            if not self.looking and (self.failed or self.idle >= self.timeout / 2):
                self.heard = dict.fromkeys(self.heard, now)
                self.looking = now
            self._act(now)

    def _act(self, now: float) -> None:
        """End this process, if that is due."""
        if self.ending:
            if now - self.ending > GRACE:
                self._leave("its clean-up hangs", 1)
        elif self.fault:
            # The same error may be about to end this process, which then says so itself.
            if self.failed or not self.fault["ending"] or now - self.seen > LOOK:
                self._leave(self.fault["line"], PEER_LOST)
        elif self.failed and now - self.looking > LOOK + 2 * BEAT:
            unknown = Verdict([], f"the connection broke: {one_line(self.failed)}")
            self._tell(self._judge(LOOK) or unknown)
        elif self.idle >= self.timeout and (verdict := self._judge(min(60, self.timeout / 2))):
            self._tell(verdict)

    def _judge(self, silent: float) -> Verdict | None:
        now = time.monotonic()
        silence = {rank: now - then for rank, then in self.heard.items()}
        return judge(self.beats, silence, silent, self.timeout)

    def _tell(self, verdict: Verdict, ending: bool = False) -> None:
        """Report; the first report is everyone's, unless there is no one to report to."""
        who = ", ".join(str(self.peers[rank]) for rank in verdict.ranks)
        fault = {
            "line": f"{who} {verdict.reason}".strip(),
            "ranks": verdict.ranks,
            "ending": ending,
        }
        self.report = json.dumps(fault)
        self.wake.set()
        deadline = time.monotonic() + LOOK
        while not self.fault and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        self.fault = self.fault or fault
        if ending and self.rank == 0:
            time.sleep(3 * BEAT)  # the others read it from this process's store

    def _leave(self, line: str, status: int) -> None:
        """Say why, kill what hangs on this machine, and end without waiting for anything."""
        if self.failed and not self.fault["ranks"]:
            traceback.print_exception(self.failed)
        os.write(2, f"error: {line}; rank {self.rank} ends\n".encode())
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # a full pipe would hang it
        flush.start()
        flush.join(BEAT)
        if not self.fault["ending"]:
            for rank in self.fault["ranks"]:
                peer = self.peers[rank]
                if rank != self.rank and peer.identity and identity(peer.pid) == peer.identity:
                    os.kill(peer.pid, signal.SIGKILL)
        if self.rank == 0:
            time.sleep(3 * BEAT)  # the others read it from this process's store
        os._exit(status)

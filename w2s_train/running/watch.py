"""Which process of a run died or hangs: every process tells the others each second how far it is.

The store that they tell it to is one of its own: the client of the process group's store may be
waiting in the main thread. Rank 0 holds it, and who cannot reach it knows that rank 0 is gone.
"""

import contextlib
import enum
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

from w2s_train.errors import PEER_LOST, Stopped, one_line, require
from w2s_train.signals import REQUESTS

BEAT = 1.0  # seconds between two signs of life
LOOK = 5.0  # seconds without one, after a collective has failed, that tell a dead process
GRACE = 30.0  # seconds that a process whose error ends it has for its own clean-up
# Of collectives that failed; errors of other back ends have a type.
MESSAGES = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "monitoredBarrier")


class Stage(enum.IntEnum):
    """What the main thread does, in the order in which it does it."""

    SETTING_UP = 0
    IN_THE_FORWARD_PASS = 1
    IN_THE_BACKWARD_PASS = 2
    TAKING_THE_STEP = 3
    BETWEEN_TWO_BATCHES = 4
    VALIDATING = 5
    DONE_WITH_VALIDATING = 6


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
    stage: int = Stage.SETTING_UP
    meetings: int = 0  # collectives since the batch began
    step: int = 0  # of the optimizer
    idle: float = 0.0  # seconds for which its main thread has not moved

    @property
    def position(self) -> tuple[int, int, int]:
        """Comparable between processes: who waits for others has got further than they have."""
        return self.batch, self.stage, self.meetings


class Fault(NamedTuple):
    """Why the run cannot go on."""

    line: str  # for the user
    ranks: list[int]  # of processes that hang
    alive: bool  # whether those of the line may still end by themselves


def judge(
    peers: list[Peer], beats: list[Beat], silence: list[float], silent: float, idle: float
) -> Fault | None:
    """Who died or hangs: whoever gives no sign, else whoever stands still behind the others.

    Processes that all stand at the same place wait for nobody: they compile, or sample.

    Args:
        peers: All processes, in the order of ranks.
        beats: The last that is known of each.
        silence: Seconds since then.
        silent: Seconds without a beat from which on a process counts as dead or stopped.
        idle: Seconds without a move from which on a process behind the others counts as stuck.
    """
    running = [rank for rank, beat in enumerate(beats) if beat.number >= 0]
    quiet = [rank for rank in running if silence[rank] >= silent]
    if quiet:
        ranks = [0] if 0 in quiet else quiet  # without rank 0 nothing is known of the others
        first, alive = ranks[0], False
        reason = (
            f"no sign of life for {silence[first]:.0f} s, last seen at step {beats[first].step}"
        )
    else:
        places = [beats[rank].position for rank in running]
        behind = [r for r in running if beats[r].position == min(places) < max(places)]
        ranks, alive = [rank for rank in behind if beats[rank].idle >= idle], True
        if not ranks:
            return None
        beat = beats[ranks[0]]
        where = Stage(beat.stage).name.lower().replace("_", " ")
        reason = f"stuck for {beat.idle:.0f} s at step {beat.step}, {where}; the others wait for it"
    return Fault(f"{', '.join(str(peers[rank]) for rank in ranks)}: {reason}", ranks, alive)


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


def say(line: str) -> None:
    """Print an error, past all buffers; the end must come even where nobody reads any more."""
    with contextlib.suppress(OSError):
        os.write(2, f"error: {line}\n".encode())


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
        require("timeout_minutes", timeout_minutes, "(0, inf)")
        self.timeout = 60 * timeout_minutes  # seconds
        self.silent = min(60, self.timeout / 2)  # without a sign of life
        self.batch = self.step = self.meetings = self.moves = 0
        self.stage = Stage.SETTING_UP
        self.idle = 0.0
        self.running = False
        self.looking = 0.0  # since when the others' beats are read; 0 if they are not
        self.failed: BaseException | None = None  # why a collective of the main thread failed
        self.ending = 0.0  # when an error of this process began to end it
        self.report = ""
        self.fault: Fault | None = None  # the first that any process reported
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
            for key in ("fault", "stop", *range(len(everyone))):
                self.store.set(str(key), "")
        exchange(None)  # now all keys are there
        if rank > 0:
            self.store = torch.distributed.TCPStore(host, everyone[0][0], None, False, wait)
        self.store.set_timeout(timedelta(days=10000))  # a wait cut short leaves half an answer
        self.beats = [Beat() for _ in everyone]
        self.heard = [time.monotonic()] * len(everyone)
        self.running, self.wake, self.done = True, threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._talk, self._decide)]
        for thread in self.threads:
            thread.start()

    def begin(self, batch: int, step: int) -> None:
        """A training batch is there."""
        self.batch, self.step, self.meetings = batch, step, 0
        self.at(Stage.IN_THE_FORWARD_PASS)

    def at(self, stage: Stage) -> None:
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
            self.done.set()
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
        self._tell(Fault(f"{self.peers[self.rank]} failed: {one_line(error)}", [], alive=True))
        if self.rank == 0:
            time.sleep(3 * BEAT)  # the others read it from this process's store

    # ---- the threads -----------------------------------------------------------------------

    def _talk(self) -> None:
        """Tell and ask, until there is no store any more."""
        number, near = 0, [(self.rank + 1) % len(self.peers)]
        while number >= 0:
            number = number + 1 if self.running else -1
            beat = Beat(number, self.batch, self.stage, self.meetings, self.step, self.idle)
            try:
                self.store.set(str(self.rank), json.dumps(beat))
                fault = self.store.compare_set("fault", "", self.report)
                # That one process is to stop is enough. Training agrees on it at each step, but
                # evaluations, which are dealt out unevenly, have no steps in common.
                stop = self.store.compare_set("stop", "", "yes" if REQUESTS.preempted else "")
                asked = range(len(self.peers)) if self.looking else near
                texts = self.store.multi_get([str(rank) for rank in asked])
            except torch.distributed.DistError:
                return  # rank 0 is gone: its silence tells
            REQUESTS.preempted = REQUESTS.preempted or bool(stop)
            now = time.monotonic()
            self.heard[0] = now  # it has answered
            for rank, text in zip(asked, texts, strict=True):
                beat = Beat(*json.loads(text or "[]"))
                if beat.number != self.beats[rank].number:
                    self.beats[rank], self.heard[rank] = beat, now
            if fault and not self.fault:
                self.seen, self.fault = now, Fault(*json.loads(fault))
            self.wake.wait(BEAT)
            self.wake.clear()

    def _decide(self) -> None:
        """Look at the others where the main thread does not move."""
        moves, last = -1, time.monotonic()
        while self.running:
            self.done.wait(BEAT / 2)
            now = time.monotonic()
            if now - last > LOOK:  # this process was stopped, and has heard nobody
                self.heard = [now] * len(self.heard)
            if moves != self.moves or now - last > LOOK:
                moves, self.idle, self.looking = self.moves, 0.0, 0.0
            self.idle += now - last
            last = now
            if not self.looking and (self.failed or self.idle >= self.timeout / 2):
                self.heard = [now] * len(self.heard)
                self.looking = now
            self._act(now)

    def _act(self, now: float) -> None:
        """End this process, if that is due."""
        fault = self.fault
        if self.ending:
            if now - self.ending > GRACE:
                self._leave(Fault("its clean-up hangs", [], alive=True), 1)
        elif fault:
            # Who is stuck ends first; an error that a peer has may be this process's, too.
            named = self.rank in fault.ranks
            if self.failed or named or not fault.alive or now - self.seen > LOOK:
                self._leave(fault, PEER_LOST)
        elif self.failed and now - self.looking > LOOK + 2 * BEAT:
            self._tell(self._judge(LOOK) or self._unknown(self.failed))
        elif self.idle >= self.timeout and (found := self._judge(self.silent)):
            self._tell(found)
        elif not self.looking and (found := self._judge_near()):
            self._tell(found)

    def _judge(self, silent: float) -> Fault | None:
        silence = [time.monotonic() - then for then in self.heard]
        return judge(self.peers, self.beats, silence, silent, self.timeout)

    def _judge_near(self) -> Fault | None:
        """Of a process that waits for nobody, as in an evaluation: rank 0, and the next one."""
        near, now = (0, (self.rank + 1) % len(self.peers)), time.monotonic()
        silence = [now - self.heard[r] if r in near else 0.0 for r in range(len(self.peers))]
        silence[self.rank] = 0.0
        return judge(self.peers, self.beats, silence, self.silent, math.inf)

    def _unknown(self, error: BaseException) -> Fault:
        traceback.print_exception(error)
        return Fault(f"the connection between processes broke: {one_line(error)}", [], alive=False)

    def _tell(self, fault: Fault) -> None:
        """Report; what was reported first is everyone's, unless there is no one to report to."""
        self.report = json.dumps(fault)
        self.wake.set()
        deadline = time.monotonic() + LOOK
        while not self.fault and time.monotonic() < deadline:
            time.sleep(BEAT / 10)
        self.fault = self.fault or fault

    def _leave(self, fault: Fault, status: int) -> None:
        """Say why, kill what hangs on this machine, and end without waiting for anything."""
        say(f"{fault.line}; rank {self.rank} ends")
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # a full pipe would hang it
        flush.start()
        flush.join(BEAT)
        for rank in fault.ranks:
            peer = self.peers[rank]
            if rank != self.rank and peer.identity and identity(peer.pid) == peer.identity:
                os.kill(peer.pid, signal.SIGKILL)
        if self.rank == 0:
            time.sleep(3 * BEAT)  # the others read it from this process's store
        os._exit(status)

"""What the processes of a run know of each other, and which of them keeps the others waiting."""

import enum
import os
from pathlib import Path
from typing import NamedTuple


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

"""Fits in forked processes: imports are spared, and each process has a status of its own."""

import contextlib
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

TIMEOUT = 120.0  # seconds; what takes longer hangs


def free_ports(number: int) -> list[int]:
    """Ports that nothing listens to now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def fork(work: Callable[[], None], log: Path) -> int:
    """Run ``work`` in a child, with its output in ``log``; gives its process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", 1, closefd=False), open(2, "w", 1, closefd=False)
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else 0)
        work()
        status = 0
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            os.write(2, f"{code}\n".encode())
        status = code if isinstance(code, int) else int(code is not None)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def start_ranks(work: Callable[[int], None], number: int, log: Path) -> list[int]:
    """Run ``work(rank)`` in as many processes as ranks, as a launcher outside Lightning would."""
    port = str(free_ports(1)[0])

    def rank(r: int) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        os.environ |= {"LOCAL_RANK": str(r), "RANK": str(r), "WORLD_SIZE": str(number)}
        work(r)

    return [fork(lambda r=r: rank(r), log.with_name(f"{log.name}.{r}")) for r in range(number)]


def wait(children: Sequence[int]) -> list[int]:
    """The statuses of children, negative for a signal; one that hangs is killed, and fails."""
    statuses, deadline = [], time.monotonic() + TIMEOUT
    for child in children:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses.append(os.waitstatus_to_exitcode(status))
                break
            if time.monotonic() > deadline:
                for each in children:
                    os.kill(each, signal.SIGKILL)
                raise AssertionError(f"process {child} hangs")
            time.sleep(0.02)
    return statuses

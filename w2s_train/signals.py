"""Signals that ask a run to stop: a handler notes them, and nothing else happens in it."""

import signal
import threading
import time
from types import FrameType

PREEMPTION = (signal.SIGUSR1, signal.SIGTERM)


class Requests:
    """What this process was asked for by signals, and when it was started."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing was asked for."""
        self.preempted = self.interrupted = False
        self.started = time.monotonic()

    def listen(self, *signals: signal.Signals) -> None:
        """Install the handler; only a main thread may."""
        if threading.current_thread() is threading.main_thread():
            for each in signals:
                signal.signal(each, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self.preempted = True
        elif self.interrupted:
            raise KeyboardInterrupt
        else:
            self.interrupted = True


REQUESTS = Requests()  # of this process: signals come before there is anything else to hold them

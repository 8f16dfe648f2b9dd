"""Errors that are the user's to mend."""

import contextlib
import math
from collections.abc import Iterator
from typing import TypeVar

from w2s_train.secrets import redacted

Number = TypeVar("Number", int, float)


class UserError(ValueError):
    """A value that cannot be used. The command prints its message, one line, without a traceback.

    Messages read ``name=value: what is allowed``, with the name as it stands in the config.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))  # values may be URLs with passwords


def require(name: str, value: Number, interval: str) -> Number:
    """``value`` itself, if it lies in an interval.

    Args:
        name: Of the value, as it stands in the config.
        value: A number.
        interval: Such as "[0, 1)"; a bound "inf" is any finite number.

    Raises:
        UserError: It lies outside, or is no number.
    """
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    inside = low <= value <= high and abs(value) < math.inf
    inside = inside and (value > low or interval[0] == "[")
    if inside and (value < high or interval[-1] == "]"):
        return value
    if high < math.inf:
        raise UserError(f"{name}={value}: must be in {interval}")
    bound = f"{'at least' if interval[0] == '[' else 'above'} {low:g}"
    comma = ", " if interval[0] == "[" else " "
    finite = f"a finite number{comma}" if isinstance(value, float) else ""
    raise UserError(f"{name}={value}: must be {finite}{bound}")


def distinct(name: str, names: list[str]) -> None:
    """Refuse parts of one name; ``name`` is what the config calls all of them.

    Raises:
        UserError: Two of the names are equal.
    """
    if len({*names}) < len(names):
        raise UserError(f"{name}={names}: must have names of their own")


# Exit statuses of the command, beside 0 (finished) and 1 (an error, a user's or ours).
PREEMPTED = 75  # stopped by a signal or by the time limit, with a checkpoint: start it again
PEER_LOST = 76  # another process died or hangs: start it again
DIVERGED = 77  # the numbers went bad: starting it again would not help
NO_PROGRESS = 78  # several starts in a row have come no further: do not start it again
INTERRUPTED = 130  # what a shell reports after Ctrl-C


class Stopped(Exception):
    """The run ends here, on all processes at the same step, with an exit status of its own.

    Args:
        message: One line for the user.
        status: One of the statuses above.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(redacted(message))
        self.status = status


def one_line(error: BaseException) -> str:
    """Its kind and message, or only its kind where it says nothing."""
    message = redacted(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextlib.contextmanager
def needed(library: str, key: str) -> Iterator[None]:
    """Around the import of an optional library: where it fails, it is said who needs it.

    Args:
        library: As it is installed.
        key: ``name=value`` of the setting that needs it.

    Raises:
        UserError: It cannot be imported.
    """
    try:
        yield
    except (ImportError, RuntimeError) as error:  # some wrap errors of what they import
        raise UserError(
            f"{key}: needs {library}, which cannot be imported ({one_line(error)}); "
            f"pip install {library}"
        ) from error

"""``metrics.csv``: every logged number, appended and never deleted; and TensorBoard's events.

Numbers that cannot be written, such as for a full disk, are lost with a warning: they end no run.
"""

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from w2s_train.errors import one_line


@contextlib.contextmanager
def warned(what: str) -> Iterator[None]:
    """What cannot be written is warned about."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{what} not written; training goes on ({one_line(error)})")


class Events(TensorBoardLogger):
    """TensorBoard's, whose writer never works again after an error: the next entry gets another."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        with warned(f"TensorBoard's numbers of step {step} were"), self._dropped():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        with warned("TensorBoard's events were"), self._dropped():
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with warned("TensorBoard's events were"), self._dropped():
            super().finalize(status)

    @contextlib.contextmanager
    def _dropped(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # Lightning takes any error for a wrong value
            self._experiment = None
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error
            raise


class MetricsCSV(Logger):
    """One row per log entry, one column per metric, first column ``step``.

    Lightning's own ``CSVLogger`` starts the file anew when a run resumes into its folder.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row; a metric not seen before adds a column."""
        row = {"step": step, **metrics}
        known = self._columns()
        columns = known + [name for name in row if name not in known]
        line = io.StringIO()
        csv.DictWriter(line, columns).writerow(row)
        with warned(f"{self.path}: step {step} was"):
            if columns != known:
                self._rewrite(columns)
            self._append(line.getvalue().encode())

    def _append(self, line: bytes) -> None:
        """A whole line or none."""
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                written = file.write(line)
                if written < len(line):
                    file.write(line[written:])  # of a full disk: fails, and says why
            except OSError:
                file.truncate(size)
                raise

    def _columns(self) -> list[str]:
        if not self.path.is_file():
            return []
        with open(self.path, newline="") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, columns: list[str]) -> None:
        rows = []
        if self.path.is_file():
            with open(self.path, newline="") as file:
                rows = list(csv.DictReader(file))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(self.path)

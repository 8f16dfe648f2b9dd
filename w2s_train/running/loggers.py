"""``metrics.csv``: every logged number, appended and never deleted; TensorBoard's events; and what
a config's own loggers need to write into the run folder, and to go on with a run.

Numbers that cannot be written, such as for a full disk, are lost with a warning: they end no run.
"""

import contextlib
import copy
import csv
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from w2s_train.errors import UserError, one_line
from w2s_train.imports import found

# What constructors of loggers call the folder into which they write, and the run that they write.
FOLDERS = ("save_dir", "root_dir")
IDS = ("id", "run_id", "experiment_key", "version")


def placed(config: Any, folder: Path, before: dict[str, list[Any]]) -> Any:
    """``trainer.logger`` of a config, so that it writes into the run folder and goes on with a run.

    A folder "." or null is the run folder, whatever the default is; what else the config says
    stays. A store of many runs, as MLflow's, stays where it is by default; and Lightning's
    `CSVLogger`, which deletes what it finds where it goes on, begins another version.

    Args:
        config: One logger or several as they were parsed, or a bool.
        folder: Of the run.
        before: See `run_ids`; an id is taken out when it is given to a logger.

    Raises:
        UserError: A logger is to copy checkpoints, which stay in the run folder.
    """
    if isinstance(config, list | tuple):
        return [placed(each, folder, before) for each in config]
    if not hasattr(config, "class_path"):
        return config
    config, kind = copy.deepcopy(config), found(config.class_path)
    arguments = config.get("init_args") or {}
    if arguments.get("log_model"):
        raise UserError(
            f"log_model={arguments['log_model']}: must be false; no logger gets weights"
        )
    for name in FOLDERS:
        if name in arguments and str(arguments[name]) in (".", "None"):
            arguments[name] = str(folder)
    names = [name for name in IDS if name in arguments]
    ids = before.get(kind.__name__, []) if not issubclass(kind, CSVLogger) else []
    if names and ids and all(arguments[name] is None for name in names):
        arguments[names[0]] = ids.pop(0)
    if "resume" in arguments and arguments["resume"] is None:
        arguments["resume"] = "allow"  # as Lightning's for W&B does, where no parser gives it null
    return config


def run_ids(loggers: Sequence[Logger]) -> dict[str, list[Any]]:
    """Which run each logger writes, by the name of its class; starts it where it has not begun.

    Raises:
        UserError: It cannot be started.
    """
    ids: dict[str, list[Any]] = {}
    for logger in loggers:
        name = type(logger).__name__
        try:
            getattr(logger, "experiment", None)
            version = logger.version
        except Exception as error:  # of any service
            raise UserError(f"trainer.logger={name}: cannot start ({one_line(error)})") from error
        if version not in (None, ""):
            ids.setdefault(name, []).append(version if isinstance(version, int) else str(version))
    return ids


def unbroken(logger: Logger) -> Logger:
    """The logger, whose errors end no run from now on: the first of each method is warned about."""
    for name in ("log_metrics", "save", "finalize"):
        setattr(logger, name, _unbroken(getattr(logger, name), f"{type(logger).__name__}.{name}"))
    return logger


def _unbroken(method: Callable[..., None], name: str) -> Callable[..., None]:
    failed = False

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> None:
        nonlocal failed
        try:
            method(*args, **options)
        except Exception as error:  # of any service
            if not failed:
                rank_zero_warn(f"{name}: failed; the run goes on ({one_line(error)})")
            failed = True

    return call


def log_config(loggers: Sequence[Logger], config: dict[str, Any]) -> None:
    """Give the config to each logger; one that does not take it is warned about."""
    for logger in loggers:
        try:
            logger.log_hyperparams(config)
        except Exception as error:  # such as MLflow's, for a value that is another after a resume
            rank_zero_warn(f"{type(logger).__name__}: no config was logged ({one_line(error)})")


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
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config as a text, which needs no score beside it."""
        lines = yaml.safe_dump(params, sort_keys=False).splitlines()
        with warned("TensorBoard's config was"), self._dropped():
            self.experiment.add_text("config", "\n".join(f"    {line}" for line in lines))

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

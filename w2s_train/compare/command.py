"""The command line of ``lightning compare``."""

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console

from w2s_train.compare.comparison import Comparison, Options, compare
from w2s_train.compare.report import files, terminal
from w2s_train.compare.runs import read_all
from w2s_train.errors import UserError

HELP = """\
usage: lightning compare RUN [RUN ...] [options]

Compares run folders: seeds of one config form an arm, arms are judged against a baseline at equal
steps and at equal training time. Prints a table and writes comparison.md, .json and .html.

  RUN                   a run folder, or a quoted glob of some

options:
  --metric NAME         the score; by default the FID or Fréchet distance that most runs have
  --weights NAME        of the scored network; by default ema
  --guidance TEXT       while sampling; by default none
  --settings            every guidance that a run was scored with is an arm
  --baseline NAME       an arm; by default the one whose objective has no segments
  --unfinished          take runs that have not reached their last step
  --output DIR          where the files go; by default comparison
  -h, --help            this text

try:  lightning compare runs/digits_baseline runs/digits_w2s
"""
OPTIONS = ("metric", "weights", "guidance", "settings", "baseline", "unfinished", "output")


def run(args: list[str]) -> None:
    """Compare; a user's error ends it with one line and status 1, after those of single runs."""
    if "-h" in args or "--help" in args:
        print(HELP, end="")
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of folders need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        parsed = _parse(args)
        findings = read_all(parsed.runs, unfinished=parsed.unfinished)
        choice = {key: getattr(parsed, key) for key in OPTIONS[:5]}
        options = Options(**choice)
        comparison = compare(findings, options)
        write(comparison, Path(parsed.output))
    except UserError as error:
        *lines, last = str(error).splitlines()
        for line in lines:
            print(f"left out: {line}", file=sys.stderr)
        sys.exit(f"error: {last}")
    show(comparison, Path(parsed.output))


def _parse(args: list[str]) -> argparse.Namespace:
    """Raises UserError for what is not an option, or has no or a wrong value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--metric")
    parser.add_argument("--weights", default="ema")
    parser.add_argument("--guidance")
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--baseline")
    parser.add_argument("--unfinished", action="store_true")
    parser.add_argument("--output", default="comparison")
    try:
        parsed, unknown = parser.parse_known_intermixed_args(args)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if unknown:
        names = ", ".join(f"--{name}" for name in OPTIONS)
        raise UserError(f"option={unknown[0]}: must be one of {names}")
    if not parsed.runs:
        raise UserError("run=null: must be at least one run folder, or a glob of some")
    if parsed.settings and parsed.guidance is not None:
        raise UserError(
            f"guidance={parsed.guidance}: must be left out with --settings, which takes all"
        )
    return parsed


def write(comparison: Comparison, folder: Path) -> None:
    """Write the three files."""
    # Late: it brings matplotlib, for which neither help nor an error need wait.
    from w2s_train.compare.page import page

    made = {**files(comparison), "comparison.html": page(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            # Names of folders need not be UTF-8.
            (folder / name).write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"output={folder}: must be a folder to write to; {error}") from error


def show(comparison: Comparison, folder: Path) -> None:
    """Print the table, what is left out, and where the files are."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(*terminal(comparison), sep="\n")
    for title, lines in (("left out", comparison.refused), ("note", comparison.notes)):
        for line in lines:
            print(f"{title}: {line}")
    print(f"written: {folder / 'comparison.html'}, comparison.md and comparison.json")

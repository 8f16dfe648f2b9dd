"""The command line of ``lightning compare``."""

import argparse
import io
import math
import sys
from pathlib import Path

from rich.console import Console

from w2s_train.compare import images_report, report
from w2s_train.compare.comparison import Comparison, Options, compare
from w2s_train.compare.image_comparison import ImageComparison, compare_images
from w2s_train.compare.images import are_images, read_folders
from w2s_train.compare.runs import read_all
from w2s_train.errors import UserError

HELP = """\
usage: lightning compare RUN [RUN ...] [options]

Compares run folders: seeds of one config form an arm, arms are judged against a baseline at equal
steps and at equal training time. Prints a table and writes comparison.md, .json and .html.
Folders of lightning imagine are arms, paired by prompt and seed, against a sweep of CFG's scales.

  RUN                   a run folder or a folder of images, or a quoted glob of some

options:
  --metric NAME         the score; by default the FID or Fréchet distance that most runs have
  --weights NAME        of the scored network; by default ema; of runs, as the next two
  --guidance TEXT       while sampling; by default none
  --settings            every guidance that a run was scored with is an arm
  --reach SCORE,...     when each arm was as good as this: by default the worst last score of a
                        run of the baseline; of runs
  --baseline NAME       an arm; by default the one whose objective has no segments; of images the
                        best scale of classifier-free guidance
  --unfinished          take runs that have not reached their last step
  --output DIR          where the files go; by default comparison
  -h, --help            this text

try:  lightning compare runs/digits_baseline runs/digits_w2s
      lightning compare images/segmented 'images/cfg_*'
"""
OPTIONS = ("metric", "weights", "guidance", "settings", "baseline", "reach", "unfinished", "output")
OF_RUNS = ("weights", "guidance", "settings", "reach", "unfinished")  # what images do not have


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
        comparison = _of_images(parsed) if are_images(parsed.runs) else _of_runs(parsed)
        write(comparison, Path(parsed.output))
    except UserError as error:
        *lines, last = str(error).splitlines()
        for line in lines:
            print(f"left out: {line}", file=sys.stderr)
        sys.exit(f"error: {last}")
    show(comparison, Path(parsed.output))


def _of_runs(parsed: argparse.Namespace) -> Comparison:
    chosen = {key: getattr(parsed, key) for key in OPTIONS[:6]}
    given = {key: value for key, value in chosen.items() if value is not None}
    if "reach" in given:
        given["reach"] = _scores(given["reach"])
    return compare(read_all(parsed.runs, unfinished=parsed.unfinished), Options(**given))


def _scores(text: str) -> tuple[float, ...]:
    """Numbers between commas; UserError: one is none."""
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise UserError(f"reach={text}: must be one score, or several with commas between them")
    return found


def _of_images(parsed: argparse.Namespace) -> ImageComparison:
    for key in OF_RUNS:
        if (value := getattr(parsed, key)) not in (None, False):
            raise UserError(f"{key}={value}: must be left out for folders of images; it is of runs")
    return compare_images(read_folders(parsed.runs), parsed.metric, parsed.baseline)


def _parse(args: list[str]) -> argparse.Namespace:
    """Raises UserError for what is not an option, or has no or a wrong value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--metric")
    parser.add_argument("--weights")
    parser.add_argument("--guidance")
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--baseline")
    parser.add_argument("--reach")
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
    if parsed.settings and parsed.reach is not None:
        raise UserError(f"reach={parsed.reach}: must be left out with --settings")
    return parsed


def write(comparison: Comparison | ImageComparison, folder: Path) -> None:
    """Write the three files."""
    # Late: they bring matplotlib, for which neither help nor an error need wait.
    from w2s_train.compare.images_page import images_page
    from w2s_train.compare.page import page

    if isinstance(comparison, ImageComparison):
        made = {**images_report.files(comparison), "comparison.html": images_page(comparison)}
    else:
        made = {**report.files(comparison), "comparison.html": page(comparison)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in made.items():
            # Names of folders need not be UTF-8.
            (folder / name).write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise UserError(f"output={folder}: must be a folder to write to; {error}") from error


def show(comparison: Comparison | ImageComparison, folder: Path) -> None:
    """Print the table, what is left out, and where the files are."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    if isinstance(comparison, ImageComparison):
        tables = images_report.terminal(comparison)
    else:
        tables = report.terminal(comparison)
    console.print(*tables, sep="\n")
    for title, lines in (("left out", comparison.refused), ("note", comparison.notes)):
        for line in lines:
            print(f"{title}: {line}")
    print(f"written: {folder / 'comparison.html'}, comparison.md and comparison.json")

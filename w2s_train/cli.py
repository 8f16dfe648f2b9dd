"""Entry point of the ``lightning`` command: answers at once, imports heavy things late."""

import argparse
import ctypes
import os
import sys
import tempfile
from pathlib import Path

from w2s_train import __version__
from w2s_train.errors import UserError
from w2s_train.signals import PREEMPTION, REQUESTS

HELP = f"""\
usage: lightning COMMAND -c CONFIG [-c OVERLAY ...] [--KEY VALUE ...]

w2s_train {__version__}: diffusion transformers with weak-to-strong targets.

commands:
  fit         train, and score unguided samples on the way
  validate    score a checkpoint:  lightning validate -c CONFIG --ckpt_path FILE
  test        the same, for a last number
  predict     write generated images to the run folder
  sample      write images of a checkpoint: seeds, classes, and a folder, grid, .npz or shards
  tune        find the best guidance at sampling:  lightning tune RUN --guidance cfg
  ema         score averages made after training:  lightning ema RUN --std 0.03:0.25
  reference   write the statistics of a data set that scores compare with
  imagine     images of a text-to-image model, guided without training: docs/imagine.md
  export      write weights for programs without Lightning, or for diffusers
  compare     judge runs against a baseline:  lightning compare RUN [RUN ...]

options:
  -c FILE               a YAML config; later ones override earlier ones, KEY VALUE overrides all;
                        but for fit, the checkpoint's run has one
  --KEY.0.KEY VALUE     a key inside a list, by index or by a segment's name, such as
                        --model.objective.segments.0.scale 0.4
  --allow_imports NAMES let configs name classes of more packages, such as my_package,other
  --ckpt_path last      go on with the run in the run folder, or start it
  --scale NAME=W:LOW-HIGH of sample, validate, test and predict: guide by W while LOW <= t < HIGH
                        (without :LOW-HIGH at every t), of a run with configs/weak/drawn.yaml
  --profile             of fit: write a trace of five steps and the ten heaviest operations
  --print_config        show the whole config, defaults included, and stop
  -h, --help            this text; `lightning COMMAND --help` lists every key
  --version             the version

try:  lightning fit -c configs/digits_w2s.yaml
"""
EXPORT_HELP = """\
usage: lightning export --ckpt_path CHECKPOINT --output FOLDER [options]

Writes the weights of a checkpoint as FOLDER/model.safetensors with FOLDER/config.json, for programs
without Lightning, or as a pipeline of diffusers.

  --ckpt_path PATH      a checkpoint, or a run folder, of which the last one is taken
  --output FOLDER       must not exist yet
  --weights NAME        ema, the running average (by default), or raw, the live weights
  --format NAME         safetensors (by default) or diffusers
  --allow_imports NAMES let the checkpoint name a network of more packages, such as my_package
  -h, --help            this text

try:  lightning export --ckpt_path runs/digits_w2s --output exported
"""
EXPORT_CHOICES = {"weights": ("ema", "raw"), "format": ("safetensors", "diffusers")}
COMMANDS = "fit validate test predict sample tune ema reference imagine export compare".split()


def main(args: list[str] | None = None) -> None:
    """Run one command; exits with a non-zero status and one line on a user's error."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP, end="")
    elif args[0] == "--version":
        print(__version__)
    elif args[0] not in COMMANDS:
        sys.exit(f"error: command={args[0]}: must be one of {', '.join(COMMANDS)}")
    elif args[0] == "compare":
        from w2s_train.compare.command import run as compare

        compare(args[1:])
    elif args[0] == "export":
        _export(args[1:])
    elif args[0] == "imagine":
        _imagine(args[1:])
    else:
        _run(args)


def _run(args: list[str]) -> None:
    if args[0] in ("fit", "validate", "test", "tune", "ema"):
        _listen()
    from w2s_train.command.config import check_arguments, tuning, with_own_config
    from w2s_train.command.scales import with_scales

    try:
        check_arguments(args[1:])
        args = with_own_config(with_scales(tuning(args) if args[0] in ("tune", "ema") else args))
        _check_temporary()
    except UserError as error:
        sys.exit(f"error: {error}")
    # Read once, when torch loads: threads that wait must sleep. Spinning threads made a small
    # network 50 times slower on a machine whose cores were shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    from w2s_train.command.run import run

    run(None if args == sys.argv[1:] else args)


def _listen() -> None:
    """From now on, and not only when everything is loaded: jobs are preempted at any time."""
    REQUESTS.reset()
    REQUESTS.listen(*PREEMPTION)


def _imagine(args: list[str]) -> None:
    _listen()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_freed_memory()
    from w2s_train.command.imagine import run as imagine

    imagine(args)


def _check_temporary() -> None:
    """Refuse a machine without a folder for temporary files, which libraries need when imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        named = os.environ.get("TMPDIR")
        raise UserError(
            f"TMPDIR={named}: must be a folder that can be written ({error.strerror})"
        ) from error


def keep_freed_memory() -> bool:
    """Keep what is freed for the next step; whether the C library can.

    glibc gives large blocks back to the system, and faults them in again, page by page, when the
    same step allocates them anew: on a CPU, thousands of page faults per step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Parameters of mallopt(3), of which glibc alone has these.
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    wanted = {trim_threshold: 2**31 - 1, top_pad: 2**28, mmap_threshold: 2**30}
    return all([mallopt(name, value) for name, value in wanted.items()])


def _export(args: list[str]) -> None:
    if "-h" in args or "--help" in args:
        print(EXPORT_HELP, end="")
        return
    try:
        given = _parse_export(args)
        from w2s_train.command.export import export
        from w2s_train.loading import restrict_imports

        restrict_imports([f"--allow_imports={each}" for each in given.allow_imports])
        export(given.ckpt_path, Path(given.output), given.weights, given.format)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"written: {given.output}")


def _parse_export(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--output")
    parser.add_argument("--allow_imports", action="append", default=[])
    for name, values in EXPORT_CHOICES.items():
        parser.add_argument(f"--{name}", default=values[0])
    try:
        given, unknown = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if unknown:
        options = ", ".join(f"--{name}" for name in vars(given))
        raise UserError(f"option={unknown[0]}: must be one of {options}")
    for name, value in vars(given).items():
        if value in (None, ""):
            raise UserError(f"{name}=null: must be given")
        if value not in EXPORT_CHOICES.get(name, [value]):
            raise UserError(f"{name}={value}: must be {' or '.join(EXPORT_CHOICES[name])}")
    return given

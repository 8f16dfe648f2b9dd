"""The command line of ``lightning export``."""

import argparse
import sys
from pathlib import Path

from w2s_train.errors import UserError

HELP = """\
usage: lightning export --ckpt_path CHECKPOINT --output FOLDER [options]

Writes the weights of a checkpoint as FOLDER/model.safetensors with FOLDER/config.json, for programs
without Lightning, or as a DiTTransformer2DModel of diffusers.

  --ckpt_path PATH      a checkpoint, or a run folder, of which the last one is taken
  --output FOLDER       must not exist yet
  --weights NAME        ema, the running average (by default), or raw, the live weights
  --format NAME         safetensors (by default) or diffusers
  -h, --help            this text

try:  lightning export --ckpt_path runs/digits_w2s --output exported
"""
CHOICES = {"weights": ("ema", "raw"), "format": ("safetensors", "diffusers")}


def run(args: list[str]) -> None:
    """Export; a user's error ends it with one line and status 1."""
    if "-h" in args or "--help" in args:
        print(HELP, end="")
        return
    try:
        parsed = _parse(args)
        from w2s_train.export.folder import export  # takes seconds, and the help none

        export(parsed.ckpt_path, Path(parsed.output), parsed.weights, parsed.format)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"written: {parsed.output}")


def _parse(args: list[str]) -> argparse.Namespace:
    """Raises UserError for what is not an option, or has no or a wrong value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("--output")
    for name, values in CHOICES.items():
        parser.add_argument(f"--{name}", default=values[0])
    try:
        parsed, unknown = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    if unknown:
        raise UserError(
            f"option={unknown[0]}: must be one of --ckpt_path, --output, --weights, --format"
        )
    for name in ("ckpt_path", "output"):
        if not getattr(parsed, name):
            raise UserError(f"{name}=null: must be given")
    for name, values in CHOICES.items():
        if getattr(parsed, name) not in values:
            raise UserError(f"{name}={getattr(parsed, name)}: must be {' or '.join(values)}")
    return parsed

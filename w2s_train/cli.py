"""Entry point of the ``lightning`` command: answers at once, imports heavy things late."""

import os
import sys

from w2s_train import __version__
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
  reference   write the statistics of a data set that scores compare with
  export      write weights for programs without Lightning, or for diffusers
  compare     judge runs against a baseline:  lightning compare RUN [RUN ...]

options:
  -c FILE               a YAML config; later ones override earlier ones, KEY VALUE overrides all
  --allow_imports NAMES let configs name classes of more packages, such as my_package,other
  --ckpt_path last      go on with the run in the run folder, or start it
  --profile             of fit: write a trace of five steps and the ten heaviest operations
  --print_config        show the whole config, defaults included, and stop
  -h, --help            this text; `lightning COMMAND --help` lists every key
  --version             the version

try:  lightning fit -c configs/digits_w2s.yaml
"""
COMMANDS = ("fit", "validate", "test", "predict", "sample", "reference", "export", "compare")


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
        from w2s_train.command.export import run as export

        export(args[1:])
    else:
        # Read once, when torch loads: threads that wait must sleep. Spinning threads made a small
        # network 50 times slower on a machine whose cores were shared.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if args[0] in ("fit", "validate", "test"):
            # From now on, and not only when everything is loaded: jobs are preempted at any time.
            REQUESTS.reset()
            REQUESTS.listen(*PREEMPTION)
        from w2s_train.command.run import run

        run(None if args == sys.argv[1:] else args)

"""``lightning imagine``: images of a text-to-image model, one per prompt and seed."""

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_loader

from w2s_train.command.config import check_arguments, check_numbers, explain, locate, read_strictly
from w2s_train.errors import INTERRUPTED, Stopped, UserError, needed, one_line
from w2s_train.files import OF_THE_DISK
from w2s_train.loading import check_functions, restrict_imports
from w2s_train.secrets import redacted, show_no_secrets

KEYS = """
    model prompts guidance seeds output steps height width max_sequence_length negative_prompt dtype
    device offload scores distances config print_config help allow_imports
""".split()


def run(args: list[str]) -> None:
    """Run the command; a user's error ends it with one line and status 1.

    Args:
        args: Its options.
    """
    sys.excepthook = show_no_secrets
    try:
        _imagine(args)
    except argparse.ArgumentError as error:
        sys.exit(f"error: {redacted(explain(str(error), {}, KEYS))}")
    except UserError as error:
        sys.exit(f"error: {redacted(str(error))}")
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        sys.exit(f"error: {one_line(error)}")
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _imagine(args: list[str]) -> None:
    check_arguments(args, KEYS)
    with needed("'w2s_train[text2image]'", "command=imagine"):
        from w2s_train.text2image.imagine import Imagine
        from w2s_train.text2image.painter import quiet_libraries
    args = restrict_imports(args)
    quiet_libraries()
    warnings.formatwarning = lambda text, kind, *_, **__: f"{kind.__name__}: {text}\n"
    set_loader("strict", read_strictly, exceptions=(yaml.YAMLError,))
    parser = _parser(Imagine)
    config = parser.parse_args(args)
    check_numbers(config)
    _check_nulls(config, Imagine.__init__)
    check_functions(config)
    names = [key for key in KEYS if key in config and key != "config"]
    try:
        made = parser.instantiate_classes(config)
        imagine = Imagine(**{key: made[key] for key in names})
    except ValueError as error:
        line = locate(str(error), config)
        named = re.match(r"[\w.[\]]+=", line)  # diffusers' guiders name no key
        raise UserError(line if named else f"guidance: {line}") from error
    imagine(*_place())


def _check_nulls(config: Any, function: Callable[..., None]) -> None:
    """The parser takes null for any key: without a negative prompt, say, nothing is guided."""
    for key, kind in get_type_hints(function).items():
        if key in config and config[key] is None and type(None) not in get_args(kind):
            raise UserError(f"{key}=null: must be given; see lightning imagine --help")


def _parser(cls: type) -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning imagine",
        description="Images of a text-to-image model, one per prompt and seed.",
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="strict",
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML config; later ones win")
    parser.add_class_arguments(cls)
    return parser


def _place() -> Sequence[int]:
    """Rank, number of processes, and rank on this machine, as the launcher says."""
    from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment

    from w2s_train.command.processes import cluster_environments

    given: list[Any] = [TorchElasticEnvironment()] if TorchElasticEnvironment.detect() else []
    (place,) = given or cluster_environments() or [LightningEnvironment()]
    return place.global_rank(), place.world_size(), place.local_rank()

"""Bad options and malicious files, given to the whole command, whose parsers are built once."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from lightning.pytorch.cli import LightningCLI

from w2s_train.cli import main
from w2s_train.command.run import Command, compose

MINIMAL = ROOT / "tests" / "minimal.yaml"


PARSERS = dict[str, dict[str, Any]]()  # by the name of the command; no option changes them


def setup_once(command: Any, *args: Any) -> None:
    """In place of `Command.setup_parser`."""
    name = command.given[0]
    if name not in PARSERS:
        LightningCLI.setup_parser(command, *args)
        keys = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
        PARSERS[name] = {key: getattr(command, key) for key in keys}
    vars(command).update(PARSERS[name])


def refusal(folder: Path, *options: str, name: str = "fit") -> str:
    """The one line with which the command refuses options.

    Args:
        folder: Of the run.
        options: Beside tests/minimal.yaml.
        name: Of the command.
    """
    with parsers_built_once(), contextlib.chdir(ROOT), pytest.raises(SystemExit) as stop:
        main([name, "-c", str(MINIMAL), f"--trainer.default_root_dir={folder}", *options])
    message = str(stop.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


@contextlib.contextmanager
def parsers_built_once() -> Iterator[None]:
    """For commands that are there for what they leave behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Command, "setup_parser", setup_once)
        yield


def parsed(*options: str) -> Any:
    """What ``lightning fit`` makes of options, before anything is built of it."""
    with parsers_built_once(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Command, "instantiate_classes", lambda self: None)
        return compose(["fit", *options], run=False).config["fit"]

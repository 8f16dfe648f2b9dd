"""What configs and checkpoints may name: classes of this project, and what trainers are made of.

A class path is an order to import and to call. Of everything that is installed, few things are safe
to call with arguments of a stranger's choice; those stand here. The switch ``--allow_imports`` adds
packages, on the command line and nowhere else: a config cannot allow itself anything.
"""

from typing import Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from w2s_train.errors import UserError

SWITCH = "--allow_imports"
OURS = """
    autoencoder callbacks features guidance interpolant metrics models objective sampler schedule
    segment timesteps weak
"""
TRAINERS = "accelerators callbacks loggers plugins profilers strategies cli.ReduceLROnPlateau"
ALLOWED = [
    *(f"w2s_train.{name}" for name in OURS.split()),
    *(f"lightning.pytorch.{name}" for name in TRAINERS.split()),
    "lightning.fabric.plugins",  # where environments and the writing of checkpoints are defined
    "torch.optim",
]
Module = TypeVar("Module")


def restrict_imports(args: list[str]) -> list[str]:
    """Let the parser import what is listed here, and what the switch in ``args`` adds.

    Returns:
        The arguments without the switch, of which the parser knows nothing.

    Raises:
        UserError: The switch names no package.
    """
    rest, more = list[str](), list[str]()
    given = iter(args)
    for arg in given:
        name, equals, value = arg.partition("=")
        if name == SWITCH:
            more += (value if equals else next(given, "")).split(",")
        else:
            rest.append(arg)
    for package in more:
        parts = package.split(".")
        if parts[0] == "jsonargparse" or not all(part.isidentifier() for part in parts):
            raise UserError(
                f"{SWITCH[2:]}={','.join(more)}: must name packages, such as my_package,other.part"
            )
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=ALLOWED + more,
        instantiate_subclass_spec_in_any=False,
    )
    return rest


def instantiate(cls: type[Module], settings: dict[str, Any]) -> Module:
    """The class with its constructor's arguments as a config spells them.

    Raises:
        UserError: They do not fit, or name what may not be imported.
    """
    restrict_imports([])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "module", fail_untyped=False)
    return parser.instantiate_classes(parser.parse_object({"module": settings})).module

"""``--scale NAME=W`` and ``--scale NAME=W:LOW-HIGH``: guidance that is an input of the network."""

import json
import re

from w2s_train.command.config import SCORING, guided_config
from w2s_train.errors import UserError

NUMBER = r"(\d*\.?\d+)"
CHOICE = re.compile(rf"([A-Za-z][\w-]*)={NUMBER}(?::{NUMBER}-{NUMBER})?", re.ASCII)


def with_scales(args: list[str]) -> list[str]:
    """The arguments with these options, however many, as one ``--model.guidance`` at the end.

    A whole number is the other option of that name, which ``sample`` has for the pixels of a grid.

    Args:
        args: The command line; the command first.

    Raises:
        UserError: Text that is no choice, or a name that stands twice.
    """
    command, *given = args
    if command not in SCORING:
        return args
    kept, scales, words = [command], dict[str, dict[str, float]](), iter(given)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--scale":
            kept.append(word)
            continue
        value = value if equals else next(words, "")
        if value.startswith("--"):
            raise UserError("scale: must have a value, such as head=0.6:0.2-1")
        if command == "sample" and re.fullmatch(r"-?\d+", value):
            kept.append(f"--scale={value}")
        elif not (choice := CHOICE.fullmatch(value)):
            raise UserError(
                f"scale={value}: must be NAME=SCALE or NAME=SCALE:LOW-HIGH, in plain decimals from "
                "0 on, such as head=0.6:0.2-1"
            )
        elif choice[1] in scales:
            raise UserError(f"scale={value}: {choice[1]} stands twice, must stand once")
        else:
            # All three: the parser would fill in those of a config before.
            numbers = dict(scale=choice[2], low=choice[3] or 0, high=choice[4] or 1)
            scales[choice[1]] = {key: float(number) for key, number in numbers.items()}
            if not 0 <= scales[choice[1]]["low"] < scales[choice[1]]["high"] <= 1:
                raise UserError(f"scale={value}: must have 0 <= LOW < HIGH <= 1")
    if not scales:
        return args
    if other := next((word for word in kept if word.startswith("--model.guidance")), None):
        key = other.partition("=")[0]
        raise UserError(f"{key}: must be left out with --scale, which is another guidance")
    if other := guided_config(kept):
        raise UserError(f"config={other}: must be without model.guidance, which --scale states")
    inbuilt = {"class_path": "w2s_train.guidance.Inbuilt", "init_args": {"scales": scales}}
    return [*kept, f"--model.guidance={json.dumps(inbuilt)}"]

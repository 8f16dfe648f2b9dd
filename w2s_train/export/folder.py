"""A network of a checkpoint as a folder: weights, and what has to be known to use them."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from w2s_train.checkpointing import check_local, damage, newest_first
from w2s_train.errors import UserError
from w2s_train.export.diffusers import write_diffusers
from w2s_train.models import DiT
from w2s_train.models.saved import read_checkpoint, saved_network
from w2s_train.secrets import redacted

CONVENTION = "x_t = alpha(t) x + sigma(t) noise; t = 0 is data, t = 1 is noise; v = d x_t / d t"


def export(
    ckpt_path: str,
    output: Path,
    weights: Literal["ema", "raw"] = "ema",
    format: Literal["safetensors", "diffusers"] = "safetensors",
) -> None:
    """Write the folder, whole or not at all.

    Args:
        ckpt_path: A checkpoint of ours, or the folder of a run: its last one.
        output: Must not exist.
        weights: The running average ("ema") or the live weights ("raw").
        format: ``model.safetensors`` for `DiT`, or a folder for diffusers.

    Raises:
        UserError: No checkpoint of ours, an output that is there, or a network without a
            counterpart in diffusers.
    """
    check_local(ckpt_path, "ckpt_path")
    path = Path(ckpt_path)
    path = _newest(path / "checkpoints") if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"ckpt_path={ckpt_path}: must be a checkpoint, or a run folder with one")
    if output.exists():
        raise UserError(f"output={output}: must not exist yet")
    network = saved_network(str(path), weights).eval()
    about = describe(read_checkpoint(str(path)), network, weights)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        if format == "diffusers":
            write_diffusers(network, partial)
            (partial / "w2s_train.json").write_text(json.dumps(about, indent=1) + "\n")
        else:
            state = {name: value.contiguous() for name, value in network.state_dict().items()}
            save_file(state, partial / "model.safetensors")
            (partial / "config.json").write_text(json.dumps(about, indent=1) + "\n")
        os.replace(partial, output)
    except OSError as error:
        raise UserError(f"output={output}: must be a folder to write to ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _newest(folder: Path) -> Path:
    """The newest checkpoint of a run that is whole; a warning names those that are not."""
    problems = list[str]()
    for path in newest_first(folder):
        if not (problem := damage(path)):
            if problems:
                print(f"{'; '.join(problems)}; an earlier one is used: {path}", file=sys.stderr)
            return path
        problems.append(f"{path}: {problem}")
    if problems:
        raise UserError(f"ckpt_path={folder.parent}: none is whole; {'; '.join(problems)}")
    return folder / "last.ckpt"


def describe(content: dict[str, Any], network: DiT, weights: str) -> dict[str, Any]:
    """What has to be known of the weights of a checkpoint.

    Args:
        content: Of the checkpoint.
        network: Of it.
        weights: Which of its weights.
    """
    settings = redacted(content.get("hyper_parameters") or {})
    objective = (settings.get("objective") or {}).get("init_args") or {}
    return {
        "network": network.arguments,
        "interpolant": objective.get("interpolant"),
        "time": CONVENTION,
        "num_classes": network.num_classes,
        "null_class": network.null_class,
        "weights": weights,
        "step": content.get("global_step"),
        "images_seen": (content.get("progress") or {}).get("images_seen"),
        "autoencoder": settings.get("autoencoder"),
    }

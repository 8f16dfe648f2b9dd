"""``lightning export``: a checkpoint's network as a folder, with what has to be known to use it."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save

from w2s_train.checkpoint_file import check_local, damage, newest_first, read_checkpoint
from w2s_train.command.to_diffusers import write_pipeline
from w2s_train.errors import UserError
from w2s_train.models.saved import class_path, saved_network
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
        format: ``model.safetensors`` for any network, or a pipeline of diffusers.
    """
    check_local(ckpt_path, "ckpt_path")
    path = Path(ckpt_path)
    path = _newest(path / "checkpoints") if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"ckpt_path={ckpt_path}: must be a checkpoint, or a run folder with one")
    if output.exists():
        raise UserError(f"output={output}: must not exist yet")
    network = saved_network(str(path), weights).eval()
    about = _about(read_checkpoint(str(path)), network, weights)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        if format == "diffusers":
            write_pipeline(network, about["autoencoder"], partial)
            name = "w2s_train.json"
        else:
            state = {key: value.contiguous() for key, value in network.state_dict().items()}
            (partial / "model.safetensors").write_bytes(save(state))
            name = "config.json"
        (partial / name).write_text(json.dumps(about, indent=1) + "\n")
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


def _about(content: dict[str, Any], network: Any, weights: str) -> dict[str, Any]:
    """What has to be known of the weights of a checkpoint's network."""
    settings = redacted(content.get("hyper_parameters") or {})
    objective = (settings.get("objective") or {}).get("init_args") or {}
    segments = [each.get("init_args") or {} for each in objective.get("segments") or []]
    drawn = [each for each in segments if each.get("name") in getattr(network, "scales", [])]
    return {
        "network": getattr(network, "arguments", None),
        "class_path": class_path(network),
        "scales": {s["name"]: {key: s.get(key) for key in ("low", "high", "scale")} for s in drawn},
        "interpolant": objective.get("interpolant"),
        "time": CONVENTION,
        "num_classes": getattr(network, "num_classes", None),
        "null_class": network.null_class,
        "weights": weights,
        "step": content.get("global_step"),
        "images_seen": (content.get("progress") or {}).get("images_seen"),
        "autoencoder": settings.get("autoencoder"),
    }

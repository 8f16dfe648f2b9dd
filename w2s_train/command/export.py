"""``lightning export``: a checkpoint's network as a folder, with what has to be known to use it.

`DiT` is diffusers' ``DiTTransformer2DModel`` but for its rates. Both embed t by cosines and sines
at 128 rates, ours 10,000^(-i/128), theirs 10,000^(-i/127). For t in [0, 1] all of them are smooth:
with phi and phi' the two embeddings there is a matrix D with

    phi(a t + b) = (1 + D)^T phi'(t)        to 2e-8, for every t in [0, 1],

where a and b are our ``time_scale`` and ``time_shift``. The first layer of the time MLP takes it
up, W' = W (1 + D)^T, and the two networks agree to the rounding of float32. Where a = 1, b = 0, no
entry of D exceeds 0.003.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from w2s_train.checkpoint_file import check_local, damage, newest_first, read_checkpoint
from w2s_train.errors import UserError, one_line
from w2s_train.models.dit import DiT, position_table
from w2s_train.models.saved import class_path, saved_network
from w2s_train.secrets import redacted

CONVENTION = "x_t = alpha(t) x + sigma(t) noise; t = 0 is data, t = 1 is noise; v = d x_t / d t"
FREQUENCIES = 256
GRID = 4001  # times in [0, 1] at which D is fitted; it is tested at others
EXACT = 1e-7  # of an embedding, whose entries are up to 1
KINDS = ("weight", "bias")
PARTS = {  # of a block, theirs and ours, beside attention
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


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
            _write_diffusers(network, partial)
            name = "w2s_train.json"
        else:
            state = {key: value.contiguous() for key, value in network.state_dict().items()}
            save_file(state, partial / "model.safetensors")
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
    return {
        "network": getattr(network, "arguments", None),
        "class_path": class_path(network),
        "interpolant": objective.get("interpolant"),
        "time": CONVENTION,
        "num_classes": getattr(network, "num_classes", None),
        "null_class": network.null_class,
        "weights": weights,
        "step": content.get("global_step"),
        "images_seen": (content.get("progress") or {}).get("images_seen"),
        "autoencoder": settings.get("autoencoder"),
    }


def _write_diffusers(network: DiT, folder: Path) -> None:
    """Write the folder that ``DiTTransformer2DModel.from_pretrained`` reads."""
    _check(network)
    try:
        from diffusers import DiTTransformer2DModel  # optional, and takes seconds to import
    except (ImportError, RuntimeError) as error:  # it wraps errors of what it imports
        raise UserError(
            f"format=diffusers: needs diffusers, which cannot be imported ({one_line(error)}); "
            "pip install diffusers"
        ) from error
    theirs: Any = DiTTransformer2DModel(
        num_attention_heads=network.num_heads,
        attention_head_dim=network.hidden_size // network.num_heads,
        in_channels=network.in_channels,
        num_layers=network.depth,
        sample_size=network.input_size,
        patch_size=network.patch_size,
        num_embeds_ada_norm=network.num_classes,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(_convert(network))
    theirs.save_pretrained(str(folder), safe_serialization=True)


def _check(network: DiT) -> None:
    """Refuse what diffusers' class cannot be."""
    if not isinstance(network, DiT):
        name = type(network).__name__
        raise UserError(
            f"network={name}: must be a DiT for format=diffusers; safetensors takes any"
        )
    arguments = network.arguments
    must = {"qk_norm": False, "mlp_ratio": 4, "out_channels": network.in_channels}
    for name, value in must.items():
        if arguments[name] != value:
            raise UserError(f"{name}={arguments[name]}: must be {value} for format=diffusers")
    table = position_table(network.hidden_size, network.input_size // network.patch_size)
    if not torch.equal(network.pos_embed[0].cpu(), table):
        raise UserError("pos_embed: must be the fixed table of sines for format=diffusers")


def _convert(network: DiT) -> dict[str, Tensor]:
    """The weights under diffusers' names."""
    ours = network.state_dict()
    state = {f"pos_embed.proj.{kind}": ours[f"x_embedder.proj.{kind}"] for kind in KINDS}
    layers = {"linear_1": "t_embedder.mlp.0", "linear_2": "t_embedder.mlp.2"}
    time = {f"{a}.{kind}": ours[f"{b}.{kind}"] for a, b in layers.items() for kind in KINDS}
    change = rates_change(network.time_scale, network.time_shift)
    time["linear_1.weight"] = (time["linear_1.weight"].double() @ change).float()
    for i in range(network.depth):
        mine, block = f"blocks.{i}", f"transformer_blocks.{i}"
        embedder = f"{block}.norm1.emb"  # every block has its own, all of them alike
        state |= {f"{embedder}.timestep_embedder.{name}": value for name, value in time.items()}
        table = ours["y_embedder.embedding_table.weight"]
        state[f"{embedder}.class_embedder.embedding_table.weight"] = table
        for kind in KINDS:
            for name, part in zip("qkv", ours[f"{mine}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{block}.attn1.to_{name}.{kind}"] = part
            for name, part in PARTS.items():
                state[f"{block}.{name}.{kind}"] = ours[f"{mine}.{part}.{kind}"]
    for kind in KINDS:
        state[f"proj_out_1.{kind}"] = ours[f"final_layer.adaLN_modulation.1.{kind}"]
        state[f"proj_out_2.{kind}"] = ours[f"final_layer.linear.{kind}"]
    return state


def rates_change(scale: float, shift: float) -> Tensor:
    """(1 + D)^T of above, (256, 256) float64.

    D has the least norm of all that solve it on a grid, singular values below 1e-9 left out: seven
    of 256 directions are seen at all, and the others of W stay as they are.
    """
    t = torch.linspace(0, 1, GRID, dtype=torch.float64)
    theirs, ours = embed(t, 127), embed(scale * t + shift, 128)
    change = torch.linalg.pinv(theirs, rtol=1e-9) @ (ours - theirs)
    change += torch.eye(FREQUENCIES, dtype=torch.float64)
    t = torch.linspace(0, 1, 2 * GRID, dtype=torch.float64)
    error = (embed(t, 127) @ change - embed(scale * t + shift, 128)).abs().max().item()
    if error > EXACT:
        raise UserError(
            f"time_scale={scale}: diffusers' timesteps cannot stand for it with time_shift={shift} "
            f"(off by {error:.1e}); must be 1 or -1"
        )
    return change.T


def embed(t: Tensor, divisor: int) -> Tensor:
    """Cosines and sines of t (N,) at rates 10,000^(-i / divisor): (N, 256)."""
    angle = t.unsqueeze(1) * torch.exp(
        -math.log(10_000) * torch.arange(FREQUENCIES // 2, dtype=torch.float64) / divisor
    )
    return torch.cat([angle.cos(), angle.sin()], dim=1)

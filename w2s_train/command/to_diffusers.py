"""A network as a pipeline of diffusers.

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
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from w2s_train.autoencoder import DiffusersVAE, StableDiffusionVAE
from w2s_train.errors import UserError, needed
from w2s_train.loading import instantiate
from w2s_train.models.dit import DiT, position_table

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


def write_pipeline(network: Any, autoencoder: dict[str, Any] | None, folder: Path) -> None:
    """Write the folder that ``DiffusionPipeline.from_pretrained`` reads, with its code beside it.

    Args:
        network: A `DiT`.
        autoencoder: Settings of the run's, of which the pipeline decodes; None is pixel space.
        folder: Where to.

    Raises:
        UserError: diffusers cannot be imported, or its class cannot be this network.
    """
    _check(network)
    with needed("diffusers", "format=diffusers"):
        import diffusers  # optional, and takes seconds to import
    theirs: Any = diffusers.DiTTransformer2DModel(
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
    theirs.save_pretrained(str(folder / "transformer"), safe_serialization=True)
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.save_pretrained(str(folder / "scheduler"))
    index = {
        "_class_name": ["pipeline", "VelocityPipeline"],
        "_diffusers_version": diffusers.__version__,
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "null_class": network.null_class,
    }
    index |= _write_autoencoder(autoencoder, folder)
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")
    shutil.copy(Path(__file__).parent / "exported" / "pipeline.py", folder)


def _write_autoencoder(settings: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """Write what decodes, if it is here, and give its entries of ``model_index.json``."""
    kinds = {kind.__name__: kind for kind in (DiffusersVAE, StableDiffusionVAE)}
    name = settings["class_path"].rpartition(".")[2] if settings else ""
    if settings is None or name not in kinds:
        return {"vae": [None, None]}
    ours = instantiate(kinds[name], settings.get("init_args") or {})
    mean, std = ours.latent_moments
    index = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    try:
        ours.load()
    except UserError as error:
        print(f"without its autoencoder, which must be given as vae: {error}", file=sys.stderr)
        return index | {"vae": [None, None]}
    ours.vae.save_pretrained(str(folder / "vae"), safe_serialization=True)
    return index | {"vae": ["diffusers", type(ours.vae).__name__]}


def _check(network: DiT) -> None:
    """Refuse what diffusers' class cannot be."""
    if not isinstance(network, DiT):
        name = type(network).__name__
        raise UserError(
            f"network={name}: must be a DiT for format=diffusers; safetensors takes any"
        )
    if network.scales:
        raise UserError(
            f"network.scales={network.scales}: must be none for format=diffusers, whose class has "
            "no such inputs; format=safetensors takes any"
        )
    arguments = network.arguments
    must: dict[str, Any] = {"qk_norm": False, "mlp_ratio": 4, "out_channels": network.in_channels}
    must |= dict(rope=False, swiglu=False, rmsnorm=False, shift=True, class_tokens=0, data_on=None)
    for name, value in must.items():
        if arguments[name] != value:
            raise UserError(f"{name}={arguments[name]}: must be {value} for format=diffusers")
    table = position_table(network.hidden_size, network.input_size // network.patch_size)
    if not torch.equal(network.pos_embed[0].cpu(), table):
        raise UserError(
            "pos_embed: must be the fixed table of sines for format=diffusers, not one resampled "
            "from another size; format=safetensors takes any"
        )


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

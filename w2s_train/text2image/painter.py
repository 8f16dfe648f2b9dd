"""One image of a text-to-image model, which depends on its prompt and seed alone."""

import logging
import time
from typing import Any, Literal, NamedTuple

import torch
from diffusers.guiders import BaseGuidance
from PIL import Image
from torch import nn

from w2s_train.errors import UserError, one_line
from w2s_train.text2image.evaluations import Evaluations
from w2s_train.text2image.folder import ModelFolder

Dtype = Literal["bfloat16", "float16", "float32"]
Offload = Literal["model", "group", "sequential"]


class Settings(NamedTuple):
    """What an image depends on beside model, guidance, prompt and seed.

    Args:
        steps: Of the sampler.
        height: In pixels.
        width: In pixels.
        max_sequence_length: Tokens of T5.
        negative_prompt: Of the unguided prediction.
    """

    steps: int
    height: int
    width: int
    max_sequence_length: int
    negative_prompt: str


class Painting(NamedTuple):
    """An image, and what it took.

    Args:
        image: RGB.
        evaluations: Of the network, in whole ones.
        seconds: On the clock.
    """

    image: Image.Image
    evaluations: float
    seconds: float


class Painter:
    """A modular pipeline of diffusers with a guider, and one image of it at a time.

    Float32 results depend on the size of a batch, so that there is none. Noise is drawn on the CPU
    in float32. The network has no other hooks after an image than before, whether the image
    was finished or not, and the guider is as before its first step: some of diffusers' would tell
    text encoders otherwise that the negative prompt is not needed.

    Args:
        folder: Of the model; its weights are read.
        guider: Of the pipeline.
        dtype: Of all parts.
        device: Where they compute.
        offload: What waits in host memory for its turn: parts as a whole ("model"), blocks
            ("group") or single layers ("sequential"); None keeps all on the device.

    Raises:
        UserError: The weights cannot be read, or the device has no other memory.
    """

    def __init__(
        self,
        folder: ModelFolder,
        guider: BaseGuidance,
        dtype: Dtype,
        device: torch.device,
        offload: Offload | None,
    ) -> None:
        from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

        self.folder, self.guider = folder, guider
        classic = _read(folder, dtype)
        _place(classic, device, offload)
        parts = {key: part for key, part in classic.components.items() if part is not None}
        blocks: Any = StableDiffusion3AutoBlocks()
        _silence(blocks)
        self.pipeline = blocks.init_pipeline()
        self.pipeline.update_components(**parts, guider=guider)
        self.network: nn.Module = self.pipeline.transformer
        self.own = {name for _, registry in self._registries() for name in registry.hooks}
        self.evaluations = Evaluations(self.network)

    def paint(self, prompt: str, seed: int, settings: Settings) -> Painting:
        """The image of a prompt and a seed."""
        shape = (settings.height // self.folder.factor, settings.width // self.folder.factor)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, self.folder.channels, *shape), generator=generator)
        began = time.monotonic()
        self._restore()
        try:
            with self.evaluations.counted():
                (image,) = self.pipeline(
                    prompt=prompt,
                    negative_prompt=settings.negative_prompt,  # without one there is no guidance
                    num_inference_steps=settings.steps,
                    height=settings.height,
                    width=settings.width,
                    max_sequence_length=settings.max_sequence_length,
                    latents=noise,
                    output="images",
                )
        finally:
            self._restore()
        return Painting(image, self.evaluations.total(), time.monotonic() - began)

    def _restore(self) -> None:
        """Network and guider as they were before the first step."""
        self.guider.cleanup_models(self.network)
        for _, registry in self._registries():
            for name in [name for name in registry.hooks if name not in self.own]:
                registry.remove_hook(name, recurse=False)
        guider: Any = self.guider
        guider._step = guider._num_inference_steps = guider._timestep = None
        guider._count_prepared = 0

    def _registries(self) -> list[tuple[nn.Module, Any]]:
        """Modules with hooks of diffusers, and these."""
        found = [(each, getattr(each, "_diffusers_hook", None)) for each in self.network.modules()]
        return [(module, registry) for module, registry in found if registry is not None]


def quiet_libraries() -> None:
    """Drop what diffusers and transformers say about themselves; for a process of one's own."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    for name in ("guiders.guider_utils", "modular_pipelines.modular_pipeline_utils"):
        logging.getLogger(f"diffusers.{name}").setLevel(logging.ERROR)
    # Of a mistake it prints the traceback of each block; what was raised says it once.
    loud = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
    loud.setLevel(logging.CRITICAL)


def _silence(blocks: Any) -> None:
    """No bars of steps, however deep they lie; there is one of images."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        _silence(block)


def meta_network(folder: ModelFolder) -> nn.Module:
    """The network without weights or memory, by which guiders can be checked."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        network: nn.Module = SD3Transformer2DModel.from_config(folder.network)
    return network


def _read(folder: ModelFolder, dtype: Dtype) -> Any:
    from diffusers import StableDiffusion3Pipeline

    try:
        return StableDiffusion3Pipeline.from_pretrained(
            folder.path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            **dict.fromkeys(folder.absent),
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"model={folder.path}: must hold whole weights ({one_line(error)[:300]})"
        ) from error


def _place(classic: Any, device: torch.device, offload: Offload | None) -> None:
    """Where parts compute, and where they wait."""
    if offload is None:
        classic.to(device)
    elif offload == "group":
        classic.enable_group_offload(device, num_blocks_per_group=1, exclude_modules=["vae"])
        classic.vae.to(device)
    elif device.type == "cpu":
        raise UserError(f"offload={offload}: must be null where the device is the CPU")
    elif offload == "model":
        classic.enable_model_cpu_offload(device=device)
    else:
        classic.enable_sequential_cpu_offload(device=device)

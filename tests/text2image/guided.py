"""Runs of the small pipeline, and of networks alone, by guiders."""

import copy
import functools
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PROMPT = "a red cat"
STEPS = 28


def classic(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def modular(pipeline: Any, guider: Any = None) -> Any:
    """The modular pipeline of the same parts."""
    from diffusers.modular_pipelines.stable_diffusion_3 import StableDiffusion3AutoBlocks

    made = StableDiffusion3AutoBlocks().init_pipeline()
    made.update_components(**{k: v for k, v in pipeline.components.items() if v is not None})
    made.set_progress_bar_config(disable=True)
    if guider is not None:
        made.update_components(guider=guider)
    return made


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents(pipeline: Any, prompt: Any = PROMPT, steps: int = STEPS, **more: Any) -> Tensor:
    """What a pipeline makes from the seed, before it is decoded."""
    options = dict(num_inference_steps=steps, height=16, width=16, output_type="latent")
    options |= dict(generator=seeded(), negative_prompt="", max_sequence_length=16)
    if type(pipeline).__name__.endswith("ModularPipeline"):
        return pipeline(prompt=prompt, output="latents", **options | more)
    return pipeline(prompt=prompt, **options | more).images


@contextmanager
def counted(cls: type[nn.Module]):
    """Rows that the modules of a class have seen, in batches as they came."""
    rows: list[int] = []
    forward: Callable[..., Any] = cls.forward

    @functools.wraps(forward)
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        first = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows.append(len(first))
        return forward(self, *args, **kwargs)

    cls.forward = counting
    try:
        yield rows
    finally:
        cls.forward = forward


def passes(guider: Any, network: nn.Module, inputs: dict, sigma: float = 0.5) -> list[Any]:
    """The predictions of a step's passes, as a pipeline's loop asks for them."""
    guider.set_state(step=20, num_inference_steps=STEPS, timestep=torch.tensor(1000 * sigma))
    outputs = []
    data = {"prompt": (torch.zeros(1), torch.ones(1))}
    for _ in guider.prepare_inputs(data):
        guider.prepare_models(network)
        with torch.no_grad():
            outputs.append(network(**inputs, return_dict=False)[0])
        guider.cleanup_models(network)
    return outputs


def less(network: nn.Module, left_out: Any, fqn: str = "transformer_blocks") -> Any:
    """The network with blocks deleted."""
    small = copy.deepcopy(network)
    kept = [block for i, block in enumerate(getattr(small, fqn)) if i not in left_out]
    setattr(small, fqn, nn.ModuleList(kept))
    return small

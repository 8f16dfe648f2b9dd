"""Samples of a network that w2s_train has trained; needs diffusers only."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image


class Images(BaseOutput):
    """What the pipeline returns."""

    images: Any


class VelocityPipeline(DiffusionPipeline):
    """Solves dx/dt = v(x, t) from noise at t = 1 to data at t = 0, in equal steps of Euler.

    Args:
        transformer: Predicts v; its ``timestep`` is t, in [0, 1].
        scheduler: A ``FlowMatchEulerDiscreteScheduler``, which counts timesteps from 1000 to 0.
        vae: An ``AutoencoderKL``; None where the network works on pixels.
        null_class: The label that means "no class".
        latents_mean: Of each channel; a latent z is z * latents_std + latents_mean for the ``vae``.
        latents_std: Of each channel.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any = None,
        null_class: int = 0,
        latents_mean: Any = None,
        latents_std: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            null_class=null_class, latents_mean=latents_mean, latents_std=latents_std
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: Any = None,
        output_type: str = "pil",
    ) -> Images:
        """Images of some classes.

        Args:
            class_labels: One per image, or one; ``null_class`` for none.
            num_inference_steps: Equal steps from t = 1 to 0.
            guidance_scale: Of classifier-free guidance; 1 is none, and half the cost.
            generator: A `torch.Generator`, or one per image.
            output_type: "pil", "np" (N, H, W, C) in [0, 1], or "latent", what the network works on.

        Raises:
            ValueError: No label, no step, or another output.
        """
        device, made = self._execution_device, self.transformer.config
        y = torch.as_tensor(class_labels, device=device).reshape(-1)
        if not len(y):
            raise ValueError(f"class_labels={class_labels}: must be a class, or one per image")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: must be at least 1")
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type={output_type}: must be pil, np or latent")
        shape = (len(y), made.in_channels, made.sample_size, made.sample_size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        sigmas = np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        for step in self.progress_bar(self.scheduler.timesteps):
            v = self._velocity(x, step / self.scheduler.config.num_train_timesteps, y)
            if guidance_scale != 1:
                null = torch.full_like(y, self.config.null_class)
                without = self._velocity(x, step / self.scheduler.config.num_train_timesteps, null)
                v = without + guidance_scale * (v - without)
            x = self.scheduler.step(v, step, x).prev_sample
        return Images(images=x if output_type == "latent" else self._images(x, output_type))

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        dtype = self.transformer.dtype
        times = t.to(dtype).expand(len(x))
        return self.transformer(x.to(dtype), timestep=times, class_labels=y).sample.float()

    def _images(self, x: torch.Tensor, output_type: str) -> Any:
        if self.config.latents_std is not None:
            if self.vae is None:
                raise ValueError("vae: must be given to from_pretrained, or output_type=latent")
            mean, std = (
                torch.tensor(each, device=x.device).view(-1, 1, 1)
                for each in (self.config.latents_mean, self.config.latents_std)
            )
            x = self.vae.decode((x * std + mean).to(self.vae.dtype)).sample.float()
        pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "np":
            return pixels / np.float32(255)
        grey = pixels.shape[3] == 1
        return [Image.fromarray(each[:, :, 0] if grey else each) for each in pixels]

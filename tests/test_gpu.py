"""What only a GPU shows: bf16, compiled networks, the same images as on the CPU."""

import pytest
import torch

from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler
from w2s_train.timesteps import Uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_bf16_and_compile_train(command):
    """The tiny digits run with mixed precision and compiled networks: finite, and it resumes."""
    options = ["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed"]
    options += ["--model.compile=true"]
    folder = command("fit", *options)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in state.items():
        assert value.dtype == torch.float32, name
        assert value.isfinite().all(), name
    command("fit", *options, "--ckpt_path=last", "--trainer.max_steps=8")


def test_images_are_those_of_the_cpu(network: DiT):
    """Noise comes from the host: a seed is one image on any device, up to rounding."""
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform())
    model = DiffusionModule(network, objective, Euler(steps=5), generation_block=4)
    seeds, labels = list(range(8)), [i % 5 for i in range(8)]
    on_cpu = model.generate(seeds, labels).int()
    on_gpu = model.cuda().generate(seeds, labels).cpu().int()
    assert (on_cpu - on_gpu).abs().max() <= 1

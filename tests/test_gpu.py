"""What only a GPU shows: bf16, compiled networks, the same images as on the CPU."""

from typing import Any

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


@pytest.mark.parametrize("name", ["sgg_paper", "layer_skip", "ema", "separate"])
def test_the_host_waits_for_nothing_in_a_step(command, monkeypatch, name: str):
    """CUDA itself says so; from the fourth step on, when everything is where it belongs."""
    real, checked = DiffusionModule.optimizer_step, []

    def optimizer_step(self, *args: Any, **kwargs: Any):
        if self.global_step >= 3:
            torch.cuda.set_sync_debug_mode("error")
            checked.append(self.global_step)
        try:
            real(self, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DiffusionModule, "optimizer_step", optimizer_step)
    options = ["--trainer.accelerator=gpu", "--trainer.precision=bf16-mixed"]
    options += ["--trainer.log_every_n_steps=1000", "--trainer.val_check_interval=1000"]
    command("fit", "-c", f"configs/weak/{name}.yaml", *options, "--trainer.gradient_clip_val=1.0")
    assert checked == [3, 4, 5]


def test_a_bad_step_is_passed_over_on_the_device(command, monkeypatch):
    """The weights behind it are those before it, and it is recorded."""
    real = DiffusionModule.training_step

    def training_step(self, batch, batch_idx):
        loss = real(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 3 else loss

    monkeypatch.setattr(DiffusionModule, "training_step", training_step)
    options = ["--trainer.accelerator=gpu", "--checkpoint.every_n_train_steps=1"]
    folder = command("fit", *options, "--trainer.val_check_interval=1000")
    states = [
        torch.load(folder / f"checkpoints/step-00000{n}.ckpt", weights_only=True)["state_dict"]
        for n in (3, 4, 5)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[1][name], states[2][name]) for name in states[0])
    assert (folder / "bad_steps.jsonl").read_text().count("\n") == 1

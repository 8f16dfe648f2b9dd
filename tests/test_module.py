"""The Lightning module: averages, label dropout, generation, learning."""

from functools import partial

import pytest
import torch
from conftest import perturbed, sources
from lightning import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader, Dataset

from w2s_train.autoencoder import PixelSpace, StableDiffusionVAE, to_uint8
from w2s_train.errors import UserError
from w2s_train.evaluation.scorer import ResumableEvaluation
from w2s_train.guidance import ClassifierFree
from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT, WeightAverage
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.running.samples import reseed
from w2s_train.sampler import Euler, EulerMaruyama
from w2s_train.segment import Extrapolation, Segment
from w2s_train.timesteps import Uniform


class TwoClasses(Dataset):
    """Constant images: class 0 is dark, class 1 bright."""

    def __len__(self) -> int:
        return 6400

    def __getitem__(self, i: int) -> dict:
        label = i % 2
        return {"image": torch.full((1, 4, 4), 1.6 * label - 0.8), "label": torch.tensor(label)}


class Seeds(Callback):
    """The draws of a run."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        reseed(0, 0, trainer.fit_loop.total_batch_idx, pl_module.device)


def module(*segments: Segment, switches: dict | None = None, **options) -> DiffusionModule:
    network = DiT(4, 2, 1, 32, 2, 2, num_classes=2, **(switches or {}))
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), list(segments))
    defaults = dict(sampler=Euler(steps=10), optimizer=adam, generation_block=4)
    return DiffusionModule(network, objective, **(defaults | options))


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=3e-3)


def fit(model: DiffusionModule, steps: int, *callbacks: Callback, **options) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Seeds(), *callbacks],
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(model, DataLoader(TwoClasses(), batch_size=32))
    return trainer


def test_averages_follow_optimizer_steps_not_batches(monkeypatch):
    """Under accumulation the average moves once per optimizer step, and by the formula."""
    source = sources.EMA(decay=0.5)
    model = module(Extrapolation(0.0, 1.0, 0.3, source), ema_decay=0.5)
    history = [[p.clone() for p in model.network.parameters()]]
    update = WeightAverage.update

    def spy(self, network, good):
        if self is model.ema:
            history.append([p.clone() for p in network.parameters()])
        update(self, network, good)

    monkeypatch.setattr(WeightAverage, "update", spy)
    fit(model, steps=3, accumulate_grad_batches=2)
    assert len(history) == 4
    expected = history[0]
    for weights in history[1:]:
        expected = [0.5 * a + 0.5 * w for a, w in zip(expected, weights, strict=True)]
    for average in (model.ema, source.average):
        for ours, theirs in zip(average.module.parameters(), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert model.images_seen == 3 * 2 * 32


def test_every_step_is_logged_once(monkeypatch):
    """Also the last of an epoch, which Lightning takes with the batches that are left."""
    model, logged = module(), []
    monkeypatch.setattr(model, "record", lambda metrics: logged.append(model.global_step))
    fit(model, steps=6, accumulate_grad_batches=2, limit_train_batches=5)
    assert logged == [1, 2, 3, 4, 5, 6]


def test_half_precision_networks_are_averaged_in_float32(network: DiT):
    """A bfloat16 average with decay 0.999 would not move at all."""
    half = network.bfloat16()
    average = WeightAverage(half, decay=0.999)
    start = average.module.final_layer.linear.weight.clone()
    half.final_layer.linear.weight.data += 1
    average.update(half)
    moved = average.module.final_layer.linear.weight - start
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 0.001), rtol=0.05, atol=0)


@pytest.mark.slow
def test_it_learns_two_classes():
    """The loss falls, and unguided samples have the brightness of their class."""
    fast = partial(torch.optim.AdamW, lr=1e-2)
    segment = Extrapolation(0.0, 1.0, 0.2, sources.NullClass())
    model = module(segment, ema_decay=0.9, optimizer=fast)
    first = fit(model, steps=1).callback_metrics["train/loss"]
    trainer = fit(model, steps=100)
    assert trainer.callback_metrics["train/loss"] < 0.5 * first
    images = model.generate(seeds=list(range(40)), labels=[i % 2 for i in range(40)]).float()
    dark, bright = images[0::2].mean(), images[1::2].mean()
    assert dark < 70
    assert bright > 185


def test_what_a_run_keeps_does_nothing_without_it():
    """It has the type of a callback for the sake of configs only, and says so."""
    with pytest.raises(UserError, match="ResumableEvaluation: must stand in a config"):
        fit(module(), 1, ResumableEvaluation())


@pytest.mark.slow
def test_images_depend_on_seed_and_label_alone():
    """Bitwise: for any batch, any order, ODE and SDE, guided and not (faults row 17)."""
    seeds, labels = list(range(11)), [i % 2 for i in range(11)]
    sde = EulerMaruyama(LinearInterpolant(), steps=5)
    for options in ({}, dict(sampler=sde), dict(guidance=ClassifierFree(2.0, 0.3, 0.9))):
        model = module(**options)
        perturbed(model.ema.module.requires_grad_(True)).requires_grad_(False)
        whole = model.generate(seeds, labels)
        for size in (1, 3, 4, 5):
            parts = [
                model.generate(seeds[i : i + size], labels[i : i + size])
                for i in range(0, 11, size)
            ]
            assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(model.generate(seeds[::-1], labels[::-1]), whole.flip(0))
        assert not torch.equal(whole[0], whole[2])  # the same class, another seed


def test_generation_leaves_the_global_generator_alone():
    model = module()
    before = torch.get_rng_state()
    model.generate([0, 1], [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("probability", [0.0, 0.1, 1.0])
def test_label_dropout(probability: float):
    model = module(label_dropout=probability)
    y = torch.arange(20_000) % 2
    dropped = model.drop_labels(y)
    assert (dropped == 2).float().mean().item() == pytest.approx(probability, abs=0.01)
    assert torch.equal(dropped[dropped != 2], y[dropped != 2])


def test_uint8_rounds():
    grey = torch.arange(256)
    assert torch.equal(to_uint8(grey / 127.5 - 1), grey.to(torch.uint8))
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]
    assert to_uint8(torch.tensor([0.6, 0.4]) / 127.5 - 1).tolist() == [1, 0]


def test_latents_are_samples_of_the_posterior():
    vae = StableDiffusionVAE(scale=0.5)
    mean, log_variance = torch.full((2000, 4, 2, 2), 3.0), torch.full((2000, 4, 2, 2), 0.4)
    x = vae.encode(torch.cat([mean, log_variance], dim=1))
    assert x.mean().item() == pytest.approx(1.5, abs=0.02)
    assert x.std().item() == pytest.approx(0.5 * torch.tensor(0.2).exp().item(), rel=0.02)
    assert torch.equal(vae.encode(mean), 0.5 * mean)
    with pytest.raises(ValueError, match="channels=4"):
        vae.encode(mean[:, :3])
    assert torch.equal(PixelSpace().encode(mean), mean)


def test_clipping_keeps_the_norm_before_it():
    model = module()
    trainer = fit(model, steps=2, gradient_clip_val=1e-3)
    assert trainer.callback_metrics["train/gradient_norm"] > 1e-3
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "bad, key",
    [
        (dict(label_dropout=-0.1), "label_dropout"),
        (dict(label_dropout=float("nan")), "label_dropout"),
        (dict(ema_decay=1.0), "ema_decay"),
        (dict(generation_block=0), "generation_block"),
        (dict(optimizer=lambda p: torch.optim.AdamW(p, lr=-1.0)), "optimizer"),
    ],
)
def test_bad_arguments(bad: dict, key: str):
    with pytest.raises(ValueError, match=key):
        module(**bad)


def test_float16_is_unscaled_before_gradients_are_looked_at():
    """With a fused optimizer, too, whose step would undo the scale only after clipping."""
    model, norms = module(optimizer=partial(torch.optim.AdamW, fused=True)), list[float]()

    class Judge(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            _, norm = pl_module.measure(optimizer)
            norms.append(norm.item())
            pl_module.accept(len(norms) != 2, optimizer)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(model, 4, Judge(), plugins=[plugin], gradient_clip_val=1.0)
    assert len(norms) == 4 and max(norms) < 50
    assert scaler.get_scale() == 2.0**10

"""Guiders that share a formula with `w2s_train.guidance`, against it."""

import math

import pytest
import torch
from guided import PROMPT, classic, counted, latents, modular, passes, seeded
from pipeline import transformer

from w2s_train.errors import UserError
from w2s_train.guidance import AngleDomain, StageWise
from w2s_train.interpolant import LinearInterpolant
from w2s_train.text2image import (
    AngleDomainGuidance,
    LearnedGuidance,
    PromptScales,
    StageWiseGuidance,
    Texts,
)

STEPS = 6
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline(sd3_folder):
    return classic(sd3_folder)


@torch.no_grad()
def solved(pipeline, combine):
    """Euler's method by hand; ``combine(v, v_null, x, i, times)`` guides."""
    both = pipeline.encode_prompt(PROMPT, None, None, negative_prompt="", max_sequence_length=16)
    embeds, null_embeds, pooled, null_pooled = both
    x = pipeline.prepare_latents(1, 4, 16, 16, torch.float32, torch.device("cpu"), seeded(), None)
    pipeline.scheduler.set_timesteps(STEPS)
    times = pipeline.scheduler.sigmas.tolist()
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        time = torch.full((1,), 1000 * t)
        v = pipeline.transformer(x, embeds, pooled, time).sample
        null = pipeline.transformer(x, null_embeds, null_pooled, time).sample
        x = x + (s - t) * combine(v, null, x, i, times, pooled)
    return x


def test_stage_wise(pipeline):
    rule, guider = StageWise(4.5), StageWiseGuidance(4.5)
    ours = latents(modular(pipeline, guider), steps=STEPS)
    expected = solved(
        pipeline, lambda v, null, x, i, times, _: null + rule.scales(times)[i] * (v - null)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert guider.describe() == "tv_cfg(4.5)"
    with pytest.raises(
        UserError, match=r"^shift=1.0: must be that of FlowMatchEuler.* step 1 of 6"
    ):
        latents(modular(pipeline, StageWiseGuidance(4.5, shift=1.0)), steps=STEPS)


def test_angle_domain(pipeline):
    rule, guider = AngleDomain(3.0), AngleDomainGuidance(3.0)
    ours = latents(modular(pipeline, guider), steps=STEPS)
    expected = solved(
        pipeline,
        lambda v, null, x, i, times, _: rule.guided(v, null, x, times[i], LinearInterpolant()),
    )
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert not any("forward" in vars(module) for module in pipeline.transformer.modules())
    assert guider.describe() == "adg(3)"
    inputs = dict(hidden_states=torch.ones(2, 4, 8, 8), encoder_hidden_states=torch.ones(2, 5, 64))
    inputs |= dict(pooled_projections=torch.ones(2, 64), timestep=torch.ones(2))
    guided = passes(guider, transformer(), inputs, sigma=0.9)
    with pytest.raises(UserError, match=r"^hidden_states=\(2, 4, 8, 8\): must be the sample alone"):
        guider.combine(dict(pred_cond=guided[0][:1], pred_uncond=guided[1][:1]))


def texts(rows: int, seed: int) -> Texts:
    make = seeded(seed)
    return Texts(torch.randn(rows, 5, 64, generator=make), torch.randn(rows, 64, generator=make))


def test_learned(pipeline, tmp_path):
    """It starts as no guidance, is saved, and gives each prompt and step its scale."""
    scales, path = PromptScales(width=64), str(tmp_path / "scales.safetensors")
    scales.save(path)
    ours = latents(modular(pipeline, LearnedGuidance(path)), steps=STEPS)
    unguided = latents(pipeline, guidance_scale=1.0, steps=STEPS)
    torch.testing.assert_close(ours, unguided, rtol=1e-3, atol=1e-3)
    torch.nn.init.normal_(scales.scales.mlp[-1].weight, std=3.0)
    scales.save(path)
    guider = LearnedGuidance(path)
    guider.save_pretrained(tmp_path)
    ours = latents(modular(pipeline, LearnedGuidance.from_pretrained(tmp_path)), steps=STEPS)
    found = []

    def combine(v, null, x, i, times, pooled):
        s, t = torch.tensor([times[i + 1]]), torch.tensor([times[i]])
        found.append(float(scales.scales(s, t, pooled, LinearInterpolant())))
        return null + found[-1] * (v - null)

    torch.testing.assert_close(ours, solved(pipeline, combine), rtol=1e-3, atol=1e-3)
    assert len({*found}) == STEPS
    assert guider.describe() == f"learned({path})"


def test_a_scale_is_learned():
    """The loss falls; a reward for large data pulls the scale to where they are."""
    network, make = transformer(blocks=2), seeded(4)
    x, prompts, negative = torch.randn(4, 4, 8, 8, generator=make), texts(4, 1), texts(4, 2)

    def mean_scale(**options) -> float:
        torch.manual_seed(0)
        scales = PromptScales(width=64, hidden_size=8, **options)
        optimizer = torch.optim.Adam(scales.scales.mlp[-1].parameters(), lr=0.05)
        for _ in range(8):
            optimizer.zero_grad()
            scales(network, x, prompts, negative).mean().backward()
            optimizer.step()
        at = torch.full((4,), 0.5)
        return scales.scales(at, at, prompts.pooled, LinearInterpolant()).mean().item()

    with torch.no_grad():
        inputs = [(t.embeds, t.pooled, torch.full((4,), 500.0)) for t in (prompts, negative)]
        v, null = (network(x, *given).sample for given in inputs)
    direction = (null - v).flatten()  # data x_t - t v grow along it with the scale

    def reward(data, pooled):
        return (data.flatten(1) * direction.unflatten(0, (4, -1)).repeat_interleave(4, 0)).mean(1)

    plain = mean_scale()
    assert math.isfinite(plain)
    assert mean_scale(reward=reward, reward_weight=100.0) > plain
    assert mean_scale(reward=lambda *a: -reward(*a), reward_weight=100.0) < plain


def test_what_cannot_be_meant(tmp_path, pipeline):
    for make, message in [
        (lambda: StageWiseGuidance(0.5), "guidance_scale=0.5: must be a finite number, at least 1"),
        (lambda: StageWiseGuidance(shift=0.0), "shift=0.0: must be a finite number above 0"),
        (lambda: AngleDomainGuidance(math.nan), "guidance_scale=nan: must be a finite number"),
        (lambda: LearnedGuidance("nowhere"), "path=nowhere: must be written by PromptScales.save"),
        (lambda: PromptScales(8, particles=1), "particles=1: must be at least 2"),
        (lambda: PromptScales(8, reward_weight=1.0), "reward_weight=1.0: must be 0 without a rew"),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            make()
    PromptScales(width=8).save(path := str(tmp_path / "scales.safetensors"))
    with pytest.raises(
        UserError, match=r"^text_embeds=\(1, 64\): must be pooled prompts of width 8"
    ):
        latents(modular(pipeline, LearnedGuidance(path)), steps=STEPS)


def test_disabled_guides_nothing(pipeline):
    unguided = latents(pipeline, guidance_scale=1.0, steps=STEPS)
    for guider in (StageWiseGuidance(enabled=False), AngleDomainGuidance(enabled=False)):
        with counted(type(pipeline.transformer)) as rows:
            assert torch.equal(latents(modular(pipeline, guider), steps=STEPS), unguided)
        assert rows == [1] * STEPS and guider.describe() == "none"

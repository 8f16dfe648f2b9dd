"""The guiders in diffusers' own denoising steps of other models than Stable Diffusion 3."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import BlockState
from guided import less
from test_guided_networks import flux2, ltx, noise, qwen, wan, z_image

from w2s_train.guidance import AngleDomain
from w2s_train.interpolant import LinearInterpolant
from w2s_train.text2image import AngleDomainGuidance, Guider, SegmentedGuidance

pytestmark = pytest.mark.slow
SKIPPED = (1, 3)


def state_of(make: Callable, inputs: dict) -> tuple[type, str, dict]:
    """The step, the name of its blocks, and what it finds in the pipeline's state."""
    from diffusers.modular_pipelines.flux2.denoise import Flux2KleinBaseLoopDenoiser
    from diffusers.modular_pipelines.ltx.denoise import LTXLoopDenoiser
    from diffusers.modular_pipelines.qwenimage.denoise import QwenImageLoopDenoiser
    from diffusers.modular_pipelines.wan.denoise import WanLoopDenoiser
    from diffusers.modular_pipelines.z_image.denoise import ZImageLoopDenoiser

    x = inputs.get("hidden_states")
    shared = dict(latents=x, latent_model_input=x, dtype=torch.float32, attention_kwargs=None)
    shared |= dict(joint_attention_kwargs=None, timestep=torch.full((2,), 500.0))
    if make is z_image:
        shared |= dict(latent_model_input=inputs["x"], timestep=torch.full((2,), 0.5))
        return ZImageLoopDenoiser, "layers", shared
    if make is qwen:
        shared |= dict(prompt_embeds_mask=inputs["encoder_hidden_states_mask"])
        shared |= dict(negative_prompt_embeds_mask=inputs["encoder_hidden_states_mask"])
        shared |= dict(denoiser_input_fields=dict(img_shapes=inputs["img_shapes"]))
        return QwenImageLoopDenoiser, "transformer_blocks", shared | dict(additional_cond_kwargs={})
    if make is flux2:
        shared |= dict(txt_ids=inputs["txt_ids"], negative_txt_ids=inputs["txt_ids"])
        shared |= dict(latent_ids=inputs["img_ids"])
        return Flux2KleinBaseLoopDenoiser, "single_transformer_blocks", shared
    if make is ltx:
        mask = inputs["encoder_attention_mask"]
        shared |= dict(prompt_attention_mask=mask, negative_prompt_attention_mask=mask)
        shared |= dict(num_frames=1, height=4, width=4, rope_interpolation_scale=None)
        return LTXLoopDenoiser, "transformer_blocks", shared
    return WanLoopDenoiser, "blocks", shared


def denoised(make: Callable, guider: Guider, network, inputs: dict, sigma: float) -> torch.Tensor:
    """The velocity that one step finds, with prompts of the inputs and others as negative ones."""
    cls, _, shared = state_of(make, inputs)
    prompt = inputs.get("encoder_hidden_states", inputs.get("cap_feats"))
    negative = [2 * p for p in prompt] if isinstance(prompt, list) else 2 * prompt
    state = BlockState(
        prompt_embeds=prompt, negative_prompt_embeds=negative, num_inference_steps=28, **shared
    )
    sizes = dict(vae_temporal_compression_ratio=1, vae_spatial_compression_ratio=1)
    components = SimpleNamespace(guider=guider, transformer=network, **sizes)
    cls()(components, state, 20, torch.tensor(1000 * sigma))
    return state.noise_pred


@pytest.mark.parametrize("make", [qwen, wan, ltx, flux2, z_image])
def test_a_step_of_their_pipelines(make: Callable):
    torch.manual_seed(0)
    network, inputs = make()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.eval()
    fqn = state_of(make, inputs)[1]
    plain = SegmentedGuidance(enabled=False)
    twice = dict(inputs)
    name = "cap_feats" if make is z_image else "encoder_hidden_states"
    twice[name] = [2 * p for p in inputs[name]] if make is z_image else 2 * inputs[name]
    v, v_null = (denoised(make, plain, network, given, 0.5) for given in (inputs, twice))
    v_weak = denoised(make, plain, less(network, SKIPPED, fqn), inputs, 0.5)
    guider = SegmentedGuidance(skip_layers=SKIPPED, fqn=fqn)
    low, high = (denoised(make, guider, network, inputs, sigma) for sigma in (0.5, 0.9))
    v_9, null_9 = (denoised(make, plain, network, given, 0.9) for given in (inputs, twice))
    expected = [v + 3 * (v - v_weak), null_9 + 4.5 * (v_9 - null_9)]
    if make is qwen:  # whose step gives each token the length of the unguided one
        lengths = [a.norm(dim=-1, keepdim=True) for a in (v, v_9)]
        expected = [
            a * n / a.norm(dim=-1, keepdim=True) for a, n in zip(expected, lengths, strict=True)
        ]
    for ours, theirs in zip((low, high), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(low, v) and not torch.allclose(v, v_null)


@pytest.mark.parametrize("make", [wan, ltx, flux2, z_image])
def test_angle_domain_guidance_finds_the_sample(make: Callable):
    network, inputs = make()
    for parameter in network.parameters():
        parameter.data += 0.1 * noise(*parameter.shape)
    network.eval()
    name = "cap_feats" if make is z_image else "encoder_hidden_states"
    twice = [2 * p for p in inputs[name]] if make is z_image else 2 * inputs[name]
    plain = SegmentedGuidance(enabled=False)
    given = inputs, inputs | {name: twice}
    v, v_null = (denoised(make, plain, network, one, 0.5) for one in given)
    ours = denoised(make, AngleDomainGuidance(2.0), network, inputs, 0.5)
    x = torch.stack(inputs["x"]) if make is z_image else inputs["hidden_states"]
    theirs = AngleDomain(2.0).guided(v, v_null, x.view_as(v), 0.5, LinearInterpolant())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

"""A weak pass is the network with those blocks deleted, whatever the kind of network."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from guided import counted, less, passes, seeded
from pipeline import transformer

from w2s_train.errors import UserError
from w2s_train.text2image import SegmentedGuidance

pytestmark = pytest.mark.slow  # importing all of diffusers' networks takes seconds


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(sum(shape)))


def sd35() -> tuple[torch.nn.Module, dict]:
    """With blocks of two attentions, as 3.5-medium has."""
    network = transformer(dual_attention_layers=(0, 1, 2), qk_norm="rms_norm")
    inputs = dict(hidden_states=noise(2, 4, 8, 8), encoder_hidden_states=noise(2, 5, 64))
    return network, inputs | dict(pooled_projections=noise(2, 64), timestep=torch.ones(2))


def qwen() -> tuple[torch.nn.Module, dict]:
    options = dict(in_channels=16, out_channels=4, num_layers=6, attention_head_dim=16)
    options |= dict(num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4))
    inputs = dict(hidden_states=noise(2, 16, 16), encoder_hidden_states=noise(2, 5, 16))
    inputs |= dict(encoder_hidden_states_mask=torch.ones(2, 5, dtype=torch.bool))
    inputs |= dict(img_shapes=[[(1, 4, 4)]] * 2, timestep=torch.ones(2))
    return diffusers.QwenImageTransformer2DModel(**options), inputs


def wan() -> tuple[torch.nn.Module, dict]:
    options = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4)
    options |= dict(text_dim=16, freq_dim=16, ffn_dim=32, num_layers=6, rope_max_seq_len=32)
    inputs = dict(hidden_states=noise(2, 4, 1, 8, 8), encoder_hidden_states=noise(2, 5, 16))
    return diffusers.WanTransformer3DModel(**options), inputs | dict(timestep=torch.ones(2))


def ltx() -> tuple[torch.nn.Module, dict]:
    options = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16)
    options |= dict(cross_attention_dim=32, num_layers=6, caption_channels=16)
    inputs = dict(hidden_states=noise(2, 16, 4), encoder_hidden_states=noise(2, 5, 16))
    inputs |= dict(encoder_attention_mask=torch.ones(2, 5), num_frames=1, height=4, width=4)
    return diffusers.LTXVideoTransformer3DModel(**options), inputs | dict(timestep=torch.ones(2))


def flux2() -> tuple[torch.nn.Module, dict]:
    options = dict(in_channels=4, num_layers=6, num_single_layers=6, attention_head_dim=16)
    options |= dict(num_attention_heads=2, joint_attention_dim=16, guidance_embeds=False)
    options |= dict(axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16)
    inputs = dict(hidden_states=noise(2, 16, 4), encoder_hidden_states=noise(2, 5, 16))
    inputs |= dict(img_ids=torch.ones(16, 4), txt_ids=torch.zeros(5, 4))
    return diffusers.Flux2Transformer2DModel(**options), inputs | dict(timestep=torch.ones(2))


def z_image() -> tuple[torch.nn.Module, dict]:
    options = dict(in_channels=4, dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    options |= dict(cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[64, 16, 16])
    inputs = dict(x=[*noise(2, 4, 1, 8, 8)], cap_feats=[*noise(2, 5, 16)], t=torch.ones(2))
    return diffusers.ZImageTransformer2DModel(**options), inputs


CASES: list[tuple[Callable, str]] = [
    (sd35, "transformer_blocks"),
    (qwen, "transformer_blocks"),
    (wan, "blocks"),
    (ltx, "transformer_blocks"),
    (flux2, "transformer_blocks"),
    (flux2, "single_transformer_blocks"),
    (z_image, "layers"),
]


def equal(one, other) -> bool:
    pairs = zip(one, other, strict=True)  # tensors, or lists of them
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize(("make", "fqn"), CASES, ids=lambda case: getattr(case, "__name__", case))
def test_the_weak_pass_is_a_network_without_the_blocks(make: Callable, fqn: str):
    torch.manual_seed(0)
    network, inputs = make()
    for parameter in network.parameters():  # gates that are 0 at first are open
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.eval()
    block = type(getattr(network, fqn)[0])
    plain = network(**inputs, return_dict=False)[0]
    for skipped in ([1], [1, 3], [0, 5], [2, 3]):
        expected = less(network, skipped, fqn)(**inputs, return_dict=False)[0]
        assert not equal(expected, plain)
        for share, evaluated in (
            (True, 12 - skipped[0] - len(skipped)),
            (False, 12 - len(skipped)),
        ):
            guider = SegmentedGuidance(skip_layers=skipped, fqn=fqn, share_prefix=share)
            own = getattr(network, fqn)
            with counted(block) as rows:
                strong, weak = passes(guider, network, inputs)
            assert equal(strong, plain) and equal(weak, expected)
            others = len(rows) - evaluated  # Z-Image has more blocks of the class before these
            assert others == (4 if make is z_image else 0) and len(own) == 6


@pytest.mark.parametrize("words", [5, 16], ids=["text", "text as long as the image"])
@pytest.mark.parametrize(("make", "fqn"), [(ltx, "transformer_blocks"), (wan, "blocks")])
def test_attention_to_the_text_is_left_alone(make: Callable, fqn: str, words: int):
    """Perturbed blocks have values for scores in the attention of the image to itself alone."""
    torch.manual_seed(0)
    network, inputs = make()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    inputs |= dict(encoder_hidden_states=noise(2, words, 16))
    inputs |= dict(encoder_attention_mask=torch.ones(2, words)) if make is ltx else {}
    network.eval()
    guider = SegmentedGuidance(skip_layers=[2, 4], fqn=fqn, perturb=True)
    strong, weak = passes(guider, network, inputs)
    for i in (2, 4):
        attention = getattr(network, fqn)[i].attn1

        def values(hidden_states=None, *_: object, attention=attention, **__: object):
            out = attention.to_v(hidden_states)
            for layer in attention.to_out:
                out = layer(out)
            return out

        attention.forward = values
    expected = network(**inputs, return_dict=False)[0]
    assert torch.allclose(weak, expected, atol=1e-5) and not torch.allclose(weak, strong, atol=1e-3)


def test_blocks_that_diffusers_does_not_know():
    options = dict(num_layers=2, num_single_layers=2, attention_head_dim=16, in_channels=4)
    options |= dict(num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8)
    network = diffusers.FluxTransformer2DModel(**options, axes_dims_rope=(4, 4, 8))
    SegmentedGuidance(skip_layers=[0]).check(network)

    class Mine(type(network.transformer_blocks[0])):
        pass

    for block in network.transformer_blocks:
        block.__class__ = Mine
    with pytest.raises(UserError, match="^fqn=transformer_blocks: has blocks of Mine, must be of"):
        SegmentedGuidance(skip_layers=[0]).check(network)

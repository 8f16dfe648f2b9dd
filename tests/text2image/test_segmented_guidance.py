"""Segmented guidance of Stable Diffusion 3, against diffusers' pipeline and the authors' loop."""

import json
import math

import diffusers
import PIL.Image
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from guided import PROMPT, STEPS, classic, counted, latents, less, modular, passes, seeded
from pipeline import transformer

from w2s_train.errors import UserError
from w2s_train.text2image import SegmentedGuidance
from w2s_train.text2image.described import settings_of

BLOCKS = (2, 3, 4)
PROMPTS = [PROMPT, "two dogs"]


def sgg(**changes) -> SegmentedGuidance:
    return SegmentedGuidance(**dict(skip_layers=BLOCKS) | changes)


@pytest.fixture(scope="module")
def half(sd3_folder):
    """The pipeline in bfloat16, where batches of any size give the same bits."""
    return classic(sd3_folder, torch.bfloat16)


@pytest.fixture(scope="module")
def full(sd3_folder):
    return classic(sd3_folder)


@torch.no_grad()
def reference(pipeline, prompt, seen: int, scale=4.5, weak=3.0, deltas=(0.0, 0.0)):
    """The authors' loop, written anew: CFG in the first steps, then v + weak (v - v_skip)."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    both = pipeline.encode_prompt(
        texts, None, None, negative_prompt=[""] * len(texts), max_sequence_length=16
    )
    embeds, null_embeds, pooled, null_pooled = both
    x = pipeline.prepare_latents(
        len(texts), 4, 16, 16, embeds.dtype, torch.device("cpu"), seeded(), None
    )
    pipeline.scheduler.set_timesteps(STEPS)

    def velocity(t, embeds, pooled, **more):
        return pipeline.transformer(x, embeds, pooled, t.expand(len(x)), **more).sample

    for i, t in enumerate(pipeline.scheduler.timesteps):
        v = velocity(t, embeds, pooled)
        if i < seen:
            w = scale + deltas[0] * (1 - 2 * i / (seen - 1))
            null = velocity(t, null_embeds, null_pooled)
            v = null + w * (v - null)
        else:
            w = weak + deltas[1] * (1 - 2 * (i - seen) / (STEPS - seen - 1))
            v = v + (v - velocity(t, embeds, pooled, skip_layers=list(BLOCKS))) * w
        x = pipeline.scheduler.step(v, t, x, return_dict=False)[0]
    return x


@pytest.mark.slow
class TestSD3:
    def test_all_high_is_classifier_free_guidance(self, half):
        """Of the classic pipeline, and of the modular one."""
        ours = latents(modular(half, sgg(border=0.0)), PROMPTS)
        assert torch.equal(ours, latents(half, PROMPTS, guidance_scale=4.5))
        theirs = ClassifierFreeGuidance(guidance_scale=4.5)
        assert torch.equal(ours, latents(modular(half, theirs), PROMPTS))
        assert torch.equal(ours, latents(modular(half, sgg(border=None, switch=1.0)), PROMPTS))

    def test_all_low_is_skip_layer_guidance(self, half):
        """Theirs adds to CFG, which the prompt as its own negative makes nothing."""
        ours = latents(modular(half, sgg(border=None, switch=0.0)), PROMPTS)
        theirs = dict(skip_guidance_layers=list(BLOCKS), skip_layer_guidance_scale=3.0)
        theirs |= dict(skip_layer_guidance_start=-0.01, skip_layer_guidance_stop=1.01)
        classic = latents(half, PROMPTS, guidance_scale=4.5, negative_prompt=PROMPTS, **theirs)
        assert torch.equal(ours, classic)

    def test_half_and_half_is_the_release(self, half, full):
        ours = latents(modular(half, sgg()), PROMPTS)
        assert torch.equal(ours, reference(half, PROMPTS, 14))
        assert torch.equal(ours, latents(modular(half, sgg(border=None, switch=0.5)), PROMPTS))
        assert torch.equal(ours, latents(modular(half, sgg(share_prefix=False)), PROMPTS))
        alone = latents(modular(full, sgg()))
        assert torch.equal(alone, reference(full, PROMPT, 14))
        assert torch.equal(alone, latents(modular(full, sgg(share_prefix=False))))
        assert not torch.equal(alone, latents(modular(full, sgg(skip_layers=[4]))))

    def test_scales_fall_as_the_release_has_it(self, full):
        falling = sgg(border=None, switch=0.25, guidance_delta=2.0, weak_delta=1.0)
        ours = latents(modular(full, falling))
        assert torch.equal(ours, reference(full, PROMPT, 7, deltas=(2.0, 1.0)))

    def test_no_scale_is_one_pass(self, full):
        unguided = latents(full, guidance_scale=1.0)
        for guider in (sgg(guidance_scale=1.0, weak_scale=0.0), sgg(enabled=False)):
            with counted(type(full.transformer)) as rows:
                assert torch.equal(latents(modular(full, guider)), unguided)
            assert rows == [1] * STEPS

    def test_image_to_image(self, half):
        """Takes the last steps alone, of which a border finds its own."""
        make = dict(image=PIL.Image.new("RGB", (16, 16), "red"), strength=0.6, steps=10)
        cfg = latents(modular(half, sgg(border=0.0)), **make)
        theirs = ClassifierFreeGuidance(guidance_scale=4.5)
        assert torch.equal(cfg, latents(modular(half, theirs), **make))
        with counted(type(half.transformer.transformer_blocks[0])) as rows:
            segmented = latents(modular(half, sgg()), **make)
        assert not torch.equal(segmented, cfg)
        sigmas = half.scheduler.sigmas[4:10]
        high = int((sigmas >= 0.75).sum())
        assert 0 < high < 6 and len(rows) == 12 * high + (6 - high) * (6 + 6 - 5)

    def test_saved_and_loaded(self, full, tmp_path):
        guider = sgg(border=None, switch=0.25, guidance_delta=1.0)
        guider.save_pretrained(tmp_path)
        again = SegmentedGuidance.from_pretrained(tmp_path)
        assert again.describe() == guider.describe()
        assert again.skip_layers == BLOCKS and again.guidance_delta == 1
        sgg(skip_layers=range(2, 4)).save_pretrained(tmp_path)
        assert SegmentedGuidance.from_pretrained(tmp_path).skip_layers == (2, 3)
        ours = latents(modular(full, guider))
        assert torch.equal(ours, latents(modular(full, again)))
        assert torch.equal(ours, latents(modular(full, guider.new())))

    def test_another_network_as_the_weaker(self, full, tmp_path, monkeypatch):
        """Autoguidance by a network with those blocks deleted is skip-layer guidance.

        But for rounding: weights are mapped from the two files, whose alignment in memory differs.
        """
        weaker = less(full.transformer, BLOCKS)
        weaker.register_to_config(num_layers=3)
        weaker.save_pretrained(tmp_path)
        guider = sgg(weak=str(tmp_path), skip_layers=())
        ours = latents(modular(full, guider))
        skipping = latents(modular(full, sgg()))
        torch.testing.assert_close(ours, skipping, rtol=0, atol=1e-5)
        assert (ours - latents(modular(full, sgg(skip_layers=[4])))).abs().max() > 1e-2
        with pytest.raises(UserError, match="joint_attention_dim=64: must be 24, the network's"):
            guider.check(transformer(joint_attention_dim=24))
        monkeypatch.setenv("HOME", str(tmp_path.parent))
        at_home = sgg(weak=f"~/{tmp_path.name}", skip_layers=())
        assert torch.equal(ours, latents(modular(full, at_home)))
        assert settings_of(at_home)["weak_sha256"] == settings_of(guider)["weak_sha256"]
        with pytest.raises(UserError, match="weak=.*: must be a folder that diffusers' SD3"):
            (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"half of it")
            latents(modular(full, sgg(weak=str(tmp_path), skip_layers=())))

    @pytest.mark.parametrize(
        "case",
        ["adapter", "offload", pytest.param("compile", marks=pytest.mark.long), "compile_blocks"],
    )
    def test_beside_what_changes_networks(self, sd3_folder, full, case):
        pipeline = classic(sd3_folder)
        network = pipeline.transformer
        expected = None
        if case == "adapter":
            adapt(network)
            expected = reference(pipeline, PROMPT, 14)
            assert not torch.equal(expected, reference(full, PROMPT, 14))
        elif case == "offload":
            options = dict(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"))
            network.enable_group_offload(**options, num_blocks_per_group=1)
        elif case == "compile":
            pipeline.transformer = torch.compile(network, backend="eager")
        else:
            for block in network.transformer_blocks:
                block.compile(backend="eager")
        made = modular(pipeline, sgg())
        graphs = torch._dynamo.utils.counters["stats"]
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            ours = latents(made)
            assert torch.equal(ours, reference(full, PROMPT, 14) if expected is None else expected)
            compiled = graphs["unique_graphs"]
            assert torch.equal(ours, latents(made))
        assert graphs["unique_graphs"] == compiled  # code is found again, step by step


def adapt(network):
    """Low-rank adapters on the attention's queries, as PEFT puts them: layers around layers."""

    class Adapted(torch.nn.Module):
        def __init__(self, base_layer) -> None:
            super().__init__()
            self.base_layer = base_layer
            self.down = torch.nn.Linear(base_layer.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, base_layer.out_features, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    for block in network.transformer_blocks:
        block.attn.to_q = Adapted(block.attn.to_q)


def sd3_inputs(rows: int = 1) -> dict:
    make = seeded(1)
    inputs = dict(hidden_states=torch.randn(rows, 4, 8, 8, generator=make))
    inputs |= dict(encoder_hidden_states=torch.randn(rows, 5, 64, generator=make))
    inputs |= dict(pooled_projections=torch.randn(rows, 64, generator=make))
    return inputs | dict(timestep=torch.full((rows,), 500.0))


def untouched(network) -> bool:
    """Whether no module has a forward of its own, and none has notes of hooks."""
    return not any({"forward", "_diffusers_hook"} & vars(m).keys() for m in network.modules())


@pytest.mark.slow
@pytest.mark.parametrize(("blocks", "shared", "unshared"), [(24, 1.79, 1.94), (38, 1.87, 1.96)])
def test_block_evaluations(blocks, shared, unshared):
    """In whole networks a step, half and half, where CFG has 2."""
    network = transformer(blocks=blocks)
    block = type(network.transformer_blocks[0])

    def evaluated(guider) -> float:
        with counted(block) as rows:
            for sigma in (0.9, 0.5):
                passes(guider, network, sd3_inputs(), sigma)
        return sum(rows) / blocks / 2

    assert evaluated(SegmentedGuidance()) == (4 * blocks - 10) / (2 * blocks)
    assert round(evaluated(SegmentedGuidance()), 2) == shared
    assert round(evaluated(SegmentedGuidance(share_prefix=False)), 2) == unshared
    assert evaluated(SegmentedGuidance(border=0.0)) == 2
    assert evaluated(SegmentedGuidance(guidance_scale=1.0, weak_scale=0.0)) == 1
    assert untouched(network)


@pytest.mark.slow
def test_attention_perturbed():
    """Each token of the chosen blocks sees itself alone, wherever the weak pass starts."""
    network = transformer()
    strong, weak = passes(sgg(skip_layers=[2, 3], perturb=True), network, sd3_inputs())
    unshared = sgg(skip_layers=[2, 3], perturb=True, share_prefix=False)
    assert torch.equal(weak, passes(unshared, network, sd3_inputs())[1])
    assert untouched(network)
    own = torch.nn.functional.scaled_dot_product_attention
    for i in (2, 3):
        attention = network.transformer_blocks[i].attn

        def blind(*args: object, attention=attention, **kwargs):
            torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: v
            try:
                return type(attention).forward(attention, *args, **kwargs)
            finally:
                torch.nn.functional.scaled_dot_product_attention = own

        attention.forward = blind
    assert torch.equal(weak, network(**sd3_inputs()).sample)
    assert not torch.equal(weak, strong)


@pytest.mark.slow
def test_attention_that_cannot_be_perturbed():
    network = transformer()
    network.transformer_blocks[3].attn.processor = (
        lambda attn, hidden_states, encoder_hidden_states, **_: (
            hidden_states,
            encoder_hidden_states,
        )
    )
    with pytest.raises(UserError, match="^perturb=True: must be false, the attention here has no"):
        passes(sgg(perturb=True), network, sd3_inputs())
    assert untouched(network)


@pytest.mark.slow
def test_blocks_replaced_between_steps():
    """What stands in a block's place, such as one compiled alone, is left out as well."""
    network, guider = transformer(), sgg()
    weak = passes(guider, network, sd3_inputs())[1]
    for i in (1, 3):
        block = network.transformer_blocks[i]
        network.transformer_blocks[i] = torch.compile(block, backend="eager")
    assert torch.equal(passes(guider, network, sd3_inputs())[1], weak)


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("fails", range(1, 4))
@pytest.mark.fault
@pytest.mark.slow
def test_a_step_that_fails_leaves_the_network(error, fails):
    """In the strong pass, in the weak one, and between preparing and running."""
    network, guider = transformer(), sgg()
    plain = network(**sd3_inputs()).sample
    calls = []

    def failing(*args: object):
        calls.append(1)
        if len(calls) == fails:
            raise error

    handle = network.norm_out.register_forward_pre_hook(failing)
    if fails < 3:
        with pytest.raises(error):
            passes(guider, network, sd3_inputs())
        assert untouched(network)
    else:
        guider.set_state(20, STEPS, torch.tensor(500.0))
        guider.prepare_models(network)
        guider.prepare_models(network)  # the weak pass, which never runs
        assert not untouched(network)
    handle.remove()
    assert guider.num_conditions == 2
    assert torch.equal(passes(guider, network, sd3_inputs())[0], plain)
    other = ClassifierFreeGuidance(guidance_scale=2.0)
    assert all(torch.equal(out, plain) for out in passes(other, network, sd3_inputs()))
    assert untouched(network)
    assert torch.equal(network(**sd3_inputs()).sample, plain)


def test_a_low_step_needs_no_negative_prompt():
    """And a high one says so; text encoders are told the same at any time."""
    guider = sgg()
    embeds = torch.zeros(1)
    for data in ({"x": embeds}, {"x": (embeds, None)}, {"x": (embeds, embeds)}):
        guider.set_state(0, STEPS, torch.tensor(1000.0))
        with pytest.raises(UserError, match="negative_prompt=None"):
            guider.prepare_inputs(data)
        guider.set_state(20, STEPS, torch.tensor(500.0))
        assert len(guider.prepare_inputs(data)) == 2
        assert guider.num_conditions == 2
    assert sgg(border=None, switch=0.0).num_conditions == 1
    assert sgg(guidance_scale=1.0).num_conditions == 1
    assert sgg(enabled=False).num_conditions == 1


def test_batches_from_a_block_state():
    """Of pipelines that name their fields, such as Wan's, LTX's and Z-Image's."""
    from diffusers.modular_pipelines.modular_pipeline import BlockState

    guider, fields = sgg(), dict(encoder_hidden_states=("prompt_embeds", "negative_prompt_embeds"))
    embeds = torch.zeros(1), torch.ones(1)
    state = BlockState(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1])
    for sigma, expected in ((0.9, embeds), (0.5, embeds[:1] * 2)):
        guider.set_state(3, STEPS, torch.tensor(1000 * sigma))
        batches = guider.prepare_inputs_from_block_state(state, fields)
        given = [batch.encoder_hidden_states for batch in batches]
        assert all(one is other for one, other in zip(given, expected, strict=True))
    guider.set_state(3, STEPS, torch.tensor(900.0))
    with pytest.raises(UserError, match="negative_prompt=None"):
        guider.prepare_inputs_from_block_state(BlockState(prompt_embeds=embeds[0]), fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(border=None), "border=null: must be given, or else switch, but not both"),
        (dict(switch=0.5), "border=0.75: must be given, or else switch, but not both"),
        (dict(border=1.5), r"border=1.5: must be in \[0, 1\]"),
        (dict(border=None, switch=-0.1), r"switch=-0.1: must be in \[0, 1\]"),
        (dict(guidance_scale=-1.0), "guidance_scale=-1.0: must be a finite number, at least 0"),
        (dict(weak_scale=math.nan), "weak_scale=nan: must be a finite number, at least 0"),
        (dict(weak_delta=1.0), "weak_delta=1.0: must be 0 with border; give switch"),
        (dict(guidance_delta=9.0), r"guidance_delta=9.0: must be in \[0, 4.5\]"),
        (dict(skip_layers=()), r"skip_layers=\[\]: must be given, or else weak, but not both"),
        (dict(weak="there"), r"skip_layers=\[2, 3, 4\]: must be given, or else weak"),
        (dict(weak="there", skip_layers=()), "weak=there: must be a folder of a network"),
        (dict(skip_layers=7), r"skip_layers=7: must be a list of whole numbers"),
        (dict(skip_layers=["7"]), r"skip_layers=\['7'\]: must be a list of whole numbers"),
        (dict(skip_layers=[-1]), r"skip_layers=\[-1\]: must be different, and from 0 on"),
        (dict(skip_layers=[1, 1]), r"skip_layers=\[1, 1\]: must be different, and from 0 on"),
    ],
)
def test_what_cannot_be_meant(options, message):
    with pytest.raises(UserError, match=f"^{message}"):
        sgg(**options)


def test_what_is_set_later_counts():
    """Blocks are looked up anew for other settings of a guider that has run."""
    network, inputs = transformer(), sd3_inputs()
    guider = sgg(skip_layers=[2])
    first = passes(guider, network, inputs)[1]
    guider.skip_layers = (4,)
    assert torch.equal(
        passes(guider, network, inputs)[1], passes(sgg(skip_layers=[4]), network, inputs)[1]
    )
    assert not torch.equal(passes(guider, network, inputs)[1], first)


def test_a_weaker_network_must_take_the_same_inputs(tmp_path):
    network = transformer()
    with pytest.raises(UserError, match="^weak=.*: must be a folder of a network .* safetensors"):
        sgg(weak=str(tmp_path), skip_layers=())
    network.save_pretrained(tmp_path)
    guider = sgg(weak=str(tmp_path), skip_layers=())
    guider.check(network)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, rule in (
        ("joint_attention_dim", 96, "joint_attention_dim=96: must be"),
        ("_class_name", "AutoencoderKL", "must be a SD3Transformer2DModel, is a AutoencoderKL"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=f"^weak=.*: {rule}"):
            guider.check(network)


@pytest.mark.slow
def test_networks_that_cannot_be_guided():
    network = transformer()
    for options, message in [
        (dict(skip_layers=[6]), r"skip_layers=\[6\]: must be below 6, the blocks of transformer_b"),
        (dict(fqn="layers"), r"fqn=layers: must be blocks of SD3.*, such as \['transformer_blo"),
        (dict(fqn="transformer_blocks.0.attn.to_out"), "fqn=.*: has blocks of Linear, must be of"),
    ]:
        with pytest.raises(UserError, match=f"^{message}"):
            sgg(**dict(skip_layers=[0]) | options).check(network)
        sgg(**dict(border=0.0, skip_layers=[0]) | options).check(network)  # no step skips
    network.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        num_blocks_per_group=2,
    )
    with pytest.raises(UserError, match="^num_blocks_per_group=2: must be 1 where"):
        sgg().check(network)
    options = dict(block_out_channels=(8, 16), cross_attention_dim=8, norm_num_groups=4)
    options |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1)
    options |= dict(up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=8)
    unet = diffusers.UNet2DConditionModel(sample_size=8, **options)
    where = dict(fqn="mid_block.attentions.0.transformer_blocks", skip_layers=[0])
    with pytest.raises(UserError, match="^share_prefix=True: must be false for a UNet"):
        sgg(**where).check(unet)
    sgg(**where, share_prefix=False).check(unet)


def test_protocols():
    assert sgg().describe() == (
        "segmented(sigma < 0.75: slg(3, less blocks [2, 3, 4] of transformer_blocks), "
        "before: cfg(4.5))"
    )
    assert sgg(border=0.0).describe() == "cfg(4.5)"
    assert sgg(border=None, switch=0.0).describe().startswith("slg(3, less blocks")
    assert sgg(guidance_scale=1.0, weak_scale=0.0).describe() == "none"
    assert sgg(enabled=False).describe() == "none"
    falling = sgg(border=None, switch=0.5, guidance_delta=1.0)
    assert falling.describe().endswith("before: cfg(5.5 to 3.5))")
    assert "from 0.5 on: slg" in falling.describe()

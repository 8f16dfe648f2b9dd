"""Scores of images for prompts: networks of random weights against formulas written out.

Weights are small and random, file layouts, preprocessing and formulas are the published ones.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from w2s_train.errors import UserError
from w2s_train.text2image.aesthetic import WIDTHS, AestheticScore, linear_head
from w2s_train.text2image.clip_judges import CLIPScore, PickScore
from w2s_train.text2image.hps import HPSv21
from w2s_train.text2image.judge import Judge

SIDE = 32  # pixels that the small CLIPs see
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
SMALL = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
LETTERS = [f"{chr(c)}{end}" for c in range(97, 123) for end in ("", "</w>")]
PROMPTS = ["a red cube", "two owls on a branch at night", "x"]


def drawn(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Random RGB images of these widths and heights, each with a tint of its own."""
    random = np.random.default_rng(0)
    noise = [random.random((h, w, 3)) * random.random(3) for w, h in sizes]
    return [Image.fromarray((255 * x).astype(np.uint8)) for x in noise]


IMAGES = drawn((50, 40), (32, 32), (33, 70))


def write_clip(folder: Path, embedding: int = 768, eos: int = 53) -> Path:
    """A folder as transformers writes it, with weights that tell prompts and images apart."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    text = dict(vocab_size=54, bos_token_id=52, eos_token_id=eos, projection_dim=embedding)
    vision = dict(image_size=SIDE, patch_size=8, projection_dim=embedding)
    config = CLIPConfig(
        text_config=SMALL | text, vision_config=SMALL | vision, projection_dim=embedding
    )
    network = CLIPModel(config)
    for x in network.parameters():
        torch.nn.init.normal_(x, std=0.4)
    torch.nn.init.constant_(network.logit_scale, 4.6)
    network.save_pretrained(folder)
    tokens = [*LETTERS, "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={x: i for i, x in enumerate(tokens)}, merges=[]).save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    size = {"shortest_edge": SIDE}
    CLIPImageProcessorPil(size=size, crop_size=square).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(9)  # cosines above 0
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("mlp") / "sac+logos+ava1-l14-linearMSE.pth"
    layers = linear_head(WIDTHS)
    for x in layers.parameters():
        torch.nn.init.normal_(x, std=0.1)
    torch.save(layers.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as HPS_v2.1_compressed.pt, of a model that open_clip is told of."""
    import open_clip

    folder = tmp_path_factory.mktemp("hps")
    size = dict(width=16, layers=2)
    vision = size | dict(image_size=SIDE, head_width=8, patch_size=8)
    text = size | dict(context_length=77, vocab_size=49408, heads=2)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (folder / "tiny-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps.json")
    torch.manual_seed(2)
    network = open_clip.create_model("tiny-hps")
    for x in network.parameters():
        if x.dim():
            torch.nn.init.normal_(x, std=0.4)
    torch.save({"state_dict": network.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder / "HPS_v2.1_compressed.pt"


@pytest.fixture(scope="module")
def judges(clip: Path, mlp: Path, hps: Path) -> dict[str, Judge]:
    found = [
        CLIPScore(clip),
        PickScore(clip),
        AestheticScore(mlp, clip),
        HPSv21(hps, "tiny-hps"),
    ]
    return {type(judge).__name__: judge for judge in found}


def pixels(image: Image.Image) -> Tensor:
    """The shorter side to 32 pixels, bicubic; the middle square; normalized: (1, 3, 32, 32)."""
    scale = SIDE / min(image.size)
    image = image.resize([int(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - SIDE) // 2 for side in image.size)
    x = (np.asarray(image)[top : top + SIDE, left : left + SIDE] / 255 - MEAN) / STD
    return torch.from_numpy(x).float().permute(2, 0, 1).unsqueeze(0)


def by_hand(clip: Path, image: Image.Image, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of length 1, and exp(s) cos: the network's forward, letters as tokens."""
    from transformers import CLIPModel

    network = CLIPModel.from_pretrained(clip)
    words = [[*word[:-1], f"{word[-1]}</w>"] for word in prompt.split()]
    ids = torch.tensor([[52, *(LETTERS.index(x) for word in words for x in word), 53]])
    with torch.no_grad():
        out = network(input_ids=ids, pixel_values=pixels(image))
    return out.image_embeds[0], out.text_embeds[0], out.logits_per_image[0, 0]


def whole_image(image: Image.Image) -> Tensor:
    """The longer side to 32 pixels, bicubic; black around it; normalized: (1, 3, 32, 32)."""
    x = torch.from_numpy(np.asarray(image) / 255).float().permute(2, 0, 1).unsqueeze(0)
    height, width = (round(side * SIDE / max(image.size)) for side in x.shape[2:])
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    around = []
    for free in (SIDE - width, SIDE - height):
        around += [free // 2, free - free // 2]
    mean, std = (torch.from_numpy(x).float().view(3, 1, 1) for x in (MEAN, STD))
    return (F.pad(x, around) - mean) / std


def hps_by_hand(hps: Path, image: Image.Image, prompt: str) -> Tensor:
    """100 cos, by open_clip's own reading of the file and its forward."""
    import open_clip

    network = open_clip.create_model("tiny-hps", pretrained=str(hps)).eval()
    with torch.no_grad():
        a, b, _ = network(whole_image(image), open_clip.tokenize([prompt]))
    return 100 * F.cosine_similarity(a[0], b[0], dim=0)


@pytest.mark.slow
def test_formulas(clip: Path, mlp: Path, hps: Path, judges: dict[str, Judge]):
    """Of three shapes of images; the head of the aesthetic score is five matrices."""
    state = torch.load(mlp, weights_only=True)
    pairs = [*zip(IMAGES, PROMPTS, strict=True)]
    hands = [by_hand(clip, *pair) for pair in pairs]
    cosines = torch.stack([F.cosine_similarity(a, b, dim=0) for a, b, _ in hands])
    aesthetic = torch.stack([a for a, _, _ in hands])
    for i in (0, 2, 4, 6, 7):
        aesthetic = aesthetic @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    expected = {
        "CLIPScore": 100 * cosines.clamp_min(0),
        "PickScore": torch.stack([logit for _, _, logit in hands]),
        "AestheticScore": aesthetic[:, 0],
        "HPSv21": torch.stack([hps_by_hand(hps, *pair) for pair in pairs]),
    }
    assert all(x.std() > 0.01 for x in expected.values())
    for name, judge in judges.items():
        found = judge.score(IMAGES, PROMPTS)
        assert (found.shape, found.dtype, found.requires_grad) == ((3,), torch.float32, False)
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_no_negative_clip_score(clip: Path, tmp_path: Path):
    """Turned round, embeddings of text have the cosine -cos: one of the two scores is 0."""
    turned = write_clip(tmp_path)
    state = load_file(clip / "model.safetensors")
    state["text_projection.weight"] *= -1
    save_file(state, turned / "model.safetensors")
    a, b = (CLIPScore(folder).score(IMAGES, PROMPTS) for folder in (clip, turned))
    cosines = PickScore(clip).score(IMAGES, PROMPTS) / np.exp(4.6)
    torch.testing.assert_close(a - b, 100 * cosines)
    assert (torch.minimum(a, b) == 0).all() and torch.maximum(a, b).min() > 0


@pytest.mark.slow
def test_a_score_is_its_own(judges: dict[str, Judge]):
    """Bit for bit: alone, in another order, beside others, under autocast, in other modes."""
    for judge in judges.values():
        together = judge.score(IMAGES, PROMPTS)
        alone = [judge.score([x], [text]) for x, text in zip(IMAGES, PROMPTS, strict=True)]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together.flip(0), judge.score(IMAGES[::-1], PROMPTS[::-1]))
        assert len(judge.score([], [])) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(together, judge.score(IMAGES, PROMPTS))
        opaque = [x.convert("RGBA") for x in IMAGES]
        assert torch.equal(together, judge.score(opaque, PROMPTS))
        other = judge.score(IMAGES, PROMPTS[::-1])
        assert torch.equal(together, other) == isinstance(judge, AestheticScore)


@pytest.mark.slow
def test_torch_is_left_as_it_was(clip: Path, mlp: Path, hps: Path):
    """Random weights, which the file's replace, take nothing from the generator of all."""
    before = torch.get_rng_state()
    aesthetic, preferred = AestheticScore(mlp, clip), HPSv21(hps, "tiny-hps")
    for judge in (aesthetic, preferred):
        judge.score(IMAGES[:1], PROMPTS[:1])
    assert torch.equal(before, torch.get_rng_state())
    for network in (aesthetic.head, aesthetic.clip.network, preferred.network):
        assert not network.training
        assert not any(x.requires_grad for x in network.parameters())


@pytest.mark.slow
def test_layouts_of_files(clip: Path, mlp: Path, tmp_path: Path):
    """Names as published; old files' counters and end of text 2; half precision as float32."""
    state = load_file(clip / "model.safetensors")
    assert {
        "logit_scale",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.self_attn.q_proj.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.pre_layrnorm.weight",
        "visual_projection.weight",
    } <= state.keys()
    shapes = {key: tuple(x.shape) for key, x in torch.load(mlp, weights_only=True).items()}
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    assert shapes == {f"layers.{i}.weight": size for i, size in sizes.items()} | {
        f"layers.{i}.bias": size[:1] for i, size in sizes.items()
    }
    old = write_clip(tmp_path / "old", eos=2)
    half = {key: x.half() for key, x in state.items()}
    half["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    save_file(half, old / "model.safetensors")
    new = write_clip(tmp_path / "new")
    save_file({key: x.half().float() for key, x in state.items()}, new / "model.safetensors")
    for judge in (CLIPScore, PickScore):
        assert torch.equal(judge(old).score(IMAGES, PROMPTS), judge(new).score(IMAGES, PROMPTS))


@pytest.mark.slow
def test_the_published_hps(hps: Path):
    """By default a ViT-H/14, whose 986 million parameters have these names."""
    import open_clip

    judge = HPSv21(hps)
    with torch.device("meta"):
        network = open_clip.CLIP(**judge.config)
    assert (judge.size, sum(x.numel() for x in network.parameters())) == (224, 986_109_441)
    assert {
        "visual.conv1.weight",
        "visual.transformer.resblocks.31.attn.in_proj_weight",
        "transformer.resblocks.23.mlp.c_fc.weight",
        "token_embedding.weight",
        "text_projection",
        "logit_scale",
    } <= network.state_dict().keys()


@pytest.mark.slow
def test_preprocessing_of_squares(clip: Path):
    """Of square images, transformers' preprocessing is OpenAI's, which open_clip has, too."""
    from open_clip import image_transform
    from transformers import CLIPImageProcessorPil

    for image in drawn((64, 64), (20, 20), (SIDE, SIDE)):
        ours = CLIPImageProcessorPil.from_pretrained(clip)(image, return_tensors="pt")
        theirs = image_transform(SIDE, is_train=False)(image)
        torch.testing.assert_close(ours["pixel_values"][0], theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_long_prompts_are_cut(judges: dict[str, Judge]):
    """At 77 tokens, of which two are the ends: what comes after them is not seen."""
    for name in ("CLIPScore", "PickScore", "HPSv21"):
        prompts = ["x " * 75, "x " * 75 + "y", "x " * 74]
        whole, cut, short = judges[name].score(IMAGES[:1] * 3, prompts)
        assert whole == cut != short


@pytest.mark.slow
def test_fingerprints(clip: Path, mlp: Path, hps: Path, judges: dict[str, Judge]):
    """Beginnings of the sha256 of every file of weights."""
    weights, of_head, of_hps = (
        hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in (clip / "model.safetensors", mlp, hps)
    )
    assert judges["CLIPScore"].fingerprint == judges["PickScore"].fingerprint == weights
    assert judges["AestheticScore"].fingerprint == f"{of_head}-{weights}"
    assert judges["HPSv21"].fingerprint == of_hps
    names = [judge.name for judge in judges.values()]
    assert names == ["clip_score", "pick_score", "aesthetic", "hps_v2.1"]


@pytest.mark.slow
def test_a_processor_of_its_own(clip: Path, tmp_path: Path):
    """For weights without one; vocab.json and merges.txt are as good as tokenizer.json."""
    bare, other = tmp_path / "bare", tmp_path / "other"
    for folder, names in (
        (bare, ["config.json", "model.safetensors"]),
        (other, ["preprocessor_config.json"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes((clip / name).read_bytes())
    with pytest.raises(UserError, match=r"preprocessor_config.json: .*PickScore_v1's processor$"):
        PickScore(bare)
    with pytest.raises(UserError, match=r"processor=.*: must be a folder with a tokenizer, tok"):
        PickScore(bare, other)
    vocabulary = json.loads((clip / "tokenizer.json").read_text())["model"]["vocab"]
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    (other / "vocab.json").write_text(json.dumps(vocabulary))
    (other / "merges.txt").write_text("#version: 0.2\n")
    whole = PickScore(clip).score(IMAGES, PROMPTS)
    assert torch.equal(PickScore(bare, other).score(IMAGES, PROMPTS), whole)


def refused(judge: Callable[..., Judge], *args: Any) -> str:
    """The one line with which a judge is refused, when it is made or asked for a score."""
    with pytest.raises(UserError) as error:
        judge(*args).score(IMAGES[:1], PROMPTS[:1])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_files(tmp_path: Path):
    """What to download, and where it is published."""
    said = refused(CLIPScore, tmp_path)
    assert said.startswith(f"weights={tmp_path / 'config.json'}: must be an existing file, of ")
    assert "openai/clip-vit-large-patch14 at huggingface.co" in said
    assert "yuvalkirstain/PickScore_v1 at huggingface.co" in refused(PickScore, tmp_path)
    said = refused(AestheticScore, tmp_path / "no.pth", tmp_path)
    assert "no.pth: must be an existing file, sac+logos+ava1-l14-linearMSE.pth of github" in said
    said = refused(HPSv21, tmp_path / "no.pt")
    assert said.endswith("an existing file, HPS_v2.1_compressed.pt of xswu/HPSv2 at huggingface.co")
    head_file = tmp_path / "a.pth"
    head_file.touch()
    said = refused(AestheticScore, head_file, tmp_path)
    assert said.startswith(f"clip={tmp_path / 'config.json'}: ")


@pytest.mark.slow
def test_files_of_something_else(clip: Path, mlp: Path, hps: Path, tmp_path: Path):
    other = write_clip(tmp_path / "clip", embedding=64)
    said = refused(AestheticScore, mlp, other)
    assert said.endswith("of 768 numbers, as openai/clip-vit-large-patch14; these have 64")
    (other / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes())
    assert "2 tensors are missing, unknown or of another shape" in refused(CLIPScore, other)
    (other / "model.safetensors").write_bytes(b"<html>")
    assert "it cannot be read (SafetensorError" in refused(CLIPScore, other)
    (other / "config.json").write_text("{")
    assert "it cannot be read (" in refused(CLIPScore, other)
    torch.save({"layers.0.weight": torch.zeros(2)}, tmp_path / "a.pth")
    assert "10 tensors are missing, unknown" in refused(AestheticScore, tmp_path / "a.pth", clip)
    (tmp_path / "a.pth").write_text("<html>")
    for judge in (
        lambda: AestheticScore(tmp_path / "a.pth", clip),
        lambda: HPSv21(tmp_path / "a.pth", "tiny-hps"),
    ):
        assert "must be a whole checkpoint" in refused(judge)
    torch.save({}, tmp_path / "a.pth")
    assert 'a dict with the key "state_dict"' in refused(HPSv21, tmp_path / "a.pth", "tiny-hps")
    torch.save({"state_dict": {"logit_scale": 3}}, tmp_path / "a.pth")
    assert "tensors are missing, unknown" in refused(HPSv21, tmp_path / "a.pth", "tiny-hps")


@pytest.mark.slow
def test_bad_arguments(
    clip: Path, hps: Path, judges: dict[str, Judge], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="prompts=1: must be as many as the images, which are 3"):
        judges["CLIPScore"].score(IMAGES, PROMPTS[:1])
    with pytest.raises(UserError, match="device=gpu: must be a device of torch that is there"):
        CLIPScore(clip, device="gpu")
    with pytest.raises(UserError, match="device=cuda:99: must be a device of torch that is there"):
        HPSv21(hps, device="cuda:99")
    assert refused(HPSv21, hps, "ViT-H").endswith("a model of open_clip, such as ViT-H-14")
    for model in ("coca_ViT-B-32", "convnext_base", "roberta-ViT-B-32", "EVA02-B-16"):
        assert refused(HPSv21, hps, model).endswith("a plain CLIP of open_clip, such as ViT-H-14")
    for module, judge in {"transformers": (CLIPScore, clip), "open_clip": (HPSv21, hps)}.items():
        monkeypatch.setitem(sys.modules, module, None)
        assert "which cannot be imported" in refused(*judge)

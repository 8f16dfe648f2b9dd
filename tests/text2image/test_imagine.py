"""`lightning imagine`: an image depends on its prompt and seed alone, and none is made twice."""

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, loaded, quick
from conftest import images as random_images
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from w2s_train.cli import main
from w2s_train.errors import INTERRUPTED, PREEMPTED, Stopped, UserError
from w2s_train.signals import PREEMPTION, REQUESTS
from w2s_train.text2image import PromptScales, SegmentedGuidance
from w2s_train.text2image.distance import Distance
from w2s_train.text2image.evaluations import Evaluations
from w2s_train.text2image.folder import ModelFolder
from w2s_train.text2image.imagine import Imagine
from w2s_train.text2image.judge import Judge
from w2s_train.text2image.painter import Painter, Settings
from w2s_train.text2image.record import ImageRecord, Item
from w2s_train.text2image.sheet import HEAD, LABEL, read_image

CAT, DOG, OWL = "a red cat", "A dog: tall & blue", "eine Eule im Wald"
SMALL = {"steps": 2, "height": 16, "width": 16, "max_sequence_length": 16}
OVERLAYS = sorted(path.stem for path in (ROOT / "configs/text2image/guidance").glob("*.yaml"))


def cfg(**options: Any) -> Any:
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(**{"guidance_scale": 4.0} | options)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Nothing was asked for, and handlers are as before."""
    REQUESTS.reset()
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, *PREEMPTION)}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)
    REQUESTS.reset()


@pytest.fixture
def imagine(sd3_folder: Path, tmp_path: Path):
    """An `Imagine` of some prompts, in a folder of ``tmp_path``."""

    def make(*prompts: str, output: str = "images", **options: Any) -> Imagine:
        path = tmp_path / f"{output}.txt"
        path.write_text("\n".join(prompts))
        given = {"guidance": cfg(), "seeds": "0:2", "output": str(tmp_path / output)} | SMALL
        return Imagine(str(sd3_folder), str(path), **given | options)

    return make


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Prompts and seeds of the images that were made."""
    made = []
    paint = Painter.paint

    def counting(self: Painter, prompt: str, seed: int, settings: Settings) -> Any:
        made.append((prompt, seed))
        return paint(self, prompt, seed, settings)

    monkeypatch.setattr(Painter, "paint", counting)
    return made


def images(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.glob("*.png") if path.name != "sheet.png"]
    return {path.name: path.read_bytes() for path in files}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "imagine.json").read_text())


def test_an_image_depends_on_prompt_and_seed_alone(imagine, tmp_path: Path, painted: list):
    """Not on other prompts, their order, the number of processes or what was made before."""
    imagine(CAT, DOG, seeds="0:2")()
    alone = images(tmp_path / "images")
    assert len({*alone.values()}) == 4
    more = imagine(OWL, DOG, CAT, output="more", seeds="1:2")
    more(rank=1, world=2)
    assert not (tmp_path / "more" / "sheet.png").exists()
    assert [*images(tmp_path / "more")] == [Item(DOG, None, 1).file]
    more(rank=0, world=2)
    assert (tmp_path / "more" / "sheet.png").exists()
    others = images(tmp_path / "more")
    common = alone.keys() & others.keys()
    assert common == {Item(prompt, None, 1).file for prompt in (CAT, DOG)}
    assert all(alone[name] == others[name] for name in common)
    assert len(painted) == len({*painted}) + 2 == 7


STATUS = {signal.SIGTERM: PREEMPTED, signal.SIGINT: INTERRUPTED}


@pytest.mark.parametrize("number", quick(STATUS))
def test_a_stop_and_what_follows(
    imagine, tmp_path: Path, painted: list, monkeypatch, number: signal.Signals
):
    """The image at hand is finished; the next start makes the others, and what is missing."""
    add = Item.file.fget

    def asked(item: Item) -> str:
        if len(painted) == 2 and not REQUESTS.preempted and not REQUESTS.interrupted:
            os.kill(os.getpid(), number)
        return add(item)

    with monkeypatch.context() as patch:
        patch.setattr(Item, "file", property(asked))
        with pytest.raises(Stopped, match="2 of 4 images are there; the same command") as stop:
            imagine(CAT, DOG)()
    assert stop.value.status == STATUS[number] and len(painted) == 2
    there = images(tmp_path / "images")
    assert len(there) == len(record(tmp_path / "images")["images"]) == 2
    REQUESTS.reset()
    imagine(CAT, DOG)()
    assert painted == [(CAT, 0), (CAT, 1), (DOG, 0), (DOG, 1)]
    whole = images(tmp_path / "images")
    assert there.items() < whole.items()
    (tmp_path / "images" / Item(CAT, None, 1).file).unlink()
    imagine(OWL, DOG, CAT)()  # one is gone, and there is one more prompt
    assert painted[4:] == [(OWL, 0), (OWL, 1), (CAT, 1)]
    assert whole.items() < images(tmp_path / "images").items()
    assert len(record(tmp_path / "images")["images"]) == 6
    imagine(CAT)()
    assert len(painted) == 7


def test_another_protocol_is_refused(imagine, tmp_path: Path):
    """In one line, before the weights are read; nothing in the folder has changed."""
    first = imagine(CAT)
    first.record.begin(first.protocol(torch.device("cpu")))
    first.record.add(Item(CAT, None, 0), evaluations=4.0, seconds=1.0)
    before = (tmp_path / "images" / "imagine.json").read_bytes()
    path = tmp_path / "images" / "imagine.json"
    after = f"as in {path}; another --output begins other images"
    for options, line in {
        "steps": ({"steps": 3}, f"steps=3: must be 2, {after}"),
        "prompt": ({"negative_prompt": "ugly"}, f"negative_prompt=ugly: must be , {after}"),
        "scale": (
            {"guidance": cfg(guidance_scale=2.0)},
            "guidance=ClassifierFreeGuidance(guidance_scale=2.0): must be "
            f"ClassifierFreeGuidance(guidance_scale=4.0), {after}",
        ),
        "dtype": ({"dtype": "float32"}, f"dtype=float32: must be bfloat16, {after}"),
    }.values():
        with pytest.raises(UserError) as refused:
            imagine(CAT, **options)()
        assert str(refused.value) == line
    assert path.read_bytes() == before
    assert images(tmp_path / "images") == {}


def test_folders_of_something_else(imagine, tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(UserError, match="photos: must be new, empty, or a folder of `lightning"):
        imagine(CAT, output="photos")()
    (tmp_path / "old").mkdir()
    for content, reason in (("{}", "must be a record"), ('{"schema": 2}', "must be a record")):
        (tmp_path / "old" / "imagine.json").write_text(content)
        with pytest.raises(UserError, match=reason):
            imagine(CAT, output="old")()


def shared_half(skip: int, blocks: int = 6) -> float:
    """A weak pass that begins after a block that is left out, of as many."""
    return 1 + (blocks - skip - 1) / blocks


GUIDED = {  # evaluations of four steps, of which two are above the border
    "none": (lambda: cfg(guidance_scale=1.0), 4.0),
    "cfg": (cfg, 8.0),
    "cfg, half": (lambda: cfg(stop=0.5), 6.0),
    "segmented": (
        lambda: SegmentedGuidance(skip_layers=[2], border=None, switch=0.5),
        4.0 + 2 * shared_half(2),
    ),
    "slg": (
        lambda: SegmentedGuidance(skip_layers=[1], border=None, switch=0.0, share_prefix=False),
        4 * (1 + 5 / 6),
    ),
    "last block": (
        lambda: SegmentedGuidance(skip_layers=[5], border=None, switch=0.0),
        4.0,  # the weak pass has everything from the strong one
    ),
}


@pytest.mark.parametrize("name", quick(GUIDED, "cfg, half", "segmented"))
def test_evaluations(name: str, sd3_folder: Path):
    """In whole networks, by blocks; the guider is as before, and so is the network."""
    make, expected = GUIDED[name]
    guider = make()
    conditions = guider.num_conditions
    painter = _painter(sd3_folder, guider)
    settings = Settings(4, 16, 16, 16, "")
    first = painter.paint(CAT, 0, settings)
    assert first.evaluations == pytest.approx(expected)
    assert guider.num_conditions == conditions
    again = painter.paint(CAT, 0, settings)
    assert again.image.tobytes() == first.image.tobytes()


def _painter(folder: Path, guider: Any, **options: Any) -> Painter:
    given: dict[str, Any] = {"dtype": "float32", "device": torch.device("cpu"), "offload": None}
    return Painter(ModelFolder(folder), guider, **given | options)


def test_a_network_in_its_place_is_one_evaluation():
    inner = torch.nn.Linear(2, 2)
    count = Evaluations(inner)
    with count.counted():
        inner(torch.zeros(1, 2))
        inner(torch.zeros(1, 2))
    assert count.total() == 2
    inner(torch.zeros(1, 2))
    assert count.total() == 2


@pytest.mark.slow
def test_a_failure_leaves_no_hooks(sd3_folder: Path, monkeypatch):
    """Neither those of diffusers' guiders nor ours; the next image is what it would have been."""
    from diffusers.guiders import SkipLayerGuidance
    from diffusers.hooks import LayerSkipConfig

    ours = SegmentedGuidance(skip_layers=[2], border=None, switch=0.0)
    config = LayerSkipConfig(indices=[2], fqn="transformer_blocks", skip_attention=False)
    theirs = SkipLayerGuidance(
        skip_layer_config=config, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    )
    for guider, calls in ((ours, 2), (theirs, 5)):  # of the network; the last one is a weak one
        painter = _painter(sd3_folder, guider)
        settings = Settings(4, 16, 16, 16, "")
        expected = painter.paint(CAT, 0, settings).image
        seen = []

        def failing(*_: Any, calls: int = calls, seen: list = seen, painter=painter) -> None:
            seen.append([name for _, each in painter._registries() for name in each.hooks])
            if len(seen) == calls:
                raise KeyboardInterrupt

        inner = painter.network.transformer_blocks[5].ff.register_forward_pre_hook(failing)
        with pytest.raises(KeyboardInterrupt):
            painter.paint(CAT, 0, settings)
        inner.remove()
        assert seen[-1] == (["SkipLayerGuidance_0"] * 2 if guider is theirs else [])
        assert all(not registry.hooks for _, registry in painter._registries())
        assert "forward" not in vars(painter.network)
        assert painter.paint(CAT, 0, settings).image.tobytes() == expected.tobytes()


@pytest.mark.slow
def test_group_offload_changes_nothing(sd3_folder: Path):
    """Here from host memory to host memory; the weak pass leaves blocks out as before."""
    settings = Settings(3, 16, 16, 16, "")
    made = [
        _painter(sd3_folder, SegmentedGuidance(skip_layers=[2]), offload=offload).paint(
            CAT, 0, settings
        )
        for offload in (None, "group")
    ]
    assert made[0].image.tobytes() == made[1].image.tobytes()
    assert made[0].evaluations == made[1].evaluations


class Brightness(Judge):
    """Of the image, and the length of the prompt."""

    name = "brightness"

    def one(self, image: Image.Image, prompt: str) -> Tensor:
        return pil_to_tensor(image).float().mean() + 1000 * len(prompt)


@pytest.mark.slow
def test_scores_that_are_missing_are_added(imagine, tmp_path: Path, painted: list):
    weights = tmp_path / "weights"
    weights.write_text("1")
    imagine(CAT)()
    judged = imagine(CAT, DOG, scores=[Brightness(weights, "cpu")])
    judged()
    assert len(painted) == 4
    content = record(tmp_path / "images")
    assert [*content["judges"]] == ["brightness"]
    for entry in content["images"]:
        assert 0 < entry["scores"]["brightness"] - 1000 * len(entry["prompt"]) < 256
    judge = Brightness(weights, "cpu")
    judge.score = None  # type: ignore[assignment,method-assign]
    imagine(CAT, DOG, scores=[judge])()
    weights.write_text("2")
    with pytest.raises(UserError, match="scores=brightness: must come from weights "):
        imagine(CAT, DOG, scores=[Brightness(weights, "cpu")])()
    with pytest.raises(UserError, match="names of their own"):
        imagine(CAT, scores=[judge, judge])


def test_a_model_without_t5(sd3_folder: Path, tmp_path: Path):
    """Most of the memory of Stable Diffusion 3; diffusers takes zeros in its place."""
    copy = shutil.copytree(sd3_folder, tmp_path / "model")
    index = json.loads((copy / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        index[part] = [None, None]
        shutil.rmtree(copy / part)
    (copy / "model_index.json").write_text(json.dumps(index))
    made = _painter(copy, cfg()).paint(CAT, 0, Settings(2, 16, 16, 16, ""))
    whole = _painter(sd3_folder, cfg()).paint(CAT, 0, Settings(2, 16, 16, 16, ""))
    assert made.evaluations == whole.evaluations == 4
    assert made.image.tobytes() != whole.image.tobytes()


def test_a_start_without_an_image_claims_nothing(tmp_path: Path):
    """What was wrong may be put right in the same folder; so with a judge that has no score."""
    kept, item = ImageRecord(tmp_path / "images"), Item(CAT, None, 0)
    for steps in (1, 2):
        kept.begin({"steps": steps})
    kept.add(item, evaluations=1.0, seconds=1.0)
    with pytest.raises(UserError, match="^steps=3: must be 2, as in"):
        kept.begin({"steps": 3})
    for fingerprint in ("a", "b"):
        kept.judge("brightness", fingerprint)
    with pytest.raises(UserError, match="^scores=brightness: must be finite, is nan of a-red-cat"):
        kept.score(item, "brightness", math.nan)
    kept.score(item, "brightness", 1.0)
    with pytest.raises(UserError, match="must come from weights b, as in .*; these are c"):
        kept.judge("brightness", "c")


def test_a_record_of_many_images_is_written_now_and_then(tmp_path: Path, monkeypatch):
    """By time, and at the end of what holds it, by an exception, too; other processes' stay."""
    now = 0.0
    monkeypatch.setattr("w2s_train.text2image.record.time.monotonic", lambda: now)
    mine, other = ImageRecord(tmp_path / "images"), ImageRecord(tmp_path / "images")
    mine.begin({"steps": 1})
    mine._due = 5.0

    def there() -> list[int]:
        return [image["seed"] for image in record(tmp_path / "images")["images"]]

    with pytest.raises(KeyboardInterrupt), mine.held():
        for seed in range(3):
            mine.add(Item(CAT, None, seed), evaluations=1.0, seconds=1.0)
        assert there() == []
        other.add(Item(CAT, None, 9), evaluations=1.0, seconds=1.0)
        assert there() == [9]
        now = 5.0
        mine.score(Item(CAT, None, 1), "brightness", 2.0)
        assert there() == [9, 0, 1, 2]
        mine._due = 6.0
        mine.add(Item(CAT, None, 3), evaluations=1.0, seconds=1.0)
        raise KeyboardInterrupt
    assert there() == [9, 0, 1, 2, 3]
    scored = [image["scores"] for image in record(tmp_path / "images")["images"]]
    assert scored == [{}, {}, {"brightness": 2.0}, {}, {}]


def test_the_record_and_the_sheet(imagine, tmp_path: Path, monkeypatch, capfd):
    """Prompts are rows, seeds columns; each image is what it shows of that place."""
    monkeypatch.setattr("w2s_train.text2image.imagine.LINES", -1.0)
    run = imagine(CAT, DOG, seeds="3:6")
    run()
    out, err = capfd.readouterr()
    *lines, last = out.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"{i} of 6 images" for i in range(1, 7)]
    assert last == f"written: 6 images to {tmp_path / 'images'}" and "/2 [" not in err
    sheet = pil_to_tensor(Image.open(tmp_path / "images" / "sheet.png"))
    assert sheet.shape == (3, HEAD + 2 * 18 + 2, LABEL + 3 * 18 + 2)
    for row, prompt in enumerate((CAT, DOG)):
        for column in range(3):
            file = tmp_path / "images" / Item(prompt, None, 3 + column).file
            top, left = HEAD + 2 + 18 * row, LABEL + 2 + 18 * column
            part = sheet[:, top : top + 16, left : left + 16]
            assert (part.int() - pil_to_tensor(Image.open(file)).int()).abs().max() <= 1
    dark = sheet.amax(0) < 128
    rows = [dark[HEAD + 18 * row : HEAD + 18 * (row + 1), :LABEL].sum() for row in range(2)]
    assert dark[:HEAD, :LABEL].sum() == 0 < min(rows) and rows[0] != rows[1]
    assert dark[:HEAD, LABEL:].sum() > 0
    content = record(tmp_path / "images")
    assert [*content] == ["schema", "protocol", "judges", "images"] and content["schema"] == 1
    assert content["protocol"]["guidance"] == "ClassifierFreeGuidance(guidance_scale=4.0)"
    assert content["protocol"]["model"]["sha256"] == run.model.digest
    for entry in content["images"]:
        assert entry["evaluations"] == 4 and entry["seconds"] > 0
        assert entry["file"] == Item(entry["prompt"], None, entry["seed"]).file


def test_file_names():
    """Of words that any file system takes, and different for prompts that look alike."""
    assert Item(CAT, None, 3).file == "a-red-cat-ff966ff1-000003.png"
    assert Item("Кот", None, 12).file.count("-") == 1
    assert Item("A red, CAT!", None, 3).file != Item(CAT, None, 3).file
    assert len(Item("long " * 100, None, 0).file) < 64


def test_the_digest_is_of_weights_and_settings(sd3_folder: Path, tmp_path: Path):
    copy = shutil.copytree(sd3_folder, tmp_path / "model")
    before = ModelFolder(copy).digest
    assert before == ModelFolder(sd3_folder).digest
    (copy / "README.md").write_text("new")
    assert before == ModelFolder(copy).digest
    path = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert before != ModelFolder(copy).digest


def command(folder: Path, output: Path, *options: str, config: str = "sd35_medium") -> None:
    """Run it on the small pipeline."""
    prompts = output.parent / "prompts.txt"
    prompts.write_text(CAT)
    given = ["-c", str(ROOT / f"configs/text2image/{config}.yaml"), "--model", str(folder)]
    given += ["--prompts", str(prompts), "--output", str(output), "--seeds", "0:1"]
    small = [option for key, value in SMALL.items() for option in (f"--{key}", str(value))]
    main(["imagine", *given, *small, *options])


# What the small pipeline cannot have, or needs.
MORE = {
    "segmented": ["--guidance.init_args.skip_layers", "[2]"],
    "slg": ["--guidance.init_args.skip_layers", "[2]"],
}
TAKES = {"none": 2.0, "slg": 2 * shared_half(2), "segmented": 2 + shared_half(2)}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays(overlay: str, sd3_folder: Path, tmp_path: Path):
    """Each parses over a model's config, makes an image, and says what it is."""
    more = MORE.get(overlay, [])
    if overlay == "autoguidance":
        more = ["--guidance.init_args.weak", str(sd3_folder / "transformer")]
    if overlay == "learned":
        PromptScales(width=64).save(str(tmp_path / "scales.safetensors"))
        more = ["--guidance.init_args.path", str(tmp_path / "scales.safetensors")]
    path = ROOT / f"configs/text2image/guidance/{overlay}.yaml"
    command(sd3_folder, tmp_path / "images", "-c", str(path), *more)
    content = record(tmp_path / "images")
    assert content["images"][0]["evaluations"] == pytest.approx(TAKES.get(overlay, 4.0), abs=1e-4)
    print(content["protocol"]["guidance"])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["sd3_medium", "sd35_medium", "sd35_large"])
def test_configs_of_models(config: str, sd3_folder: Path, tmp_path: Path, capsys):
    """Each is whole but for what stands on the command line."""
    command(sd3_folder, tmp_path / "images", "--steps", "1", config=config)
    content = record(tmp_path / "images")
    assert content["images"][0]["evaluations"] == 2.0
    scale = {"sd3_medium": 7.0, "sd35_medium": 4.5, "sd35_large": 3.5}[config]
    assert content["protocol"]["guidance"] == f"ClassifierFreeGuidance(guidance_scale={scale})"
    assert "written: 1 images to" in capsys.readouterr().out


def test_no_blocks_are_shipped_for_the_large_model():
    large = yaml.safe_load((ROOT / "configs/text2image/sd35_large.yaml").read_text())
    assert "skip_layers" not in json.dumps(large)


CLIP = "w2s_train.text2image.clip_judges.CLIPScore"
HPS = "w2s_train.text2image.hps.HPSv21"
CLASS = "--guidance.class_path"
BAD = {
    "no model": (["--model", "nowhere"], ["model=nowhere: must be a folder", "hf download"]),
    "no pipeline": (["--model", str(ROOT / "docs")], ["model_index.json cannot be read"]),
    "no prompts": (["--prompts", "none.txt"], ["prompts=none.txt: must be an existing file"]),
    "seeds": (["--seeds", "4:0"], ["seeds=4:0: must be FIRST:LAST"]),
    "one seed": (["--seeds", "4"], ["seeds=4: must be FIRST:LAST"]),
    "steps": (["--steps", "0"], ["steps=0: must be at least 1"]),
    "size": (["--height", "18"], ["height=18: must be a multiple of 4 in [4, 32]"]),
    "large": (["--width", "1024"], ["width=1024: must be a multiple of 4 in [4, 32]"]),
    "tokens": (["--max_sequence_length", "0"], ["max_sequence_length=0: must be in [1, 512]"]),
    "blocks": (
        ["-c", str(ROOT / "configs/text2image/guidance/segmented.yaml")],
        ["skip_layers=[7, 8, 9]: must be below 6"],
    ),
    "guider": ([CLASS, "w2s_train.text2image.Segmented"], ["Segmented: there is no such class"]),
    "other class": ([CLASS, "w2s_train.weak.NullClass"], ["guidance"]),
    "strange class": ([CLASS, "os.system"], ["os.system", "allow_imports"]),
    "argument": (["--guidance.init_args.scale", "3"], ["scale"]),
    "value": (["--guidance.init_args.start", "2"], ["error: guidance: ", "`start`", "2"]),
    "our value": (
        ["-c", str(ROOT / "configs/text2image/guidance/segmented.yaml")]
        + ["--guidance.init_args.border", "2"],
        ["error: guidance.init_args.border=2.0: must be in [0, 1]"],
    ),
    "no weights of a score": (
        [f"--scores=[{{class_path: {CLIP}, init_args: {{weights: nowhere}}}}]"],
        ["error: weights=nowhere/config.json: must be an existing file"],
    ),
    "no head of a score": (
        [f"--scores=[{{class_path: {HPS}, init_args: {{weights: no.pt}}}}]"],
        ["error: scores[0].init_args.weights=no.pt: must be an existing file"],
    ),
    "dtype": (["--dtype", "int8"], ["dtype", "int8", "bfloat16"]),
    "device": (["--device", "gpu"], ["device=gpu: must be a device of torch"]),
    "no device to compute on": (["--device", "meta"], ["device=meta: must be a device that"]),
    "seeds of nobody": (["--seeds", f"{2**63}:{2**63 + 1}"], ["must be below 2^63"]),
    "shift": (
        ["-c", str(ROOT / "configs/text2image/guidance/tv_cfg.yaml")]
        + ["--guidance.init_args.shift", "2"],
        ["guidance.shift=2.0: must be 3.0, as the model's scheduler has"],
    ),
    "offload": (["--offload", "model"], ["offload=model: must be null where the device is"]),
    "key": (["--step", "3"], ["--step; keys are model, prompts, guidance"]),
    "trainer's key": (["--trainer.devices", "3"], ["--trainer.devices; keys are model"]),
    "config": (["-c", "none.yaml"], ["config=none.yaml: must be an existing file"]),
}


@pytest.mark.parametrize(
    "key", ["negative_prompt", "seeds", "output", "steps", "max_sequence_length", "dtype"]
)
def test_null_where_something_must_be_given(key: str, sd3_folder: Path, tmp_path: Path):
    """A negative prompt that is null would turn guidance off, the others break later."""
    config = tmp_path / "null.yaml"
    config.write_text(f"{key}: null\n")
    with pytest.raises(SystemExit) as stop:
        command(sd3_folder, tmp_path / "images", "-c", str(config))
    assert stop.value.code == f"error: {key}=null: must be given; see lightning imagine --help"
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, sd3_folder: Path, tmp_path: Path, monkeypatch):
    """One line each, before the weights are read."""
    monkeypatch.setattr("w2s_train.text2image.imagine.Painter", None)
    options, expected = BAD[name]
    with pytest.raises(SystemExit) as stop:
        command(sd3_folder, tmp_path / "images", *options)
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert all(word in message for word in expected), message
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("change", ["class", "part", "settings", "library"])
def test_folders_that_are_no_pipeline(change: str, sd3_folder: Path, tmp_path: Path):
    copy = shutil.copytree(sd3_folder, tmp_path / "model")
    index = copy / "model_index.json"
    if change == "class":
        index.write_text(index.read_text().replace("StableDiffusion3P", "StableDiffusionXLP"))
    elif change == "library":
        index.write_text(
            index.read_text().replace('"transformers",\n    "T5E', '"mine",\n    "T5E')
        )
    elif change == "part":
        shutil.rmtree(copy / "tokenizer_2")
    else:
        (copy / "vae" / "config.json").write_text("{}")
    line = {
        "class": "must hold a StableDiffusion3Pipeline; model_index.json has StableDiffusionXL",
        "library": "must have parts of diffusers and transformers alone; text_encoder_3 is of mine",
        "part": "must have tokenizer_2/",
        "settings": "must have whole settings, lacks 'block_out_channels'",
    }
    with pytest.raises(UserError, match=line[change]):
        ModelFolder(copy)


@pytest.mark.slow
def test_weights_that_are_missing(sd3_folder: Path, tmp_path: Path):
    copy = shutil.copytree(sd3_folder, tmp_path / "model")
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="must hold whole weights"):
        _painter(copy, cfg())


@pytest.mark.parametrize("launcher", ["alone", "torchrun", "slurm"])
def test_places_of_processes(launcher: str, monkeypatch):
    from w2s_train.command.imagine import _place

    for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC"))]:
        monkeypatch.delenv(name)
    given = {
        "alone": {},
        "torchrun": {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
        | {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"},
        "slurm": {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
        | {"SLURM_NTASKS_PER_NODE": "4", "SLURM_NODEID": "1", "SLURM_JOB_NAME": "imagine"}
        | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"},
    }[launcher]
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert [*_place()] == ([0, 1, 0] if launcher == "alone" else [5, 8, 1])


def test_a_broken_image_is_one_line(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16), "red").save(path)
    assert read_image(path).getpixel((3, 3)) == (255, 0, 0)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.png: .*; delete it, and it is made again$"):
        read_image(path)


@pytest.mark.slow
def test_distances_and_the_comparison_of_folders(
    imagine, sd3_folder: Path, tmp_path: Path, compare, monkeypatch: pytest.MonkeyPatch
):
    """A folder's distance is that of `score_folder`; `lightning compare` reads what is there."""
    from w2s_train.evaluation import folder as scoring
    from w2s_train.evaluation.reference import write_reference
    from w2s_train.features import ClassifierFeatures
    from w2s_train.features.classifiers import CIFAR10Classifier

    (tmp_path / "judge").write_text("1")
    network = CIFAR10Classifier()
    save_file(network.state_dict(), weights := tmp_path / "classifier.safetensors")
    features = loaded(ClassifierFeatures(str(weights), network, "toys"))
    reference = tmp_path / "reference.npz"
    write_reference(reference, features, random_images(50), dataset="toys", split="train")
    distances = [Distance(str(reference), features)]
    names = []
    for scale in (1.0, 3.0, 5.0):
        made = {"output": f"cfg_{scale:g}", "guidance": cfg(guidance_scale=scale)}
        made |= {"scores": [Brightness(tmp_path / "judge", "cpu")], "distances": distances}
        imagine(CAT, DOG, **made)()
        content = record(tmp_path / made["output"])
        found = scoring.score_folder(tmp_path / made["output"], reference, features)
        assert {k: v["value"] for k, v in content["distances"].items()} == pytest.approx(found)
        names += found
    about = {"network": {"class_path": "w2s_train.features.CIFAR10Classifier"}, "dataset": "toys"}
    about = {"init_args": about | {"weights": str(weights)}}
    about |= {"class_path": "w2s_train.features.ClassifierFeatures"}
    given = {"reference": str(reference), "features": about}
    given = {"class_path": "w2s_train.text2image.distance.Distance", "init_args": given}
    command(sd3_folder, tmp_path / "same", "--seeds", "0:2", "--distances", json.dumps([given]))
    assert [*record(tmp_path / "same")["distances"]] == names[:1]

    before = record(tmp_path / "cfg_5")["distances"]
    with monkeypatch.context() as patch:
        patch.setattr(Distance, "of", None)
        imagine(CAT, DOG, **made)()  # there is nothing to do
    imagine(CAT, DOG, OWL, **made)()
    after = record(tmp_path / "cfg_5")["distances"]
    assert before != after and {each["images"][0] for each in after.values()} == {"6"}

    with pytest.raises(UserError, match="was made with images 3x16x16, must be 3x16x24"):
        imagine(CAT, DOG, **made | {"width": 24, "output": "wide"})()
    assert not (tmp_path / "wide").exists()
    with pytest.raises(UserError, match=r"seeds=0:1: must be two images or more for distances"):
        imagine(CAT, **made, seeds="0:1")

    content, out = compare(*(tmp_path / f"cfg_{scale}" for scale in (1, 3, 5)))
    assert content["metric"] == "brightness" and content["images"] == 4
    assert [each["scale"] for each in content["sweep"]] == [1.0, 3.0, 5.0]
    evaluations = {arm["name"]: arm["evaluations"] for arm in content["arms"]}
    assert evaluations == {"cfg_1": 2.0, "cfg_3": 4.0, "cfg_5": 4.0}
    assert content["refused"] == [
        f"{names[0]}: is missing in cfg_5, or of other images or another reference"
    ]
    assert "cfg_5: 2 of 6 images are left out" in out

"""Scales of the network, chosen at sampling."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, perturbed
from PIL import Image
from refusals import parsers_built_once, refusal

from w2s_train.cli import main
from w2s_train.command.changes import check_drawn
from w2s_train.command.scales import with_scales
from w2s_train.errors import UserError
from w2s_train.guidance import Autoguidance, Choice, Guidance, Inbuilt, Unguided
from w2s_train.inbuilt import UniformScale
from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT, made_of
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler, EulerMaruyama, Heun, Sampler
from w2s_train.scores import grid_name, read_scores
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import EMA, NullClass

Y = torch.arange(4)
DRAWN = "--config=configs/weak/drawn.yaml"


def objective(*segments: Extrapolation) -> WeakToStrongObjective:
    return WeakToStrongObjective(LinearInterpolant(), Uniform(), list(segments))


def drawn(name: str, end: float, low: float = 0.0, high: float = 1.0) -> Extrapolation:
    source = NullClass() if name == "class" else EMA()
    return Extrapolation(low, high, UniformScale(high=end), source, name=name)


TRAINED = objective(drawn("slow", 0.75, 0.1), drawn("class", 0.5))


@pytest.fixture
def network() -> DiT:
    """With the inputs slow and class, in the order of segments by their start: class first."""
    sizes = dict(input_size=8, in_channels=1, hidden_size=32, depth=3, num_heads=2)
    made = DiT(**sizes, num_classes=4, scales=["class", "slow"])
    return perturbed(made).eval()


def sample(guidance: Guidance, network: DiT, sampler: Sampler) -> tuple[torch.Tensor, list]:
    """Samples, and what each pass of the network got: shapes, and the scales that it was told."""
    seen, noise = [], torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    hook = network.register_forward_pre_hook(
        lambda _, args, options: seen.append(([x.shape for x in args], options.get("scales"))),
        with_kwargs=True,
    )
    guidance.bind(network, TRAINED)
    torch.manual_seed(1)
    field = guidance.field(network, Y, sampler.times())
    made = sampler(field, noise, lambda: torch.randn_like(noise))
    hook.remove()
    return made, seen


SAMPLERS = [Euler(5), Heun(5), EulerMaruyama(LinearInterpolant(), 5)]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_pass_of_the_same_shape_and_nothing_at_scale_0(network: DiT, sampler: Sampler):
    plain, passes = sample(Unguided(), network, sampler)
    for scales in ({}, {"slow": Choice(0.0), "class": Choice(0.0, 0.2, 0.8)}):
        made, theirs = sample(Inbuilt(scales), network, sampler)
        assert torch.equal(made, plain)
    guided, ours = sample(Inbuilt({"slow": Choice(0.3, 0.1)}), network, sampler)
    assert [shapes for shapes, _ in ours] == [shapes for shapes, _ in passes]
    assert len(ours) == (9 if isinstance(sampler, Heun) else 5)
    assert (guided - plain).abs().max() > 1e-3


def test_what_the_network_is_told(network: DiT):
    """Decided where a step starts; a range has its start, not its end, but for t = 1."""
    choices = {"slow": Choice(0.3, 0.4, 1.0), "class": Choice(0.4, 0.0, 0.4)}
    _, euler = sample(Inbuilt(choices), network, Euler(5))
    told = [scales for _, scales in euler]
    assert all(scales.shape == (4, 2) for scales in told)
    expected = torch.tensor([[0, 0.3]] * 4 + [[0.4, 0]])  # at 1, 0.8, 0.6, 0.4 and 0.2
    assert torch.equal(torch.stack([scales[0] for scales in told]), expected)
    _, heun = sample(Inbuilt(choices), network, Heun(5))
    starts = [0, 0, 1, 1, 2, 2, 3, 3, 4]  # of both ends of a step
    assert torch.equal(torch.stack([scales[0] for _, scales in heun]), expected[starts])
    below = Inbuilt({"slow": Choice(0.3, 0.4, 0.8)})
    _, euler = sample(below, network, Euler(5))
    assert [float(scales[0, 1] > 0) for _, scales in euler] == [0, 0, 1, 1, 0]
    assert below.describe() == "inbuilt(slow 0.3 [0.4, 0.8))"
    assert Inbuilt({"slow": Choice(0.0)}).describe() == "inbuilt(all 0)"


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"head": (0.3,)}, "scales=head: must be inputs of the network; it has class, slow"),
        ({"slow": (0.8, 0.1)}, r"scales.slow.scale=0.8: must be in \[0, 0.75\]"),
        ({"slow": (0.3,)}, r"scales.slow.low=0.0, high=1.0: must be in \[0.1, 1\]"),
        (
            {"slow": (0.3, 0.2), "class": (0.3,)},
            "scales.slow.scale=0.3, scales.class.scale=0.3: must sum to what is in "
            r"\[0, 0.5\], as it was trained; it is 0.6 at t=0.2",
        ),
        ({"slow": (1.0,)}, r"scale=1.0: must be in \[0, 1\)"),
        ({"slow": (-0.1,)}, r"scale=-0.1: must be in \[0, 1\)"),
        ({"slow": (float("nan"),)}, r"scale=nan: must be in \[0, 1\)"),
        ({"slow": (0.3, 0.8, 0.2)}, "low=0.8, high=0.2: must be 0 <= low <= high <= 1"),
    ],
)
def test_choices_that_cannot_be(network: DiT, scales: dict, message: str):
    with pytest.raises(UserError, match=f"^{message}") as error:
        Inbuilt({name: Choice(*numbers) for name, numbers in scales.items()}).bind(network, TRAINED)
    assert "\n" not in str(error.value)


def test_what_is_left_where_another_range_ends_was_trained(network: DiT):
    """Together 0.25 is inside both laws; from 0.4 on the second is alone, below its own."""
    law = UniformScale(0.1, 0.6, plain=0.2)
    trained = objective(drawn("class", 0.75), Extrapolation(0.0, 0.9, law, EMA(), name="slow"))
    with pytest.raises(
        UserError, match=r"^scales.slow.scale=0.05: must be in \[0.1, 0.6\].*t=0.4$"
    ):
        both = {"class": Choice(0.2, 0.15, 0.4), "slow": Choice(0.05, 0.2, 0.55)}
        Inbuilt(both).bind(network, trained)
    Inbuilt({"class": 0.2, "slow": Choice(0.1, 0.2, 0.55)}).bind(network, trained)  # a number, too


def test_a_law_that_never_trains_scale_0_is_warned_about():
    with pytest.warns(UserWarning, match="low=0.1, plain=0.0: scale 0 is never trained so"):
        UniformScale(0.1, 0.6, plain=0.0)


def test_a_sum_counts_where_both_act(network: DiT):
    """Each alone may be as strong as it was trained."""
    Inbuilt({"slow": Choice(0.75, 0.5), "class": Choice(0.5, 0.0, 0.5)}).bind(network, TRAINED)
    Inbuilt({"slow": Choice(0.3, 0.1), "class": Choice(0.2)}).bind(network, TRAINED)
    unknown = objective()  # of an exported network, nobody knows what was drawn
    Inbuilt({"slow": Choice(0.6), "class": Choice(0.3)}).bind(network, unknown)
    with pytest.raises(UserError, match=r"must sum to what is in \[0, 1\); it is 1 at t=0"):
        Inbuilt({"slow": Choice(0.6), "class": Choice(0.4)}).bind(network, unknown)


def test_a_scale_below_what_was_drawn(network: DiT):
    """A lone one; others may have taken the rest of the total."""
    law = Extrapolation(0, 1, UniformScale(0.3, 0.6, plain=0), NullClass(), name="class")
    run = objective(law, drawn("slow", 0.75))
    with pytest.raises(UserError, match=r"scales.class.scale=0.1: must be in \[0.3, 0.6\]"):
        Inbuilt({"class": Choice(0.1)}).bind(network, run)
    Inbuilt({"class": Choice(0.1), "slow": Choice(0.3)}).bind(network, objective(law))


def test_one_setting_has_one_name(network: DiT):
    """Whatever the order of the options; and a range without length does not act."""
    pairs = [("slow", Choice(0.3, 0.1)), ("class", Choice(0.2))]
    one, other = (Inbuilt(dict(order)) for order in (pairs, pairs[::-1]))
    for each in (one, other):
        each.bind(network, TRAINED)
    assert one.describe() == other.describe() == "inbuilt(class 0.2 [0, 1), slow 0.3 [0.1, 1))"
    assert Choice(0.5, 1.0, 1.0).at(1.0) == 0.0 and Choice(0.5, 0.9, 1.0).at(1.0) == 0.5


def test_autoguidance_takes_no_overlapping_segments(network: DiT):
    with pytest.raises(UserError, match="weak=None: must be given, since the objective's segments"):
        Autoguidance(1.5).bind(network, objective(drawn("class", 0.5), drawn("slow", 0.75)))


def test_weights_of_scales_in_another_order(network: DiT):
    """By their places they would fit, and mean something else."""
    ours = DiffusionModule(network, objective(drawn("class", 0.5), drawn("slow", 0.75)), Euler(2))
    progress = {"images_seen": 5} | ours.clock.state_dict()
    checkpoint = {"global_step": 3, "progress": progress, "network": made_of(network)}
    ours.on_load_checkpoint(checkpoint)
    assert ours.images_seen == 5
    for names in (["slow", "class"], ["class", "late"]):
        checkpoint["network"]["init_args"]["scales"] = names
        with pytest.raises(UserError, match=r"network.scales=\['class', 'slow'\]: must be \['"):
            ours.on_load_checkpoint(checkpoint)


def test_laws_are_those_of_the_checkpoint():
    """By the names of segments, wherever they stand; what has no drawn scale may differ."""
    law = {"class_path": "w2s_train.inbuilt.UniformScale", "init_args": {"high": 0.75}}
    other = {"class_path": "w2s_train.inbuilt.UniformScale", "init_args": {"high": 0.8}}

    def settings(*segments: dict) -> dict:
        parts = [
            {"class_path": "w2s_train.segment.Extrapolation", "init_args": s} for s in segments
        ]
        return {"objective": {"init_args": {"segments": parts}}}

    head, null = dict(name="head", low=0.2, scale=law), dict(low=0.0, scale=law)
    fixed = dict(name="slow", low=0.1, scale=0.3)
    before = settings(head, null, fixed)
    check_drawn(before, before, "x.ckpt")
    check_drawn(before, settings(head, null, fixed | {"low": 0.5}), "x.ckpt")
    check_drawn(settings(fixed, head), settings(head, fixed), "x.ckpt")
    check_drawn({"objective": {}}, before, "x.ckpt")  # weights from elsewhere
    place = "model.objective.init_args.segments"
    for changed, message in (
        ((head | {"scale": other}, null), "[0].init_args.scale.init_args.high=0.8: must be 0.75"),
        ((head, null | {"low": 0.1}), "[1].init_args.low=0.1: must be 0.0"),
    ):
        with pytest.raises(UserError) as error:
            check_drawn(before, settings(*changed), "x.ckpt")
        assert str(error.value) == f"{place}{message}, as in x.ckpt"


def test_options_become_a_guidance():
    line = "sample --scale head=0.6:0.2-1 --scale 4 --seeds 0:4 --scale=class=.5".split()
    *kept, guidance = with_scales(line)
    assert kept == ["sample", "--scale=4", "--seeds", "0:4"]
    chosen = {
        "head": dict(scale=0.6, low=0.2, high=1.0),
        "class": dict(scale=0.5, low=0.0, high=1.0),
    }
    made = {"class_path": "w2s_train.guidance.Inbuilt", "init_args": {"scales": chosen}}
    assert json.loads(guidance.removeprefix("--model.guidance=")) == made
    for same in (["fit", "--scale", "head=0.3"], ["sample", "--scale", "-1"], ["validate"]):
        assert [word for each in with_scales(same) for word in each.split("=", 1)] == [
            word for each in same for word in each.split("=", 1)
        ]


@pytest.mark.parametrize(
    "text",
    [
        "head",
        "head=",
        "=0.3",
        "head=x",
        "head=-0.1",
        "head=nan",
        "head=3e-1",
        "head=0.3:0.2",
        "0=1",
        "h=1:0.2-",
        "",
    ],
)
def test_text_that_is_no_choice(text: str):
    message = (
        f"scale={text}: must be NAME=SCALE or NAME=SCALE:LOW-HIGH, in plain decimals from 0 on"
    )
    message += ", such as head=0.6:0.2-1"
    for line in (["sample", "--scale", text], ["validate", f"--scale={text}"]):
        with pytest.raises(UserError) as error:
            with_scales(line)
        assert str(error.value) == message
    with pytest.raises(UserError, match="scale=4: must be NAME=SCALE or"):
        with_scales(["validate", "--scale", "4"])
    with pytest.raises(UserError, match="--model.guidance: must be left out with --scale"):
        with_scales(["sample", "--scale", "a=0.1", "--model.guidance", "x"])
    for ends in ("0.8-0.2", "0.5-0.5", "0-1.5"):
        with pytest.raises(UserError, match=rf"^scale=a=0.1:{ends}: must have 0 <= LOW < HIGH"):
            with_scales(["sample", f"--scale=a=0.1:{ends}"])
    for option in ("-cconfigs/guidance/cfg.yaml", "--config=configs/inbuilt/mg.yaml"):
        with pytest.raises(UserError, match=r"^config=configs/.*: must be without model.guidance"):
            with_scales(["sample", option, "--scale=a=0.1"])
    with pytest.raises(UserError, match="scale=a=0.2: a stands twice, must stand once"):
        with_scales(["sample", "--scale", "a=0.1", "--scale", "a=0.2"])


@pytest.mark.parametrize("options", [["--scale", "head=0.3"], ["-c", "configs/inbuilt/plain.yaml"]])
def test_a_run_that_draws_none(tmp_path: Path, options: list[str]):
    """Refused when nothing but the network is built."""
    torch.save({"state_dict": {}}, tmp_path / "lone.ckpt")
    name = "head" if "--scale" in options else "all 0"
    assert refusal(
        tmp_path / "run", f"--ckpt_path={tmp_path / 'lone.ckpt'}", *options, name="validate"
    ) == (
        f"error: scales={name}: must be inputs of the network; it has none, as without "
        "configs/weak/drawn.yaml"
    )


def test_the_overlay_of_all_has_every_other_one():
    files = (ROOT / "configs" / "inbuilt").glob("*.yaml")
    stated = {path.stem: yaml.safe_load(path.read_text())["model"]["guidance"] for path in files}
    plain, *every = stated.pop("every")
    assert plain == {"class_path": "w2s_train.guidance.Unguided"}
    assert stated.pop("plain")["init_args"]["scales"] == {}
    for name, other in stated.items():
        assert other in every, name
        weak = yaml.safe_load((ROOT / "configs" / "weak" / f"{name}.yaml").read_text())
        segments = weak["model"]["objective"]["init_args"]["segments"]
        kinds = {"IntermediateHead": "head", "NullClass": "class"}
        trained = {
            kinds[s["weak"]["class_path"].rpartition(".")[2]]: {
                k: s[k] for k in Choice.__annotations__
            }
            for s in (segment["init_args"] for segment in segments)
        }
        assert other["init_args"]["scales"] == trained, name
    assert len(every) == len(stated)


# ---- by the command --------------------------------------------------------------------------


@pytest.fixture
def run(fits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a few steps with configs/weak/drawn.yaml."""
    monkeypatch.chdir(ROOT)
    made = fits(DRAWN, "--model.ema_decay=0.5", "--model.optimizer.init_args.lr=0.05")
    with parsers_built_once():
        yield shutil.copytree(made, tmp_path / "run", symlinks=True)


@pytest.mark.slow
def test_sample_says_what_was_chosen(run: Path, tmp_path: Path, capsys):
    """As the module samples; every form has a record, and folders are scored past it."""
    module = DiffusionModule.load_from_checkpoint(str(run / "checkpoints" / "last.ckpt")).eval()
    guidance = Inbuilt({"head": Choice(0.6, 0.2), "class": Choice(0.5, 0.0, 0.2)})
    guidance.bind(module.network, module.objective)
    plain = module.generate([0, 1, 2], [3, 3, 3])
    module.guidances = [guidance]
    expected = module.generate([0, 1, 2], [3, 3, 3])
    assert not torch.equal(plain, expected)
    options = [f"--ckpt_path={run}", "--seeds=0:3", "--classes=3"]
    options += ["--scale", "class=0.5:0-0.2", "--scale=head=0.6:0.2-1"]
    main(["sample", *options, f"--output={tmp_path / 'images'}"])
    for seed, image in enumerate(expected):
        written = Image.open(tmp_path / "images" / f"{seed:06d}-3.png")
        assert np.array_equal(np.array(written), image[0])
    grid = ["--format=grid", "--scale", "2", f"--output={tmp_path / 'grid.png'}"]
    main(["sample", *options, *grid])
    assert np.array(Image.open(tmp_path / "grid.png")).shape[0] == 16 + 2 * 2
    for record in ("images/sampling.json", "grid.png.json"):
        about = json.loads((tmp_path / record).read_text())
        how = "inbuilt(head 0.6 [0.2, 1), class 0.5 [0, 0.2))"
        assert (about["guidance"], about["step"], about["seeds"]) == (how, 6, [0, 2])
        assert (about["weights"], about["classes"], about["sampler"]) == ("ema", [3], "Euler")
    over = ["--config=configs/inbuilt/sgg_paper.yaml", "--scale=class=0.3", *options[1:3]]
    with pytest.raises(SystemExit, match="^error: config=.*sgg_paper.yaml: must be without model"):
        main(["sample", *over, f"--ckpt_path={run}", f"--output={tmp_path / 'no'}"])
    over = ["--scale=class=0.3", *options[1:3], "--ckpt_path=last"]
    over += [f"--trainer.default_root_dir={run}", f"--output={tmp_path / 'over'}"]
    main(["sample", f"--config={run / 'config.yaml'}", *over])
    about = json.loads((tmp_path / "over" / "sampling.json").read_text())
    assert about["guidance"] == "inbuilt(class 0.3 [0, 1))"
    with pytest.raises(SystemExit, match="^error: scales=other: must be inputs .* head, class$"):
        main(["sample", *options, "--scale", "other=0.2", f"--output={tmp_path / 'no'}"])
    with pytest.raises(SystemExit, match=r"^error: scales.class.scale=0.5, .* it is 1.1 at t=0.2"):
        over = ["--scale=class=0.5", "--scale=head=0.6:0.2-1", f"--output={tmp_path / 'no'}"]
        main(["sample", f"--ckpt_path={run}", *over])
    assert not (tmp_path / "no").exists()
    other = tmp_path / "other.yaml"
    other.write_text((run / "config.yaml").read_text().replace("high: 0.75", "high: 0.8"))
    with pytest.raises(SystemExit, match=r"scale.init_args.high=0.8: must be 0.75, as in .*ckpt$"):
        over = [f"--config={other}", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
        main(["validate", *over, "--scale=head=0.78"])


@pytest.mark.slow
def test_settings_have_scores_grids_and_arms_of_their_own(run: Path, compare, tmp_path: Path):
    before = (run / "grids" / grid_name(6)).read_bytes()
    plain = read_scores(run)
    assert {score.guidance for score in plain} == {"none"}
    validate = ["validate", f"--ckpt_path={run}", "--config"]  # the run's own config comes first
    main([*validate, "configs/inbuilt/head_above.yaml"])
    head = "inbuilt(head 0.6 [0.2, 1))"
    assert [read_scores(run)[-1].guidance, read_scores(run)[-1].step] == [head, 6]
    named = run / "grids" / "step-000006-ema-inbuilt-head-0.6-0.2-1.png"
    assert (run / "grids" / grid_name(6)).read_bytes() == before != named.read_bytes()
    column = f"val/fd_digits (ema, {head}, 0)"
    assert column in next(csv.reader((run / "metrics.csv").open()))
    main([*validate, "configs/inbuilt/every.yaml"])
    found, printed = compare(run, "--settings")
    assert found["baseline"] == "run: unguided" and found["protocol"]["guidance"] == "of each arm"
    values = {arm["name"]: arm["mean"] for arm in found["arms"]}
    theirs = {score.guidance: score.value for score in read_scores(run) if score.step == 6}
    assert len(values) == len(theirs) == 6
    assert values["run: head 0.6 [0.2, 1)"] == theirs[head] != values["run: unguided"]
    assert found["differences"]["guidance"]["run: head 0.6 [0.2, 1)"] == head
    assert all(arm["verdict"].startswith("inconclusive: one seed") for arm in found["arms"][1:])
    assert {(arm["seconds_per_step"], arm["time_ratio"]) for arm in found["arms"]} == {
        (found["arms"][0]["seconds_per_step"], 1.0)
    }
    assert all(arm["equal_wall_clock"] for arm in found["arms"]) and found["notes"] == []
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<img") == 6 and "run: class 0.5 [0, 1)" in page.replace("<wbr>", "")
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/fd_digits"] or row[column]]
    assert [float(row["val/fd_digits"]) for row in rows if row["val/fd_digits"]] == [
        *(score.value for score in plain),
        plain[-1].value,
    ]
    assert {float(row[column]) for row in rows if row[column]} == {theirs[head]}

"""Weak sources that only look on see what there is to see, and change nothing."""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, perturbed, quick, sources
from test_ddp import BAD
from test_resume import checkpoint, equal
from test_weak import SOURCES
from torch import nn

from w2s_train.datamodule import ShardDataModule
from w2s_train.errors import UserError
from w2s_train.guideability.ratio import finish
from w2s_train.inbuilt import UniformScale
from w2s_train.interpolant import LinearInterpolant
from w2s_train.log import Log
from w2s_train.look_on import LookOn, look_on
from w2s_train.models import DiT, WeightAverage
from w2s_train.objective import WeakToStrongObjective
from w2s_train.running.guard import Guard
from w2s_train.segment import Extrapolation, Segment
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step, WeakSource

OVERLAY = ("-c", "configs/weak/look_on.yaml")


def small(*segments: Segment) -> tuple[WeakToStrongObjective, DiT]:
    """Alike whatever segments there are."""
    torch.manual_seed(1)
    network = DiT(input_size=8, in_channels=3, hidden_size=32, depth=4, num_heads=4, num_classes=5)
    perturbed(network)
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), [*segments])
    objective.bind(network, 0.1)
    objective.plan(20)
    return objective, network


def train(
    objective: WeakToStrongObjective, network: DiT, steps: int = 3, bad: int | None = None
) -> tuple[list, Log]:
    """What a few steps leave, drawn from one sequence of numbers; and what they log."""
    torch.manual_seed(2)
    left, average, log = [], WeightAverage(network, 0.5), Log()
    everything = [p for p in [*network.parameters(), *objective.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(everything, lr=0.01)
    for number in range(steps):
        x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 6
        for _ in range(2):  # accumulated
            loss = objective(network, x, y, Step(number, average.module), log).mean()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(everything, 0.5)
        if good := number != bad:
            optimizer.step()
        optimizer.zero_grad()
        average.update(network, good)
        log.commit(good)
        objective.after_step(network, Step(number + 1, average.module, 0.01, good))
        left += [loss.detach(), norm, torch.get_rng_state(), torch.initial_seed()]
    return [*left, network.state_dict(), average.state_dict()], log


def acting(kind: str) -> list[Segment]:
    """Segments of the run that is looked on at."""
    if kind == "none":
        return []
    scale = 0.3 if kind == "fixed" else UniformScale(0.1, 0.7, plain=0.25)
    return [Extrapolation(0.2, 1.0, scale, sources.IntermediateHead(), name="acts")]


CASES = [(name, kind) for kind in ("fixed", "drawn", "none") for name in SOURCES]
FEW = ("head", "null_class", "lagging_ema", "snapshot", "co_trained", "random_blocks")
CASES = quick(CASES, *(case for case in CASES if case[0] in FEW and case[1] == "fixed"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_it_changes_no_bit(case: tuple[str, str]):
    """Weights, averages, losses, the clipped norm and what is drawn; with a step that is bad."""
    name, kind = case
    steps = 6 if "ema" in name else 3  # a lagging one is not ready before
    without, log = train(*small(*acting(kind)), steps, bad=0)
    looker = LookOn(0.0, 1.0, SOURCES[name](), share=0.7, name="looks")
    with_it, more = train(*small(looker, *acting(kind)), steps, bad=0)
    assert equal(without, with_it)
    before, after = (finish(each.read(lambda x, op: x)) for each in (log, more))
    assert {key: value for key, value in after.items() if not key.startswith("looks/")} == before
    assert "looks/guideability" in after


@pytest.mark.parametrize("name", ["null_class", "layer_skip", "checkpoint", "ema"])
def test_it_sees_what_a_segment_of_scale_zero_does(name: str):
    """Which does not move the target either."""
    found = []
    for kind in (LookOn, Extrapolation):
        torch.manual_seed(0)
        options = dict(share=1.0) if kind is LookOn else dict(scale=0.0)
        segment = kind(0.2, 0.9, weak=SOURCES[name](), name="it", **options)
        _, log = train(*small(segment))
        found.append(finish(log.read(lambda x, op: x)))
    looked = {key: value for key, value in found[0].items() if key.startswith("it/")}
    assert looked == {key: found[1][key] for key in looked}
    assert len(looked) > 15


@pytest.mark.parametrize("share, looks", [(0.1, 10), (0.3, 30), (1.0, 100)])
def test_it_looks_at_a_share_of_the_steps(share: float, looks: int):
    segment = LookOn(0.0, 1.0, sources.NullClass(), share=share)
    steps = [n for n in range(100) if segment.looks(Step(n))]
    assert len(steps) == looks
    assert {b - a for a, b in zip(steps, steps[1:], strict=False)} <= {
        100 // looks,
        100 // looks + 1,
    }


def test_a_head_learns_on_tokens_without_gradients():
    """At every step, also where it does not look; not where a step is bad."""
    segment = LookOn(0.0, 1.0, sources.IntermediateHead(), share=0.01)
    objective, network = small(segment)
    state = {k: v.clone() for k, v in segment.state_dict().items() if "head" in k}
    train(objective, network, steps=1, bad=0)
    assert all(torch.equal(segment.state_dict()[key], value) for key, value in state.items())
    train(objective, network, steps=2)
    moved = segment.state_dict()
    assert not [key for key, value in state.items() if torch.equal(moved[key], value)]
    assert [p for p in segment.parameters() if p.requires_grad] == []


def test_a_head_learns_as_well_as_on_a_fixed_network():
    """Its loss falls to that of a head that is trained on the same tokens as usual."""
    segment = LookOn(0.0, 1.0, sources.IntermediateHead(block=1))
    objective, network = small(segment)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 5
    torch.manual_seed(0)
    noisy = objective.draw(x)
    out = network(noisy.x_t, noisy.t, y, keep_hidden=[1])
    usual = network.make_head()
    usual.load_state_dict(segment.weak.source.head.state_dict())
    optimizer = torch.optim.AdamW(usual.parameters(), lr=0.01, weight_decay=0.0)
    objective.draw = lambda x: noisy  # type: ignore[method-assign]
    for number in range(10):
        loss = (usual(out.hidden[1].data, out.cond.data) - noisy.v).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective(network, x, y, Step(number), Log())
        objective.after_step(network, Step(number + 1, lr=0.01))
    for mine, theirs in zip(segment.weak.source.head.parameters(), usual.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_with_drawn_scales_it_looks_on_at_scale_zero():
    """A network that heeds its scales, looked at as if there were none."""
    looker = LookOn(0.0, 1.0, sources.LayerSkip([1]), share=1.0, name="looks")
    objective, network = small(looker, *acting("drawn"))
    for parameter in network.parameters():  # the embedding of scales begins at zero
        parameter.data += 0.1
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 5
    torch.manual_seed(0)
    noisy, log = objective.draw(x), Log()
    objective.draw = lambda x: noisy  # type: ignore[method-assign]
    objective(network, x, y, Step(), log)
    log.commit()
    found = finish(log.read(lambda x, op: x))["looks/guideability"]
    with torch.no_grad():
        strong = network(noisy.x_t, noisy.t, y).velocity
        d = strong - network(noisy.x_t, noisy.t, y, skip_blocks=[1]).velocity
    assert found == pytest.approx(((d * (noisy.v - strong)).sum() / d.square().sum()).item(), 1e-4)


class Counting(nn.Module):
    """A network with a state that every pass in training mode changes."""

    null_class = 5

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x_t, t, y):
        given = (y == self.null_class).view(-1, 1, 1, 1)
        velocity = self.linear(self.norm(x_t)) + 0.1 * given
        return type("Output", (), {"velocity": velocity})


def test_it_leaves_no_trace_in_a_network_that_counts():
    states = []
    for segments in ([], [LookOn(0.0, 1.0, sources.NullClass(), share=1.0)]):
        torch.manual_seed(0)
        network = Counting()
        objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), segments)
        objective.bind(network, 0.1)
        x, y = torch.randn(12, 3, 8, 8), torch.arange(12) % 5
        objective(network, x, y, Step(), Log())
        if segments:
            look_on(objective, network, x, y, Step(), Log())
        states.append(network.state_dict())
    assert equal(*states) and network.training


class Late(WeakSource):
    """Cannot predict yet."""

    ready = False  # type: ignore[assignment]

    def predict(self, network, noisy, y, strong):
        raise AssertionError


def test_it_waits_until_the_source_can_predict():
    segment = LookOn(0.0, 1.0, Late(), share=1.0)
    assert not segment.looks(Step(99))
    _, log = train(*small(segment))
    assert not [key for key in log.read(lambda x, op: x) if "t_0-1" in key]


# ---- held-out rows ----------------------------------------------------------------------------


def data(**options: object) -> ShardDataModule:
    given = dict(train_urls="data/digits/train-*.tar", num_classes=10, batch_size=8, num_workers=0)
    return ShardDataModule(**(given | options))


@pytest.fixture
def at_home(digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    "urls, message",
    [
        ("data/digits/train-000003.tar", "must not be trained on"),
        ("data/digits/none-*.tar", "held_out_urls=data/digits/none-"),
    ],
)
def test_shards_that_cannot_be_held_out(at_home, urls: str, message: str):
    with pytest.raises(UserError, match=message):
        data(held_out_urls=urls).held_out()


def test_labels_of_held_out_rows_are_checked(at_home):
    with pytest.raises(UserError, match=r"label=\d: must be in \[0, 2\]"):
        data(held_out_urls="data/digits/heldout-*.tar", num_classes=3).held_out()


def test_held_out_rows_come_by_position(at_home):
    """In memory or not; every sample once an epoch, none of them mirrored."""
    assert data().held_out() is None
    found = [
        data(held_out_urls="data/digits/heldout-*.tar", in_memory=kept, flip=True).held_out()
        for kept in (True, False)
    ]
    n = found[0].order.samples
    assert n == 300
    images = [each[range(0, n)]["image"] for each in found]
    assert torch.equal(*images)
    assert torch.equal(
        found[0][range(n + 5, n + 9)]["image"], found[1][range(n + 5, n + 9)]["image"]
    )
    rows = sorted(map(bytes, images[0].flatten(1).numpy()))
    again = sorted(map(bytes, found[0][range(n, 2 * n)]["image"].flatten(1).numpy()))
    assert rows == again


# ---- the command ------------------------------------------------------------------------------

LONGER = ["--trainer.max_steps=20", "--model.objective.init_args.total_steps=20"]
LONGER += ["--trainer.val_check_interval=100", "--data.num_generated=8"]
LONGER += ["--trainer.log_every_n_steps=10", "--checkpoint.every_n_train_steps=15"]
LONGER += ["--trainer.gradient_clip_val=0.5", "--data.flip=true"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
PLACES = ("seconds", "time", "memory", "per_", "share")


def metrics(folder: Path) -> dict[tuple[str, str], str]:
    """By step and name; but for those that a clock is read for."""
    table = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return {
        (row["step"], name): value
        for row in table
        for name, value in row.items()
        if value and not any(part in name for part in ("step", "perf", *PLACES))
    }


def seen(folder: Path) -> dict[tuple[str, str], str]:
    """What was looked on at."""
    return {
        k: v for k, v in metrics(folder).items() if k[1].split("/")[1] in ("head", "class", "ema")
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", quick(["one", "accumulated", "two"], "one"))
def test_a_run_with_it_is_the_run_without(
    command: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, case: str
):
    """Clipped, with a bad step, accumulated, on two processes: in all that is saved and logged."""
    judge = Guard.judge

    def judged(self, trainer, *numbers):  # noqa: ANN002
        return judge(self, trainer, *numbers) and trainer.global_step != BAD

    monkeypatch.setattr(Guard, "judge", judged)
    more = {"accumulated": ["--trainer.accumulate_grad_batches=2"], "two": TWO}.get(case, [])
    nothing = ("-c", "configs/weak/none.yaml")
    none, looks = (
        command("fit", *overlay, *LONGER, *more, folder=overlay[1][-9:-5])
        for overlay in (nothing, OVERLAY)
    )
    before, after = checkpoint(none), checkpoint(looks)
    for name, value in before["state_dict"].items():
        assert equal(value, after["state_dict"][name]), name
    assert equal(before["optimizer_states"], after["optimizer_states"])
    logged, found = metrics(none), seen(looks)
    assert {k: v for k, v in metrics(looks).items() if k not in found} == logged
    assert (looks / "guideability.png").is_file() and not (none / "guideability.png").exists()
    for source in ("head", "class", "ema"):
        for place in ("train", "held_out"):
            assert ("20", f"{place}/{source}/guideability") in found


@pytest.mark.slow
@pytest.mark.parametrize("more", [pytest.param([], marks=pytest.mark.long), TWO])
def test_it_goes_on_where_it_was(command: Callable[..., Path], tmp_path: Path, more: list[str]):
    """Bit for bit, what it learns and what it sees included."""
    whole = command("fit", *OVERLAY, *LONGER, *more, folder="whole")
    command("fit", *OVERLAY, *LONGER, *more, "--trainer.max_steps=10", folder="part")
    last = f"--ckpt_path={tmp_path}/part/checkpoints/last.ckpt"
    part = command("fit", *OVERLAY, *LONGER, *more, last, folder="resumed")
    assert equal(checkpoint(whole)["state_dict"], checkpoint(part)["state_dict"])
    assert {k: v for k, v in seen(whole).items() if k[0] == "20"} == {
        k: v for k, v in seen(part).items() if k[0] == "20"
    }


@pytest.mark.slow
def test_without_held_out_shards_it_says_so(command: Callable[..., Path], caplog):
    caplog.set_level("INFO")
    run = command("fit", *OVERLAY, *LONGER, "--data.held_out_urls=null")
    assert "data.held_out_urls=null: guideability of training rows alone is logged" in caplog.text
    assert {name.partition("/")[0] for _, name in seen(run)} == {"train"}


def test_bad_settings_are_refused():
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"share={share}: must be in"):
            LookOn(0.0, 1.0, sources.NullClass(), share=share)
    pair = [LookOn(0.0, 1.0, sources.NullClass()) for _ in range(2)]
    with pytest.raises(UserError, match="must have names of their own"):
        small(*pair)
    label = LookOn(0.0, 1.0, sources.RandomLabel())  # needs labels, but no null class
    WeakToStrongObjective(LinearInterpolant(), Uniform(), [label]).bind(small()[1], 0)
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform(), pair[:1])
    with (
        warnings.catch_warnings(),
        pytest.raises(UserError, match="label_dropout=0: must be above 0 for NullClass"),
    ):
        objective.bind(small()[1], 0)

"""One contract for all weak sources, and what is particular to each.

A source whose file is not there is left out of the contract.
"""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import perturbed
from given import evaluate
from recipes import sources

from w2s_train import weak
from w2s_train.interpolant import LinearInterpolant, NoisySample
from w2s_train.log import Log
from w2s_train.models import DiT, WeightAverage, published_sit
from w2s_train.objective import WeakToStrongObjective
from w2s_train.segment import Extrapolation
from w2s_train.timesteps import Uniform
from w2s_train.weak import Step, WeakSource

LINEAR = LinearInterpolant()
FILES = {path.stem for path in Path(weak.__file__).parent.glob("*.py")}


def small(**changes) -> DiT:
    sizes = dict(input_size=8, in_channels=3, hidden_size=32, depth=4, num_heads=4, num_classes=5)
    return DiT(**(sizes | changes))


def write_checkpoint(path: Path, raw: DiT, ema: DiT | None = None) -> str:
    """What `DiffusionModule` writes, as far as weak sources read it."""
    state = {f"network.{k}": v for k, v in raw.state_dict().items()}
    state |= {f"ema.module.{k}": v for k, v in (ema or raw).state_dict().items()}
    torch.save({"state_dict": state, "network": raw.arguments}, path)
    return str(path)


CASES = {
    "null_class": ("null_class", lambda: weak.NullClass()),
    "ema": ("ema", lambda: weak.EMA(decay=0.5)),
    "lagging_ema": ("ema", lambda: weak.EMA(decay=0.5, lag=2, update_every=2)),
    "half_ema": ("ema", lambda: weak.EMA(decay=0.5, lag=2, dtype="bfloat16")),
    "head": ("intermediate_head", lambda: weak.IntermediateHead(block=1)),
    "default_head": ("intermediate_head", lambda: weak.IntermediateHead()),
    "layer_skip": ("layer_skip", lambda: weak.LayerSkip(blocks=[1, 2])),
    "default_skip": ("layer_skip", lambda: weak.LayerSkip()),
    "snapshot": ("checkpoint", lambda: weak.Snapshot(step=1, weights="raw")),
    "checkpoint": ("checkpoint", lambda: weak.Checkpoint(network=small(depth=2))),
    "half_snapshot": ("checkpoint", lambda: weak.Snapshot(step=1, dtype="bfloat16")),
    "half_checkpoint": (
        "checkpoint",
        lambda: weak.Checkpoint(network=small(depth=2), dtype="bfloat16"),
    ),
    "co_trained": ("co_trained", lambda: weak.CoTrained(every=1, lr=0.1)),
    "unlabelled": (
        "checkpoint",
        lambda: weak.Checkpoint(network=small(depth=2, num_classes=9), unlabelled=True),
    ),
    "random_blocks": ("random_blocks", lambda: weak.RandomBlocks(share=0.5)),
    "shifted_time": ("shifted_time", lambda: weak.ShiftedTime(-0.05)),
    "perturbed_time": ("perturbed_time", lambda: weak.PerturbedTime()),
    "random_label": ("random_label", lambda: weak.RandomLabel()),
    "shuffled_tokens": ("shuffled_tokens", lambda: weak.ShuffledTokens()),
    "late_tokens": ("shuffled_tokens", lambda: weak.ShuffledTokens(first=2, last=3)),
    "dropped_tokens": ("dropped_tokens", lambda: weak.DroppedTokens()),
    "first_tokens": ("dropped_tokens", lambda: weak.DroppedTokens(0.4, first=0, last=0)),
}
SOURCES = {name: make for name, (file, make) in CASES.items() if file in FILES}


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(name not in FILES, reason=f"weak/{name}.py is not there")


def bound(source: WeakSource, network: DiT, scale: float = 0.5) -> WeakToStrongObjective:
    segment = Extrapolation(0.0, 1.0, scale, source)
    objective = WeakToStrongObjective(LINEAR, Uniform(), [segment])
    objective.bind(network)
    objective.plan(10)
    return objective


def unasked() -> tuple[NoisySample, torch.Tensor]:
    """For sources that do not learn: fresh draws would change what is drawn after them."""
    raise AssertionError


def questions(n: int = 6) -> tuple[NoisySample, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, noise = torch.randn(2, n, 3, 8, 8, generator=generator)
    return LINEAR.corrupt(x, noise, torch.linspace(0.1, 0.9, n)), torch.arange(n) % 5


@torch.no_grad()
def predict(source: WeakSource, network: DiT) -> torch.Tensor:
    noisy, y = questions()
    strong = network(noisy.x_t, noisy.t, y, keep_hidden=source.keep_hidden)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return source.predict_at(network, noisy, y, strong)


@torch.no_grad()
def velocity(network: DiT) -> torch.Tensor:
    noisy, y = questions()
    return network(noisy.x_t, noisy.t, y).velocity


def test_every_source_has_its_case():
    assert {type(make()).__name__ for make in SOURCES.values()} == set(sources())


@pytest.mark.parametrize("name", SOURCES)
def test_contract(name: str, network: DiT):
    source = SOURCES[name]()
    objective = bound(source, network)
    trainable = [n for n, p in source.named_parameters() if p.requires_grad]
    assert bool(trainable) == source.trainable

    # One optimizer step reaches exactly what is trainable.
    before = {n: p.clone() for n, p in source.named_parameters()}
    parameters = [p for p in [*network.parameters(), *source.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    first = source.plan(10, 10)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    objective(network, x, y, Step(first, network), Log()).mean().backward()
    assert all(p.grad is None for p in source.parameters() if not p.requires_grad)
    optimizer.step()
    changed = {n for n, p in source.named_parameters() if not torch.equal(p, before[n])}
    assert changed <= set(trainable)
    assert bool(changed) == source.trainable
    objective.after_step(network, Step(first + 1, network))
    assert [n for n, p in source.named_parameters() if p.requires_grad] == trainable

    # State survives save and load, into an objective bound to an untrained network, and what is
    # learned afterwards is the same.
    other_network = small()
    other_source = SOURCES[name]()
    other = bound(other_source, other_network)
    other.load_state_dict(objective.state_dict())
    other_network.load_state_dict(network.state_dict())
    assert torch.equal(predict(other_source, other_network), predict(source, network))
    for one, net in ((objective, network), (other, other_network)):
        torch.manual_seed(5)
        one.last_batch = objective.last_batch
        one.after_step(net, Step(4, net))
    assert torch.equal(predict(other_source, other_network), predict(source, network))


@needs("ema")
def test_ema_lags(network: DiT):
    """After one step with decay 0.5 the average is half-way; its prediction is that network's."""
    source = weak.EMA(decay=0.5)
    bound(source, network)
    start = [p.clone() for p in network.parameters()]
    perturbed(network, 0.3)
    source.after_step(network, Step(1), unasked)
    midway = small()
    for m, a, b in zip(midway.parameters(), start, network.parameters(), strict=True):
        m.data.copy_((a + b) / 2)
    torch.testing.assert_close(predict(source, network), velocity(midway))


@needs("ema")
def test_an_old_average_is_at_least_lag_steps_old(network: DiT):
    """With lag 3 the copy in use at step n is the average of step 3 (n // 3) - 3."""
    source = weak.EMA(decay=0.5, lag=3)
    bound(source, network)
    assert source.plan(10, 10) == 6
    plain, known = WeightAverage(network, 0.5), {}
    for step in range(1, 13):
        perturbed(network, 0.1)
        plain.update(network)
        source.after_step(network, Step(step), unasked)
        known[step] = velocity(plain.module)
        if step >= 6:
            torch.testing.assert_close(predict(source, network), known[3 * (step // 3) - 3])


@needs("ema")
def test_updating_rarely_keeps_the_decay_per_step(network: DiT):
    """A network that stands still is approached alike, however often the average is updated."""
    often, rarely = weak.EMA(decay=0.8), weak.EMA(decay=0.8, update_every=4)
    for source in (often, rarely):
        source.bind(network)
    perturbed(network, 0.3)
    for step in range(1, 9):
        often.after_step(network, Step(step), unasked)
        rarely.after_step(network, Step(step), unasked)
    ours, theirs = predict(rarely, network), predict(often, network)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@needs("ema")
@pytest.mark.parametrize(
    "options",
    [
        {"decay": -0.1},
        {"decay": 1.0},
        {"decay": float("nan")},
        {"lag": 0.6},
        {"lag": 5},
        {"lag": -1},
        {"update_every": 0},
        {"update_every": 3, "lag": 2},
        {"dtype": "bfloat16"},
    ],
)
def test_bad_averages(options: dict, network: DiT):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        bound(weak.EMA(**options), network)


@needs("intermediate_head")
def test_head_defaults_to_the_first_third():
    """Block 4 of 12 as published, counted from 1."""
    source = weak.IntermediateHead()
    source.bind(small(depth=12))
    assert source.keep_hidden == (3,)


@needs("intermediate_head")
@pytest.mark.parametrize("block", [-1, 3, 7])
def test_head_needs_an_inner_block(block: int, network: DiT):
    with pytest.raises(ValueError, match=f"block={block}"):
        weak.IntermediateHead(block).bind(network)


@needs("layer_skip")
def test_skipped_blocks_are_those_named(network: DiT):
    """What is left is the network of the other blocks."""
    source = weak.LayerSkip(blocks=[1, 2])
    source.bind(network)
    other = small(depth=2)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("blocks.")}
    for here, there in ((0, 0), (3, 1)):
        block = network.blocks[here].state_dict()
        state |= {f"blocks.{there}.{k}": v for k, v in block.items()}
    other.load_state_dict(state)
    torch.testing.assert_close(predict(source, network), velocity(other))


@needs("layer_skip")
@pytest.mark.parametrize("blocks", [[], [-1], [4], [0, 9]])
def test_skipping_needs_blocks_that_exist(blocks: list[int], network: DiT):
    with pytest.raises(ValueError, match="blocks="):
        weak.LayerSkip(blocks).bind(network)


@needs("checkpoint")
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_snapshot_is_the_network_of_its_step(weights: str, network: DiT):
    """Taken at step 2, refreshed at 5 and 8, and nothing in between."""
    source = weak.Snapshot(step=2, refresh_every=3, weights=weights)
    bound(source, network)
    average, expected = WeightAverage(network, 0.5), None
    for step in range(1, 10):
        perturbed(network, 0.1)
        average.update(network)
        source.after_step(network, Step(step, average.module), unasked)
        if step in (2, 5, 8):
            expected = velocity(network if weights == "raw" else average.module)
        if step >= 2:
            assert torch.equal(predict(source, network), expected), step


@needs("checkpoint")
def test_no_guidance_before_the_snapshot(network: DiT):
    source = weak.Snapshot(step=3)
    objective = bound(source, network)
    noisy, y = questions()
    plain = evaluate(WeakToStrongObjective(LINEAR, Uniform()), network, noisy, y)
    before = evaluate(objective, network, noisy, y, Step(2, network))
    absent = evaluate(objective, network, noisy, y, Step(3, network))
    source.after_step(perturbed(copy.deepcopy(network)), Step(3, network), unasked)
    source.network.final_layer.linear.bias.data += 0.3
    after = evaluate(objective, network, noisy, y, Step(3, network))
    assert torch.equal(before.per_sample, plain.per_sample)
    assert torch.equal(absent.per_sample, plain.per_sample)
    assert not torch.equal(after.per_sample, plain.per_sample)


@needs("checkpoint")
def test_a_snapshot_whose_step_was_missed_is_taken_late(network: DiT):
    """A resumed run may have another plan: never guide by a network that was not trained."""
    source = weak.Snapshot(step=2)
    objective = bound(source, network)
    assert objective.segments[0].factor(Step(5)) == 0
    source.after_step(network, Step(6, network), unasked)
    assert objective.segments[0].factor(Step(6)) == 1
    assert torch.equal(predict(source, network), velocity(network))


@needs("checkpoint")
@pytest.mark.parametrize("options", [{"step": 10}, {"step": 0}, {"step": 2.5}, {"step": -1}])
def test_snapshots_need_a_step_of_the_run(options: dict, network: DiT):
    with pytest.raises(ValueError, match="step="):
        bound(weak.Snapshot(**options), network)


@needs("checkpoint")
def test_a_share_of_a_longer_plan_is_no_error(network: DiT):
    """A trial run of the first steps may end before the snapshot; it says so."""
    source = weak.Snapshot(step=0.5)
    source.bind(network)
    with pytest.warns(UserWarning, match="step=0.5: is step 50 of the plan"):
        source.plan(total=100, last=10)


@needs("checkpoint")
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_checkpoints_of_ours(weights: str, network: DiT, tmp_path: Path):
    raw, ema = perturbed(small(depth=2)), perturbed(small(depth=2))
    path = write_checkpoint(tmp_path / "early.ckpt", raw, ema)
    source = weak.Checkpoint(path, weights)
    source.bind(network)
    expected = velocity(raw if weights == "raw" else ema)
    assert torch.equal(predict(source, network), expected)


@needs("checkpoint")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_classes": 7}, "num_classes 7, must have 5"),
        ({"in_channels": 1}, r"shape \(1, 8, 8\)"),
        ({"input_size": 16}, r"shape \(3, 16, 16\)"),
        ({"depth": 5}, "parameters, must have at most"),
    ],
)
def test_checkpoints_must_fit(changes: dict, reason: str, network: DiT, tmp_path: Path):
    path = write_checkpoint(tmp_path / "other.ckpt", small(**changes))
    with pytest.raises(ValueError, match=rf"path=.*other.ckpt: .*{reason}"):
        weak.Checkpoint(path).bind(network)


@needs("checkpoint")
def test_broken_checkpoints(tmp_path: Path):
    whole = Path(write_checkpoint(tmp_path / "whole.ckpt", small()))
    (tmp_path / "short.ckpt").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save({"state_dict": {}, "network": small().arguments}, tmp_path / "empty.ckpt")
    torch.save({"state_dict": {}, "network": {"foo": 1}}, tmp_path / "odd.ckpt")
    torch.save({"state_dict": 3, "network": torch.zeros(2)}, tmp_path / "types.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "zero.ckpt").write_bytes(b"")
    (tmp_path / "yaml.ckpt").write_text("a: 1\nb: [2, 3]\n")
    names = ["missing", "short", "text", "foreign", "empty", "odd", "types", "list", "zero", "yaml"]
    for name in names:
        with pytest.raises(ValueError, match=rf"path=.*{name}.ckpt: .+") as raised:
            weak.Checkpoint(str(tmp_path / f"{name}.ckpt"))
        assert "\n" not in str(raised.value)
    for name in names:
        with pytest.raises(ValueError, match=rf"path=.*{name}.ckpt: .+"):
            published_sit(str(tmp_path / f"{name}.ckpt"), num_heads=4)
    with pytest.raises(ValueError, match="path=None"):
        weak.Checkpoint()
    with pytest.raises(ValueError, match="not both"):
        weak.Checkpoint(str(whole), network=small())


@needs("co_trained")
def test_co_trained_is_adamw_on_plain_velocities(network: DiT):
    """Every second step, with fresh draws on the same batch; the strong loss never reaches it."""
    source = weak.CoTrained(every=2, lr=1e-2)
    objective = bound(source, network)
    assert source.network.hidden_size == 16
    mine = small(hidden_size=16, num_heads=2)
    mine.load_state_dict(source.network.state_dict())
    optimizer = torch.optim.AdamW(mine.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(1, 6):
        x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 6
        torch.manual_seed(step)
        objective(network, x, y, Step(step), Log()).mean().backward()
        state = torch.get_rng_state()
        objective.after_step(network, Step(step))
        if step % 2 == 0:
            torch.set_rng_state(state)
            noisy = objective.draw(x)
            optimizer.zero_grad()
            (mine(noisy.x_t, noisy.t, y).velocity - noisy.v).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(predict(source, network), velocity(mine))


def learn_on_one_of_two(rank: int, folder: str) -> None:
    """One process of a group of two: a step on its half of the rows."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    source = weak.CoTrained(every=1, lr=0.1)
    source.bind(perturbed(small()))
    noisy, y = questions(8)
    rows = slice(4 * rank, 4 * rank + 4)
    for step in (1, 2):
        source.after_step(source.network, Step(step), lambda: (noisy.take(rows), y[rows]))
    torch.save(source.network.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@needs("co_trained")
def test_co_trained_gradients_are_averaged_over_processes(tmp_path: Path):
    """Two processes with half of the rows each take the steps of one process with all of them."""
    torch.multiprocessing.spawn(learn_on_one_of_two, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    source = weak.CoTrained(every=1, lr=0.1)
    source.bind(perturbed(small()))
    noisy, y = questions(8)
    for step in (1, 2):
        source.after_step(source.network, Step(step), lambda: (noisy, y))
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, value in source.network.state_dict().items():
        assert torch.equal(halves[0][name], halves[1][name]), name
        torch.testing.assert_close(halves[0][name], value, rtol=1e-3, atol=1e-3)


@needs("co_trained")
def test_a_bad_gradient_of_the_co_trained_network_is_said(network: DiT):
    """Its step is skipped, and the next one is taken."""
    source = weak.CoTrained(every=1, lr=0.1)
    source.bind(network)
    noisy, y = questions()
    before = copy.deepcopy(source.network.state_dict())
    bad = dataclasses.replace(noisy, x_t=noisy.x_t * math.inf)
    with pytest.warns(UserWarning, match="step 3: the gradient of the co-trained .* is skipped"):
        source.after_step(network, Step(3), lambda: (bad, y))
    assert all(torch.equal(before[k], v) for k, v in source.network.state_dict().items())
    source.after_step(network, Step(4), lambda: (noisy, y))
    after = source.network.final_layer.linear.bias  # elsewhere the first gradients are zero
    assert not torch.equal(before["final_layer.linear.bias"], after)


@needs("co_trained")
def test_the_rate_is_that_of_the_run_or_its_own(network: DiT):
    """Also after a resume with another one."""
    for lr, expected in ((None, 0.3), (0.02, 0.02)):
        source = weak.CoTrained(lr=lr)
        source.bind(network)
        source.after_step(network, Step(4, lr=0.3), questions)
        assert source.learner.optimizer.param_groups[0]["lr"] == expected
        again = weak.CoTrained(lr=0.5)
        again.bind(network)
        again.load_state_dict(source.state_dict())
        again.after_step(network, Step(8, lr=0.3), questions)
        assert again.learner.optimizer.param_groups[0]["lr"] == 0.5
        assert again.learner.optimizer.state_dict()["state"][0]["step"] == 2


@needs("co_trained")
@pytest.mark.parametrize(("width", "heads", "half"), [(768, 12, 384), (60, 5, 24), (32, 1, 16)])
def test_half_a_network(width: int, heads: int, half: int):
    source = weak.CoTrained()
    source.bind(small(hidden_size=width, num_heads=heads, depth=1))
    assert source.network.hidden_size == half


@needs("co_trained")
@pytest.mark.parametrize("options", [{"every": 0}, {"lr": -1.0}, {"lr": float("inf")}])
def test_bad_co_training(options: dict):
    with pytest.raises(ValueError, match="=.*: must be"):
        weak.CoTrained(**options)


@needs("co_trained")
@pytest.mark.parametrize("changes", [{"num_classes": 4}, {"hidden_size": 64}])
def test_co_trained_networks_must_fit(changes: dict, network: DiT):
    with pytest.raises(ValueError, match="network="):
        weak.CoTrained(small(**changes)).bind(network)


@needs("checkpoint")
@pytest.mark.parametrize("qk_norm", [False, True])
def test_copies_in_half_precision(qk_norm: bool):
    """Under bf16-mixed they predict the same bits; in float32 they predict as under bf16-mixed."""
    network = perturbed(small(qk_norm=qk_norm))
    whole, half = (
        weak.Checkpoint(network=network, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    with torch.autocast("cpu", torch.bfloat16):
        expected = predict(whole, network)
        assert torch.equal(predict(half, network), expected)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(predict(half, network), expected)
    exact = predict(whole, network)
    error = (expected.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.02
    # What autocast leaves alone stays float32; it is little.
    kept = [name for name, p in half.network.named_parameters() if p.dtype == torch.float32]
    norms = [name for name, _ in network.named_parameters() if "_norm" in name]
    assert sorted(kept) == sorted(["pos_embed", "y_embedder.embedding_table.weight", *norms])
    assert half.network.t_embedder.rates.dtype == torch.float32


@needs("ema")
def test_copies_of_an_average_in_half_precision(network: DiT):
    """The average stays float32; the copies are it, rounded."""
    source = weak.EMA(decay=0.5, lag=2, dtype="bfloat16")
    bound(source, network)
    for step in range(1, 3):
        perturbed(network)
        source.after_step(network, Step(step), unasked)
    name = "blocks.0.attn.qkv.weight"
    average = source.average.module.get_parameter(name)
    assert average.dtype == torch.float32
    assert torch.equal(source.waiting.get_parameter(name), average.bfloat16())


def test_sources_are_found_by_name():
    assert weak.WeakSource is WeakSource
    with pytest.raises(AttributeError, match="no file of w2s_train.weak defines Nothing"):
        _ = weak.Nothing

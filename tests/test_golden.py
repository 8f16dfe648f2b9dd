"""Reference values of the method authors' code; `tests/golden/README.md` says how they were made.

Everything (seeds, sizes, layers, cases) is read from the files, so that another set of the same
form can be checked: ``pytest tests/test_golden.py --golden DIR``.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import sources
from given import evaluate as losses_at
from torch import Tensor, nn

from w2s_train.align import MLP, Alignment, Convolution, Encoder, spatial_norm
from w2s_train.guidance import ClassifierFree, Guidance, evaluate
from w2s_train.inbuilt import IMeanFlow
from w2s_train.interpolant import (
    CosineInterpolant,
    Interpolant,
    LinearInterpolant,
    NoisySample,
)
from w2s_train.models import DiT
from w2s_train.models.published import architecture
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler, EulerMaruyama, Heun, Sampler
from w2s_train.schedule import Schedule
from w2s_train.segment import Consistency, Extrapolation, Segment
from w2s_train.timesteps import EDMLogNormal, Uniform
from w2s_train.weak import Step, WeakSource

INTERPOLANTS: dict[str, Interpolant] = {
    "linear": LinearInterpolant(),
    "cosine": CosineInterpolant(),
}
WEAK_TYPES = {"None", "Uncond", "Segmented", "Branch", "LayerSkip", "Separate"}
# Arguments of theirs that are none of ours.
OTHERS = """
    learn_sigma class_dropout_prob encoder_depth z_dims projector_dim projection_layer_type
    proj_kwargs_kernel_size
""".split()
TOTAL_STEPS = 10**6  # of the run that the cases are taken from; they give step / total


class Golden:
    """One archive: arrays as tensors, JSON, and the parameters regenerated from their seeds."""

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / f"{name}.npz"
        assert path.is_file(), f"no golden file {path}"
        self.arrays = np.load(path)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    def json(self, key: str) -> dict:
        return json.loads(str(self.arrays[key]))

    def state(self, prefix: str) -> dict[str, Tensor]:
        entry = self.json("parameters_json")[prefix]
        rs, state = np.random.RandomState(entry["seed"]), {}
        for key in sorted(entry["shapes"]):
            if key != "pos_embed":
                std = 0.5 if key == "y_embedder.embedding_table.weight" else 0.15
                value = rs.normal(0.0, std, size=entry["shapes"][key]).astype(np.float32)
                state[key] = torch.from_numpy(value)
        return state

    def network(self, prefix: str) -> DiT:
        """The network with the golden parameters; the position table is our own."""
        sizes = dict(self.json("parameters_json")[prefix]["architecture"])
        sizes = {k: v for k, v in sizes.items() if k not in OTHERS}
        more = ("mid_layer.", "projectors.")
        state = {k: v for k, v in self.state(prefix).items() if not k.startswith(more)}
        out = state["final_layer.linear.weight"].shape[0] // sizes["patch_size"] ** 2
        network = DiT(**sizes, out_channels=out)
        told = architecture(network.state_dict(), sizes["num_heads"])
        assert told.items() >= sizes.items()
        missing, unexpected = network.load_state_dict(state, strict=False)
        assert missing == ["pos_embed"]
        assert not unexpected
        return network

    def head(self, prefix: str, layer: int, network: DiT) -> WeakSource:
        """The intermediate head; the files count layers from 1."""
        head = sources.IntermediateHead(block=layer - 1)
        head.bind(network)
        state = self.state(prefix)
        head.head.load_state_dict(
            {k.removeprefix("mid_layer."): v for k, v in state.items() if k.startswith("mid_layer")}
        )
        return head


@pytest.fixture
def golden_folder(request: pytest.FixtureRequest) -> Path:
    return request.config.getoption("--golden")


def close(ours: Tensor, golden: Tensor, amplified: float = 1.0) -> None:
    """Equal within 1e-4, or that times a factor by which a formula amplifies rounding."""
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-4 * amplified)


@torch.no_grad()
def test_sit_forward(golden_folder: Path) -> None:
    golden = Golden(golden_folder, "sit_forward")
    network = golden.network("param/")
    x, t, y = golden["x"], golden["t"], golden["y"]
    layers = golden.json("weak_layers_json")
    out = network(x, t, y, keep_hidden=range(network.depth))
    close(network.x_embedder(x), golden["patch_embed"])
    close(network.t_embedder(t), golden["t_emb"])
    close(network.y_embedder(y), golden["y_emb"])
    for block in range(network.depth):
        close(out.hidden[block], golden[f"block_out.{block}"])
    for key in ("out", "out_none", "layerskip_strong"):
        close(out.velocity, golden[key])
    head = golden.head("param/", layers["Branch"], network)
    noisy = NoisySample(x, t, x)
    close(head.predict(network, noisy, y, out), golden["mid"])
    null = torch.full_like(y, network.null_class)
    out_null = network(x, t, null, keep_hidden=head.keep_hidden)
    close(sources.NullClass().predict(network, noisy, y, out), golden["out_null"])
    close(head.predict(network, noisy, null, out_null), golden["mid_null"])
    skipped = network(x, t, y, skip_blocks=(layers["LayerSkip"] - 1,))
    close(skipped.velocity, golden["layerskip_weak"])


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["plain/", "sigma/"])
def test_dit_forward(golden_folder: Path, prefix: str) -> None:
    golden = Golden(golden_folder, "dit_forward")
    network = golden.network(f"{prefix}param/")
    x, t, y = golden["x"], golden["t"], golden["y"]

    def whole(t: Tensor, y: Tensor) -> Tensor:
        out = network(x, t, y)
        return torch.cat([out.velocity, out.rest], dim=1)

    close(network.t_embedder(t), golden[f"{prefix}t_emb"])
    close(whole(t, y), golden[f"{prefix}out"])
    null = torch.full_like(y, network.null_class)
    close(whole(t, null), golden[f"{prefix}out_null"])
    close(whole(golden["t_frac"], y), golden[f"{prefix}out_tfrac"])
    # The guided batch: both halves hold the guided prediction, the rest is left as it was.
    n = len(x)
    cond, uncond = network(x, t, y), network(x, t, null)
    guided = uncond.velocity + 4 * (cond.velocity - uncond.velocity)
    for half in (slice(0, n), slice(n, 2 * n)):  # 4 cond - 3 uncond: rounding grows by 7
        close(guided, golden[f"{prefix}out_cfg4"][half, : network.in_channels], amplified=7)
    rest = torch.cat([cond.rest, uncond.rest])
    close(rest, golden[f"{prefix}out_cfg4"][:, network.in_channels :])


class WeakNetwork(Guidance):
    """v_weak + scale (v - v_weak) on an interval: the reference's guidance by a second network."""

    def __init__(self, weak: DiT, scale: float, low: float, high: float) -> None:
        self.weak, self.scale, self.low, self.high = weak, scale, low, high

    def field(self, network: DiT, y: Tensor, times: list[float]):  # noqa: ANN201
        def velocity(x_t: Tensor, t: float, start: float) -> Tensor:
            strong = evaluate(network, x_t, t, y)
            if not self.low <= start <= self.high:
                return strong
            weak = evaluate(self.weak, x_t, t, y)
            return weak + self.scale * (strong - weak)

        return velocity

    def describe(self) -> str:
        return "weak network"


def golden_sampler(case: dict) -> Sampler:
    if case["kind"] == "ode":
        return (Heun if case["heun"] else Euler)(steps=case["num_steps"])
    return EulerMaruyama(INTERPOLANTS[case["path_type"]], steps=case["num_steps"])


def test_samplers(golden_folder: Path) -> None:
    golden = Golden(golden_folder, "samplers")
    network, y = golden.network("param/"), golden["y"]
    cases = golden.json("cases_json")
    assert cases
    for name, case in cases.items():
        interval = (case["cfg_scale"], case["guidance_low"], case["guidance_high"])
        guidance = ClassifierFree(*interval)
        if case["self_guidance"] == "True":
            guidance = WeakNetwork(golden.network("weak_param/"), *interval)
        calls: list[tuple[float, bool]] = []
        hook = network.register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append((args[1][0].item(), len(args[0]) > len(y)))
        )
        sampler = golden_sampler(case)
        draws = iter(golden["sde_noise"])
        field = guidance.field(network, y, sampler.times())
        out = sampler(field, golden["latents"], lambda d=draws: next(d))
        hook.remove()
        assert out.dtype == torch.float64
        close(out, golden[f"case/{name}/out"])
        times, doubled = zip(*calls, strict=True)
        np.testing.assert_allclose(times, golden[f"case/{name}/eval_t"], rtol=0, atol=1e-7)
        assert list(doubled) == golden[f"case/{name}/eval_batch_doubled"].tolist(), name
        grid = golden[f"{case['kind']}_t_grid"]
        np.testing.assert_allclose(sampler.times(), grid, rtol=0, atol=1e-12)


def test_scores(golden_folder: Path) -> None:
    golden = Golden(golden_folder, "samplers")
    for name, interpolant in INTERPOLANTS.items():
        v, x_t = golden["sde_noise"][0], golden["latents"].double()
        score = interpolant.velocity_to_score(v, x_t, golden["score/t"])
        torch.testing.assert_close(score, golden[f"score/{name}"], rtol=1e-6, atol=1e-6)


def golden_segments(golden: Golden, case: dict, head: WeakSource | None) -> list[Segment]:
    """The segments that a case of the reference amounts to.

    The reference compares both edges inclusively in float32; our ranges are half-open.
    """
    scale, ratio = case["w_scale"], case["weak_loss_ratio"]
    options = dict(schedule=Schedule(alpha=case["weak_alpha"]), allow_unstable=True)
    low = case["guidance_low"]
    high = float(np.nextafter(np.float32(case["guidance_high"]), np.float32(2)))
    if case["weak"] == "None":
        return []
    if case["weak"] == "Segmented":
        below = [Consistency(0.0, low, head, weight=ratio)] if low > 0 else []
        return [*below, Extrapolation(low, min(high, 1.0), scale, sources.NullClass(), **options)]
    if case["weak"] == "Branch":
        return [Extrapolation(0.0, 1.0, scale, head, weak_loss_weight=ratio, **options)]
    layer = golden.json("weak_layers_json").get(case["weak"])
    source = {
        "Uncond": lambda: sources.NullClass(),
        "LayerSkip": lambda: sources.LayerSkip([layer - 1]),
        "Separate": lambda: sources.CoTrained(golden.network("weak_param/")),
    }[case["weak"]]()
    return [Extrapolation(0.0, 1.0, scale, source, **options)]


def check_loss(golden: Golden, name: str, case: dict) -> None:
    network = golden.network("param/")
    interpolant = INTERPOLANTS[case["path"]]
    layer = golden.json("weak_layers_json").get(case["weak"])
    tapped = case["weak"] in ("Segmented", "Branch")
    head = golden.head("param/", layer, network) if tapped else None
    objective = WeakToStrongObjective(interpolant, Uniform(), golden_segments(golden, case, head))
    if head is None:
        objective.bind(network)
    objective.plan(TOTAL_STEPS)
    step = Step(round(case["training_duration"] * TOTAL_STEPS))

    noisy = golden_noisy(golden, case, interpolant)
    losses = losses_at(objective, network, noisy, golden[case["labels"]], step)
    torch.testing.assert_close(losses.per_sample, golden[f"case/{name}/loss"], rtol=1e-5, atol=0)
    mean = golden[f"case/{name}/loss_mean"]
    torch.testing.assert_close(losses.total.detach(), mean.reshape(()), rtol=1e-5, atol=0)

    losses.total.backward()
    named = {k: p for k, p in network.named_parameters() if p.requires_grad}
    if head is not None:
        named |= {f"mid_layer.{k}": p for k, p in head.head.named_parameters()}
    gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in named.items()}
    stored = [k for k in golden.arrays.files if k.startswith(f"case/{name}/grad/")]
    assert stored
    for key in stored:
        ours, theirs = gradients[key.removeprefix(f"case/{name}/grad/")], golden[key]
        bound = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound, msg=lambda m, k=key: k + m)
    names = [str(n) for n in golden.arrays[f"grad_names/{case['weak']}"]]
    norms = torch.stack([gradients[n].double().norm() for n in names])
    torch.testing.assert_close(norms, golden[f"case/{name}/grad_norms"], rtol=1e-4, atol=1e-6)
    total = golden[f"case/{name}/grad_norm"].double().reshape(())
    torch.testing.assert_close(norms.norm(), total, rtol=1e-5, atol=0)


def golden_noisy(golden: Golden, case: dict, interpolant: Interpolant) -> NoisySample:
    """The pinned draw, through our own formulas, checked against the stored state."""
    t = golden["t_uniform"].flatten()
    if case["weighting"] == "lognormal":
        u = torch.special.ndtr(golden["z_lognormal"].flatten().double())
        t = EDMLogNormal(mean=0.0, std=1.0).quantile(u, interpolant).float()
    state = f"state/{case['path']}.{case['weighting']}"
    torch.testing.assert_close(t, golden[f"{state}/t"], rtol=1e-5, atol=1e-7)
    # The edges of the segments are compared to the last bit: go on with the stored t.
    noisy = interpolant.corrupt(golden["images"], golden["noise"], golden[f"{state}/t"])
    torch.testing.assert_close(noisy.x_t, golden[f"{state}/x_t"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noisy.v, golden[f"{state}/target"], rtol=1e-5, atol=1e-6)
    return noisy


def test_losses_and_gradients(golden_folder: Path) -> None:
    golden = Golden(golden_folder, "w2s_loss")
    cases = golden.json("cases_json")
    assert {case["weak"] for case in cases.values()} == WEAK_TYPES
    failures = []
    for name, case in cases.items():
        try:
            check_loss(golden, name, case)
        except AssertionError as error:
            failures.append(f"{name}: {' '.join(str(error).split())}")
    assert not failures, f"{len(failures)} of {len(cases)} cases: " + "; ".join(failures)


class Guided(nn.Module):
    """The velocity of the analytic network of imf_or_ig.npz; it is told g = 1 - 1/omega."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.table = golden["imf/emb_v"].permute(0, 3, 1, 2)
        self.net, self.null_class = golden.json("cases_json")["net"], 10
        self.add_scales = lambda names: None

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, *, scales: Tensor | None = None) -> Any:
        g = torch.zeros(len(y), 1) if scales is None else scales
        time, g = t.view(-1, 1, 1, 1), g.view(-1, 1, 1, 1)
        v = self.table[y] * (1 + self.net["v_guidance"] * g)
        return SimpleNamespace(velocity=v + self.net["v_x"] * x_t + self.net["v_t"] * time)


def test_imeanflow(golden_folder: Path, monkeypatch) -> None:
    """Its law of omega, and its guided target, which is plain outside a row's interval."""
    golden = Golden(golden_folder, "imf_or_ig")
    for name, law in golden.json("cases_json")["omega"].items():
        omega = IMeanFlow(**law).omega(golden["imf/omega/u"])
        close(omega, golden[f"imf/omega/{name}"])
    found = {k: golden[f"imf/target/{k}"] for k in "t t_min t_max omega labels fm_mask".split()}
    t, omega = found["t"].flatten(), found["omega"].flatten()
    inside = (t >= found["t_min"].flatten()) & (t <= found["t_max"].flatten()) | found["fm_mask"]
    told = torch.where(inside, 1 - 1 / omega, 0.0)
    monkeypatch.setattr("w2s_train.objective.scales_of", lambda *_: {"c": told})
    x_t, v, target, strong = (
        golden[f"imf/target/{k}"].permute(0, 3, 1, 2) for k in "z_t v_t v_g v_cond_at_omega".split()
    )
    segment = Extrapolation(0.0, 1.0, IMeanFlow(), sources.NullClass(), name="c")
    ours, network = WeakToStrongObjective(LinearInterpolant(), Uniform(), [segment]), Guided(golden)
    ours.bind(network, 0.1)
    losses = losses_at(ours, network, NoisySample(x_t, t, v), found["labels"]).per_sample
    plain = golden["imf/target/v_cond_at_1"].permute(0, 3, 1, 2)
    strong = torch.where(inside.view(-1, 1, 1, 1), strong, plain)
    close(losses, (strong - target).square().flatten(1).mean(1))
    assert not inside.all()


def internal_guidance(golden: Golden) -> tuple[DiT, sources.IntermediateHead]:
    """The network and its second final layer, whose block is counted from 1 there."""
    sizes = dict(golden.json("parameters_json")["ig_param/"]["architecture"])
    block = sizes.pop("encoder_depth") - 1
    sizes.pop("class_dropout_prob")
    state = golden.state("ig_param/")
    network, head = DiT(**sizes), sources.IntermediateHead(block)
    own = {k: v for k, v in state.items() if "_xr." not in k}
    assert network.load_state_dict(own, strict=False).missing_keys == ["pos_embed"]
    head.bind(network)
    prefix = "final_layer_xr."
    head.head.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return network, head


def test_internal_guidance(golden_folder: Path) -> None:
    """Its two predictions, and the loss that trains both, at every path and weighting."""
    golden = Golden(golden_folder, "imf_or_ig")
    network, head = internal_guidance(golden)
    x, t, y = golden["ig/latents"], golden["ig/t_uniform"].flatten(), golden["ig/y"]
    out = network(x, t, y, keep_hidden=head.keep_hidden)
    close(out.velocity, golden["ig/out"])
    close(head.predict(network, NoisySample(x, t, x), y, out), golden["ig/mid"])
    for name, case in golden.json("cases_json")["ig_loss"].items():
        interpolant = INTERPOLANTS[case["path"]]
        if case["weighting"] == "lognormal":
            level = golden["ig/z_lognormal"].flatten().exp()
            t = interpolant.time_of_noise_level(level)
        noisy = interpolant.corrupt(golden["ig/images"], golden["ig/noise"], t)
        t = golden["ig/t_uniform"].flatten()
        segment = Extrapolation(0.0, 1.0, 0.0, head, weak_loss_weight=case["aux_weight"])
        ours = WeakToStrongObjective(interpolant, Uniform(), [segment])
        losses = losses_at(ours, network, noisy, y)
        aux = golden[f"ig/loss/{name}/aux_loss"]
        close(losses.per_sample, golden[f"ig/loss/{name}/loss"] + case["aux_weight"] * aux)
        close(losses.total, golden[f"ig/loss/{name}/total"])


class Given(Encoder):
    """Tokens that are there already."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def describe(self) -> str:
        return "given"

    def tokens(self, batch: Any) -> Tensor:
        return self.values


def golden_terms(golden: Golden, case: dict, state: dict[str, Tensor]) -> list[Alignment]:
    """The terms of a case; those of several encoders share its coefficient."""
    terms, encoders = [], case["encoders"]
    conv = case.get("projection_layer") == "conv"
    alpha = case["zscore_alpha"] if case.get("spnorm", "none") == "zscore" else None
    for number, name in enumerate(encoders):
        z, prefix = golden[name], f"projectors.{number}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        own = {k.removeprefix("projection_layer."): v for k, v in own.items()}
        projector = Convolution(case["kernel_size"]) if conv else MLP(len(own["0.bias"]))
        options = dict(block=case["encoder_depth"] - 1, weight=case["proj_coeff"] / len(encoders))
        term = Alignment(
            Given(z), z.shape[-1], projector, alpha=alpha, name=f"e{number}", **options
        )
        terms.append(term)
        projector.bind(len(state["x_embedder.proj.bias"]), z.shape[-1])
        (projector.layer if conv else projector.layers).load_state_dict(own)
    return terms


def check_alignment(golden: Golden, name: str, case: dict) -> None:
    prefix, state = f"{name}/param/", golden.state(f"{name}/param/")
    network, interpolant = golden.network(prefix), INTERPOLANTS[case["path"]]
    terms = golden_terms(golden, case, state)
    objective = WeakToStrongObjective(interpolant, Uniform(), align=terms)
    with patch.object(MLP, "bind"), patch.object(Convolution, "bind"):
        objective.bind(network)
    t = golden["t_uniform"].flatten()
    if case["weighting"] == "lognormal":
        u = torch.special.ndtr(golden["z_lognormal"].flatten().double())
        t = EDMLogNormal(mean=0.0, std=1.0).quantile(u, interpolant).float()
    noisy = interpolant.corrupt(golden["images"], golden["noise"], t)
    losses = losses_at(objective, network, noisy, golden[case["labels"]], Step(batch={}))
    key = f"case/{name}"
    expected = golden[f"{key}/total"].reshape(())
    torch.testing.assert_close(losses.total.detach(), expected, rtol=1e-5, atol=1e-6)
    losses.total.backward()
    gradients = {k: p.grad for k, p in network.named_parameters() if p.requires_grad}
    for number, term in enumerate(terms):
        for k, p in term.projector.named_parameters():
            gradients[f"projectors.{number}.{k.partition('.')[2]}"] = p.grad
    stored = [k for k in golden.arrays.files if k.startswith(f"{key}/grad/")]
    assert stored
    for each in stored:
        ours = gradients[each.removeprefix(f"{key}/grad/").replace("projection_layer.", "")]
        bound = 1e-5 * golden[each].abs().max().item()
        torch.testing.assert_close(ours, golden[each], rtol=0, atol=bound, msg=lambda m: each + m)  # noqa: B023
    names = [str(n).replace("projection_layer.", "") for n in golden.arrays[f"{key}/grad_names"]]
    norms = torch.stack([gradients[n].double().norm() for n in names])
    torch.testing.assert_close(norms, golden[f"{key}/grad_norms"], rtol=1e-4, atol=1e-6)


def test_alignment(golden_folder: Path) -> None:
    """REPA and iREPA: the total loss, and its gradients to network and projectors."""
    golden = Golden(golden_folder, "repa_loss")
    for name, case in golden.json("cases_json").items():
        check_alignment(golden, name, case)


def test_spatial_norm(golden_folder: Path) -> None:
    golden = Golden(golden_folder, "repa_loss")
    for key in (k for k in golden.arrays.files if "/out." in k):
        where, _, alpha = key.partition("/out.")
        ours = spatial_norm(golden[f"{where}/in"], float(alpha))
        torch.testing.assert_close(ours, golden[key], rtol=1e-4, atol=1e-4)

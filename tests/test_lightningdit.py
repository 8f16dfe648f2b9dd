"""LightningDiT's block: the reference's numbers, switch by switch, and its published weights."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_golden import Golden, close, golden_folder  # noqa: F401 (a fixture)
from torch import Tensor

from w2s_train.errors import UserError
from w2s_train.guidance import ClassifierFree
from w2s_train.models import DiT, published_lightningdit, saved_network
from w2s_train.models.published import architecture
from w2s_train.models.rope import Rope, rotate


class Forward(Golden):
    """The archive; its states have tables, and weights of norms around one."""

    def case(self, name: str) -> dict:
        return self.json("cases_json")[name]

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Parameters from their seed, and the tables as the reference stores them."""
        entry = self.json("parameters_json")[prefix]
        rs, state = np.random.RandomState(entry["seed"]), {}
        patch = f"p{entry['architecture']['patch_size']}"
        tables = {
            "pos_embed": f"pos_embed/{patch}",
            "feat_rope.freqs_cos": f"rope/{patch}/cos",
            "feat_rope.freqs_sin": f"rope/{patch}/sin",
        }
        for key in sorted(entry["shapes"]):
            if key in entry["fixed"]:
                state[key] = self[tables[key]]
                continue
            std = 0.5 if key == "y_embedder.embedding_table.weight" else 0.15
            value = rs.normal(0.0, std, size=entry["shapes"][key])
            value = value + 1 if key in entry["mean_one"] else value
            state[key] = torch.from_numpy(value.astype("float32"))
        return state

    def made(self, name: str) -> DiT:
        """The network of a case, by its switches; variances are its `rest`."""
        prefix = self.case(name)["param"]
        state = self.state(prefix)
        heads = self.json("parameters_json")[prefix]["architecture"]["num_heads"]
        network = DiT(**architecture(state, heads))
        kept = {key: value for key, value in state.items() if not key.startswith("feat_rope.")}
        network.load_state_dict(kept)
        return network


@pytest.fixture
def golden(golden_folder: Path) -> Forward:  # noqa: F811
    return Forward(golden_folder, "lightningdit_forward")


def names(folder: Path = Path(__file__).parent / "golden") -> list[str]:
    return [*Forward(folder, "lightningdit_forward").json("cases_json")]


@torch.no_grad()
@pytest.mark.parametrize("name", names())
def test_forward(golden: Forward, name: str):
    """Predictions with and without the label, and what stands on the way to them."""
    case, network = golden.case(name), golden.made(name)
    switches = dict(use_rope="rope", use_swiglu="swiglu", use_rmsnorm="rmsnorm")
    assert {k: network.arguments[k] for k in switches.values()} == {
        ours: case[theirs] for theirs, ours in switches.items()
    }
    assert network.arguments["shift"] != case["wo_shift"]
    qk_norm = (True if case["use_rmsnorm"] else "layer") if case["use_qknorm"] else False
    assert network.arguments["qk_norm"] == qk_norm
    x, t, y = golden[case["x"]], golden["t"], golden["y"]
    close(network(x, t, golden["y_null"]).velocity, golden[f"case/{name}/out_null"])
    seen: dict[str, Tensor] = {}
    for part in ("attn", "mlp"):
        module = getattr(network.blocks[0], part)
        module.register_forward_hook(
            lambda module, args, out, key=f"{part}_out.0": seen.update({key: out})
        )
    out = network(x, t, y, keep_hidden=range(network.depth))
    close(out.velocity, golden[f"case/{name}/out"])
    assert out.rest.shape[1] == (network.in_channels if case["learn_sigma"] else 0)
    seen |= {f"block_out.{i}": h for i, h in out.hidden.items()}
    seen |= {"t_emb": network.t_embedder(t), "y_emb": network.y_embedder(y)}
    seen["patch_embed"] = network.x_embedder(x)
    for key, value in seen.items():
        if f"case/{name}/{key}" in golden.arrays:
            close(value, golden[f"case/{name}/{key}"])


@pytest.mark.parametrize("patch", ["p1", "p2"])
def test_rotary_positions(golden: Forward, patch: str):
    q, rotated = golden[f"rope/{patch}/q"], golden[f"rope/{patch}/q_rotated"]
    rope = Rope(q.shape[3], round(q.shape[2] ** 0.5))
    cos, sin = golden[f"rope/{patch}/cos"], golden[f"rope/{patch}/sin"]
    close(rope.table[0], cos)
    close(rope.table[1].unflatten(1, (-1, 2)), sin.unflatten(1, (-1, 2)) * torch.tensor([-1, 1]))
    close(rotate(q, rope()), rotated)
    places = torch.tensor([[3, 1], [0, 3]])
    some = rotate(
        q.expand(2, -1, -1, -1).gather(2, places[:, None, :, None].expand(2, 2, 2, 16)),
        rope(places),
    )
    close(some[1, :, 1], rotated[0, :, 3])


@torch.no_grad()
def test_guidance(golden: Forward):
    """Scale and start of the interval; the reference guides the first three channels only."""
    for name, how in golden.json("cfg_json").items():
        case, network = golden.case(how["case"]), golden.made(how["case"])
        x, start = golden[case["x"]], how["cfg_interval_start"] or 0.0
        n = len(x)
        guidance = ClassifierFree(how["cfg_scale"], low=start)
        v = guidance.field(network, golden["y"], [])(x, how["t"], how["t"])
        theirs = golden[f"cfg/{name}/out"]
        close(v[:, :3], theirs[:n, :3], amplified=2 * how["cfg_scale"])
        close(theirs[n:, :3], theirs[:n, :3])


def written(golden: Forward, path: Path, name: str) -> str:
    """A file as it is published: weights of a wrapped module under "ema"."""
    state = golden.state(golden.case(name)["param"])
    torch.save({"ema": {f"module.{key}": value for key, value in state.items()}}, path)
    return str(path)


@torch.no_grad()
@pytest.mark.parametrize("name", ["paper.p1", "all_on.sigma", "all_off", "qknorm"])
def test_published_weights(golden: Forward, tmp_path: Path, name: str):
    """Are in our time and sign: v(x, t) = -v_theirs(x, 1 - t); no variance, no tables."""
    heads = None if "feat_rope.freqs_cos" in golden.state(golden.case(name)["param"]) else 4
    network = published_lightningdit(written(golden, tmp_path / "a.pt", name), heads)
    x, t, y = golden[golden.case(name)["x"]], golden["t"], golden["y"]
    out = network(x, 1 - t, y)
    close(out.velocity, -golden[f"case/{name}/out"])
    assert out.rest.shape[1] == 0
    again = DiT(**network.arguments)
    again.load_state_dict(network.state_dict())
    assert torch.equal(again(x, t, y).velocity, network(x, t, y).velocity)


@torch.no_grad()
def test_a_published_network_fine_tunes(golden: Forward, tmp_path: Path):
    """Other classes and another side; rotary positions are those of the new grid."""
    path = written(golden, tmp_path / "a.pt", "paper.p1")
    with pytest.warns(UserWarning, match="3 classes instead of 10.*|resampled from 64"):
        network = published_lightningdit(path, num_classes=3, input_size=4)
    assert torch.equal(network.context.rope.table, Rope(16, 4).table)
    y = torch.tensor([0, 3])
    out = network(torch.zeros(2, 8, 4, 4), torch.full((2,), 0.3), y).velocity
    assert torch.equal(out[0], out[1])  # every class begins as none


@torch.no_grad()
def test_what_else_a_file_holds_is_said(golden: Forward, tmp_path: Path):
    """What only taught it is dropped; other parts are named, and so are positions that lack."""
    path, state = tmp_path / "a.pt", golden.state("paper.p1/param/")
    with warnings.catch_warnings(action="error"):
        torch.save(state | {"projectors.0.weight": torch.ones(2)}, path)
        network = published_lightningdit(str(path))
    torch.save({key: x.bfloat16() for key, x in state.items()}, path)
    rounded = published_lightningdit(str(path)).state_dict()
    for name, x in network.state_dict().items():
        torch.testing.assert_close(rounded[name].float(), x, rtol=1e-2, atol=1e-3, msg=name)
    torch.save(state | {"final_layer_xr.linear.weight": torch.ones(2)}, path)
    with pytest.warns(UserWarning, match="left out final_layer_xr, which a DiT does not have"):
        published_lightningdit(str(path))
    torch.save({k: x for k, x in state.items() if not k.startswith("feat_rope")}, path)
    with pytest.warns(UserWarning, match="has no rotary positions"):
        published_lightningdit(str(path), num_heads=4)


def test_what_is_refused(golden: Forward, tmp_path: Path):
    path = tmp_path / "a.pt"
    state = golden.state("paper.p1/param/")
    torch.save(state | {"feat_rope.freqs_cos": state["feat_rope.freqs_cos"].roll(1, 0)}, path)
    with pytest.raises(UserError, match="^path=.*: must have rotary positions of a grid of 8x8$"):
        published_lightningdit(str(path))
    for wrong in (math.nan, 2e-3):
        torch.save(state | {"feat_rope.freqs_sin": state["feat_rope.freqs_sin"] + wrong}, path)
        with pytest.raises(UserError, match="must have rotary positions of a grid of 8x8$"):
            published_lightningdit(str(path))
    torch.save(state, path)
    with pytest.raises(UserError, match="^num_heads=2: must be null or 4"):
        published_lightningdit(str(path), num_heads=2)
    torch.save(state | {"blocks.1.mlp.w3.weight": torch.ones(64, 100)}, path)
    with pytest.raises(UserError, match=r"blocks.1.mlp.w3.weight, \(64, 170\) and not \(64, 100\)"):
        published_lightningdit(str(path))


@pytest.mark.slow
def test_published_weights_are_scored(command, tmp_path: Path):
    """The score of a run's checkpoint, from its weights in the form in which they are published."""
    switches = {"rope": True, "swiglu": True, "rmsnorm": True, "time_scale": -1, "time_shift": 1}
    options = [f"--model.network.init_args.{name}={value}" for name, value in switches.items()]
    run = command("fit", *options)
    network = saved_network(str(run / "checkpoints" / "last.ckpt"))
    state = network.state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = -state[key]
    cos, sin = network.context.rope.table.clone()
    sin[:, ::2] *= -1
    torch.save(state | {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}, tmp_path / "x.pt")
    made = {
        "path": str(tmp_path / "x.pt"),
        "num_heads": None,
        "num_classes": None,
        "input_size": None,
    }
    published = {"class_path": "w2s_train.models.published_lightningdit", "init_args": made}
    (tmp_path / "x.yaml").write_text(json.dumps({"model": {"network": published}}))
    scored = command("validate", "-c", str(tmp_path / "x.yaml"), folder="scored")
    one, other = (json.loads((folder / "scores.json").read_text()) for folder in (run, scored))
    assert one[-1]["value"] == other[-1]["value"]


@pytest.mark.slow
def test_a_run_goes_on_with_all_of_it(command):
    """Data predicted, class tokens, shifted timesteps and grid: bitwise, and exported."""
    shift = "w2s_train.time_shift.Shifted"
    inner = "{class_path: w2s_train.timesteps.LogitNormal}"
    options = [
        f"--model.objective.init_args.timesteps={{class_path: {shift}, init_args: "
        f"{{timesteps: {inner}, dim: 64}}}}",
        "--model.sampler={class_path: w2s_train.time_shift.ShiftedSampler, init_args: {dim: 64, "
        "sampler: {class_path: w2s_train.sampler.Euler, init_args: {steps: 4}}}}",
        "--model.network.init_args={rope: true, swiglu: true, rmsnorm: true, qk_norm: layer, "
        "shift: false, class_tokens: 2, data_on: linear}",
    ]
    whole = command("fit", *options, folder="whole")
    command("fit", *options, "--trainer.max_steps=3", folder="parts")
    parts = command("fit", *options, "--ckpt_path=last", folder="parts")
    states = [
        saved_network(str(folder / "checkpoints" / "last.ckpt")).state_dict()
        for folder in (whole, parts)
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    (score, *_) = json.loads((whole / "scores.json").read_text())
    assert score["protocol"]["sampler"] == "Shifted(0.125, Euler)"

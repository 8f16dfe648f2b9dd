"""Exported weights are the checkpoint's: bit for bit, and in diffusers to rounding."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, perturbed
from safetensors.torch import load_file

from w2s_train.autoencoder import StableDiffusionVAE
from w2s_train.cli import main
from w2s_train.command.export import export
from w2s_train.command.to_diffusers import rates_change
from w2s_train.errors import UserError
from w2s_train.guidance import Choice, ClassifierFree, Inbuilt, Unguided
from w2s_train.interpolant import LinearInterpolant
from w2s_train.models import DiT, saved_network
from w2s_train.module import DiffusionModule
from w2s_train.objective import WeakToStrongObjective
from w2s_train.sampler import Euler
from w2s_train.timesteps import Uniform

WITHOUT_LIGHTNING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "pytorch_lightning", "jsonargparse"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
"""


def save(folder: Path, name: str = "last", **options) -> Path:
    """A checkpoint as a run writes it, of networks that predict something."""
    sizes = dict(input_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=4, num_classes=10)
    network = DiT(**(sizes | options))
    state = {}
    for prefix in ("ema.module.", "network."):
        state |= {
            prefix + key: value.clone() for key, value in perturbed(network).state_dict().items()
        }
    content = dict(state_dict=state, network=network.arguments, global_step=7)
    content["progress"] = {"images_seen": 112}
    interpolant = {"class_path": "w2s_train.interpolant.LinearInterpolant"}
    objective = {"init_args": {"interpolant": interpolant}}
    content["hyper_parameters"] = {"objective": objective, "autoencoder": None}
    path = folder / "run" / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_lines_of_the_page(tmp_path: Path, weights: str):
    """They load the network in a process that cannot import Lightning; same velocities, bitwise."""
    path = save(tmp_path)
    main(
        ["export", "--ckpt_path", str(tmp_path / "run"), "--weights", weights]
        + ["--output", str(tmp_path / "exported")]
    )
    section = (ROOT / "docs" / "checkpoints.md").read_text().partition("\n## Export\n")[2]
    lines = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len(lines.splitlines()) <= 10
    script = f"{WITHOUT_LIGHTNING}\n{lines}\n"
    script += 'torch.save(dict(x_t=x_t, t=t, y=y, velocity=velocity), "out.pt")\n'
    script += 'assert "lightning" not in sys.modules\n'
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    network = saved_network(str(path), weights).eval()
    expected = network(out["x_t"], out["t"], out["y"]).velocity
    assert expected.abs().max() > 0
    assert torch.equal(out["velocity"], expected)


def test_scales_are_exported(tmp_path: Path, monkeypatch):
    """Rebuilt with the inputs and their first block; the page's loop samples as `Inbuilt` does."""
    path, laws = save(tmp_path, depth=4, scales=["head", "class"], scales_from=2), {}
    content = torch.load(path, weights_only=True)
    law = {"class_path": "w2s_train.inbuilt.UniformScale", "init_args": {"high": 0.75}}
    for name in ("head", "class"):
        laws[name] = {"low": 0.0, "high": 1.0, "scale": law}
    segments = [{"init_args": laws[name] | {"name": name}} for name in laws]
    fixed = {"init_args": {"low": 0.0, "high": 0.1, "scale": 0.3, "name": None}}
    objective = content["hyper_parameters"]["objective"]["init_args"]
    objective["segments"] = [*segments, fixed]
    torch.save(content, path)
    export(str(path), tmp_path / "exported")
    about = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert about["scales"] == laws
    assert (about["network"]["scales"], about["network"]["scales_from"]) == (["head", "class"], 2)
    section = (ROOT / "docs" / "checkpoints.md").read_text().partition("\n## Export\n")[2]
    load, loop, _ = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(loop.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    with torch.no_grad():
        exec(load, names)
        torch.manual_seed(1)
        exec(loop, names)
    ours = saved_network(str(path)).eval()
    guidance = Inbuilt({"class": Choice(0.3, 0.0, 0.2), "head": Choice(0.6, 0.2, 1.0)})
    guidance.bind(ours, WeakToStrongObjective(LinearInterpolant(), Uniform()))
    torch.manual_seed(1)
    noise, y = torch.randn(4, 1, 8, 8), torch.arange(4)
    x = Euler(25)(guidance.field(ours, y, Euler(25).times()), noise, lambda: noise)
    torch.testing.assert_close(names["x"], x.float(), rtol=1e-3, atol=1e-3)
    plain = Euler(25)(Unguided().field(ours, y, Euler(25).times()), noise, lambda: noise)
    assert (plain - x).abs().max() > 0.1


def test_weights_of_a_fit(tiny_run: Path, tmp_path: Path):
    folder = tiny_run
    main(["export", f"--ckpt_path={folder}", f"--output={tmp_path / 'out'}"])
    state = load_file(tmp_path / "out" / "model.safetensors")
    trained = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in state.items():
        assert torch.equal(value, trained[f"ema.module.{name}"]), name
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["step"], about["images_seen"], about["weights"]) == (6, 96, "ema")
    assert (about["num_classes"], about["null_class"], about["autoencoder"]) == (10, 10, None)
    assert about["interpolant"]["class_path"] == "w2s_train.interpolant.LinearInterpolant"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # others may read the weights as they may the text


@pytest.mark.parametrize(
    "scale, shift", [(1.0, 0.0), pytest.param(-1.0, 1.0, marks=pytest.mark.slow)]
)
def test_diffusers_predicts_the_same(tmp_path: Path, scale: float, shift: float):
    """The velocity, for times in [0, 1], all classes and the null class."""
    diffusers = pytest.importorskip("diffusers")
    sizes = dict(in_channels=4, input_size=16, hidden_size=48, num_heads=4)
    path = save(tmp_path, time_scale=scale, time_shift=shift, **sizes)
    export(str(path), tmp_path / "out", format="diffusers")
    assert not [file for file in (tmp_path / "out").iterdir() if file.suffix in (".bin", ".pt")]
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(
        str(tmp_path / "out" / "transformer"), use_safetensors=True, low_cpu_mem_usage=False
    ).eval()
    network = saved_network(str(path)).eval()
    t = torch.cat([torch.linspace(0, 1, 21), torch.rand(12)])
    x, y = torch.randn(len(t), 4, 16, 16), torch.arange(len(t)) % 11
    with torch.no_grad():
        ours = network(x, t, y).velocity
        other = theirs(x, timestep=t, class_labels=y).sample
    assert (ours - other).norm() <= 1e-5 * ours.norm()
    assert (ours - other).abs().max() <= 1e-4 * ours.abs().max()


def pipeline(folder: Path, **parts: object) -> object:
    """As docs/checkpoints.md loads it."""
    from diffusers import DiffusionPipeline

    made = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **parts)
    made.set_progress_bar_config(disable=True)
    return made


def module(path: Path, **options) -> DiffusionModule:
    """What would sample the exported weights here."""
    objective = WeakToStrongObjective(LinearInterpolant(), Uniform())
    ours = DiffusionModule(saved_network(str(path)), objective, Euler(7), **options)
    return ours.eval()


@pytest.mark.slow
def test_the_pipeline_samples_the_same_images(tmp_path: Path):
    """Pixels, unguided and guided: the images of our Euler, to a rounding of one grey level."""
    pytest.importorskip("diffusers")
    path = save(tmp_path)
    export(str(path), tmp_path / "out", format="diffusers")
    labels, seeds = [0, 3, 9, 10], [5, 6, 7, 8]
    for scale in (1.0, 2.5):
        expected = module(path, guidance=ClassifierFree(scale)).generate(seeds, labels)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = pipeline(tmp_path / "out")(
            labels, num_inference_steps=7, guidance_scale=scale, generator=generators
        )
        images = torch.stack([torch.from_numpy(np.array(image)) for image in made.images])
        assert (images.int() - expected[:, 0].int()).abs().max() <= 1
        assert images.float().std() > 20
    made, start = pipeline(tmp_path / "out"), torch.Generator()
    made.save_pretrained(tmp_path / "saved")
    again = pipeline(tmp_path / "saved", custom_pipeline=str(tmp_path / "out"))
    one, other = (
        np.array(each(labels, 3, generator=start.manual_seed(1)).images[0])
        for each, labels in ((made, [3]), (again, 3))
    )
    assert np.array_equal(one, other)  # an int is one label
    for options, message in (
        ({"class_labels": []}, "class_labels=.*: must be"),
        ({"class_labels": [3], "num_inference_steps": 0}, "steps=0: must be at least 1"),
        ({"class_labels": [3], "output_type": "pt"}, "output_type=pt: must be pil, np or latent"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**options)


@pytest.mark.slow
def test_the_pipeline_has_its_autoencoder(place: Path, tmp_path: Path, capsys):
    """Latents: decoded as here; where it cannot be found, that is said and it can be given."""
    diffusers = pytest.importorskip("diffusers")
    channels = diffusers.AutoencoderKL.from_pretrained(place / "vae").config.latent_channels
    path = save(tmp_path, in_channels=channels)
    content = torch.load(path, weights_only=True)
    arguments = {"path": str(place / "vae"), "channels": channels, "scale": 0.5}
    class_path = "w2s_train.autoencoder.StableDiffusionVAE"
    for folder, changed in (("out", {}), ("none", {"path": str(tmp_path / "nowhere")})):
        settings = {"class_path": class_path, "init_args": arguments | changed}
        content["hyper_parameters"]["autoencoder"] = settings
        torch.save(content, path)
        export(str(path), tmp_path / folder, format="diffusers")
    assert "must be given as vae" in capsys.readouterr().err
    expected = module(path, autoencoder=StableDiffusionVAE(**arguments)).generate([5], [3])
    vae = diffusers.AutoencoderKL.from_pretrained(place / "vae")
    for made in (pipeline(tmp_path / "out"), pipeline(tmp_path / "none", vae=vae)):
        (image,) = made([3], 7, generator=torch.Generator().manual_seed(5)).images
        image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert (image.int() - expected[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="vae: must be given"):
        pipeline(tmp_path / "none")([3], 2)


def test_the_change_of_rates_is_small():
    """What is trained stays as it is, but for a few thousandths."""
    assert (rates_change(1.0, 0.0) - torch.eye(256)).abs().max() < 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(qk_norm=True), "qk_norm=True: must be False"),
        (dict(rope=True), "rope=True: must be False"),
        (dict(mlp_ratio=2.0), "mlp_ratio=2.0: must be 4"),
        (dict(out_channels=2), "out_channels=2: must be 1"),
        (dict(scales=["head"]), r"network.scales=\['head'\]: must be none for format=diffusers"),
        (dict(time_scale=1000.0), "time_scale=1000.0: .* must be 1 or -1"),
    ],
)
def test_what_diffusers_cannot_be(tmp_path: Path, options: dict, message: str):
    pytest.importorskip("diffusers")
    with pytest.raises(UserError, match=message):
        export(str(save(tmp_path, **options)), tmp_path / "out", format="diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_without_diffusers(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="format=diffusers: needs diffusers"):
        export(str(save(tmp_path)), tmp_path / "out", format="diffusers")


BAD = {
    "missing file": (["--ckpt_path=none.ckpt"], "ckpt_path=none.ckpt: must be a checkpoint"),
    "url": (["--ckpt_path=https://x.org/a.ckpt"], "must be a local file, and no URL"),
    "foreign file": (["--ckpt_path=README.md"], "path=README.md: cannot be read"),
    "no checkpoint": (["--ckpt_path={tmp}/other.pt"], "must be a checkpoint of w2s_train"),
    "no path": (["--weights=ema"], "ckpt_path=null: must be given"),
    "unknown weights": (
        ["--ckpt_path={run}", "--weights=best"],
        "weights=best: must be ema or raw",
    ),
    "unknown format": (
        ["--ckpt_path={run}", "--format=onnx"],
        "format=onnx: must be safetensors or diffusers",
    ),
    "unknown option": (["--color=red"], "option=--color=red: must be one of --ckpt_path"),
    "no value": (["--ckpt_path"], "ckpt_path: expected one argument"),
    "output exists": (["--ckpt_path={run}", "--output={tmp}"], "must not exist yet"),
    "no folder": (["--ckpt_path={run}", "--output=/proc/none/x"], "must be a folder to write to"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line(case: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options, expected = BAD[case]
    run = save(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    options = [option.format(tmp=tmp_path, run=run) for option in options]
    with pytest.raises(SystemExit) as stop:
        main(["export", "--output", str(tmp_path / "out"), *options])
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert expected in message
    assert not (tmp_path / "out").exists()


def test_a_damaged_last_checkpoint_is_passed_over(tmp_path: Path, capsys):
    """As by `--ckpt_path last`; a copied folder without links will do."""
    save(tmp_path, "step-000002")
    newest = save(tmp_path, "step-000010")
    newest.write_bytes(newest.read_bytes()[:-100])
    arguments = ["export", "--ckpt_path", str(tmp_path / "run"), "--output"]
    main([*arguments, str(tmp_path / "exported")])
    said = capsys.readouterr().err
    assert str(newest) in said and "step-000002.ckpt" in said
    (tmp_path / "run/checkpoints/step-000002.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit, match="none is whole"):
        main([*arguments, str(tmp_path / "again")])

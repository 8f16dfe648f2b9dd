"""Files of strangers run no code, and secrets are written nowhere (faults row 19).

Every case would make a sentinel file, if it worked; it ends with one line and status 1 instead.
"""

import contextlib
import functools
import http.server
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, quick, sources
from refusals import MINIMAL, parsers_built_once, refusal
from shard_files import npy, png
from torch import nn

from w2s_train.cli import main
from w2s_train.errors import UserError
from w2s_train.module import DiffusionModule
from w2s_train.secrets import redacted
from w2s_train.shards import ShardWriter


class Call:
    """Unpickled, it makes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = str(sentinel)

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.sentinel}",))


@pytest.fixture
def sentinel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that must not be made; also by an importable package that makes it when imported."""
    path = tmp_path / "sentinel"
    package = tmp_path / "packages" / "strange_package"
    package.mkdir(parents=True)
    code = f"open({str(path)!r}, 'w')\n"
    code += "class Thing:\n    def __init__(self, **options):\n        pass\n"
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(package.parent))
    yield path
    assert not list(tmp_path.glob("sentinel*"))
    assert "strange_package" not in sys.modules


NETWORK = "model: {network: {class_path: %s, init_args: %s}}"
SCHEDULER = "torch.optim.lr_scheduler.LambdaLR"
STRANGE = "class_path: strange_package.Thing"
ALLOWS = ["--allow_imports"]
# Configs, and what the line must hold. SENTINEL stands for the file.
YAML = {
    "python tag": ("model: !!python/object/apply:os.system ['touch SENTINEL']", ["must be YAML"]),
    "os.system": (NETWORK % ("os.system", "{command: touch SENTINEL}"), ["os.system", *ALLOWS]),
    "Popen": (
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: "
        "{args: 'touch SENTINEL', shell: true}}]}",
        ["subprocess.Popen", *ALLOWS],
    ),
    "torch.hub": (
        NETWORK % ("torch.hub.load", "{repo_or_dir: DIR, model: x, source: local}"),
        ["torch.hub.load", *ALLOWS],
    ),
    "torch.load": (NETWORK % ("torch.load", "{f: DIR/evil.pt}"), ["torch.load", *ALLOWS]),
    "eval": (
        "model: {optimizer: {class_path: builtins.eval, init_args: {source: 'print(1)'}}}",
        ["builtins.eval", *ALLOWS],
    ),
    "pathlib": ("model: {scheduler: pathlib.Path.touch}", ["pathlib.Path.touch", *ALLOWS]),
    "partial": (
        "model: {scheduler: {class_path: torch.optim.lr_scheduler.partial, "
        "init_args: {func: os.system}}}",
        ["functools.partial"],
    ),
    "lambda": (
        "model: {scheduler: {class_path: torch.optim.lr_scheduler.LambdaLR, "
        "init_args: {lr_lambda: os.system}}}",
        ["os.system"],
    ),
    "by way of ours": (
        NETWORK % ("w2s_train.features.base.os.system", "{command: touch SENTINEL}"),
        ["class_path=posix.system", *ALLOWS],
    ),
    "a part of ours": (
        NETWORK % ("w2s_train.shards.storage._run_pipe", "{url: 'pipe:touch SENTINEL'}"),
        ["_run_pipe", *ALLOWS],
    ),
    "a function": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: "
        "{on_fit_start: {class_path: w2s_train.features.base.fetched, "
        "init_args: {target: SENTINEL, download: w2s_train.features.base.digest}}}}]}",
        ["fetched: must be a class, or a function that makes a network", *ALLOWS],
    ),
    "a connection": (
        "model: {scheduler: {class_path: torch.optim.lr_scheduler.LambdaLR, init_args: {lr_lambda: "
        "{class_path: lightning.fabric.plugins.collectives.TorchCollective.init_group, "
        "dict_kwargs: {init_method: 'file://SENTINEL', world_size: 1, rank: 0}}}}}",
        ["init_group: must be a class", *ALLOWS],
    ),
    "a method": (
        "model: {optimizer: {class_path: lightning.fabric.plugins.TorchCheckpointIO."
        "load_checkpoint, init_args: {path: DIR/evil.pt, weights_only: false}}}",
        ["load_checkpoint: must be a class", *ALLOWS],
    ),
    "remote": ("model: local://DIR/nested.yaml", ["model", "local://"]),
    "text": (
        "model: {optimizer: {class_path: torch.optim.AdamW, dict_kwargs: "
        "{a: {class_path: strange_package.Thing}}}}",
        ["optimizer: "],
    ),
    "callback": (f"trainer: {{callbacks: {{{STRANGE}}}}}", ["strange_package", *ALLOWS]),
    "logger": (f"trainer: {{logger: {{{STRANGE}}}}}", ["strange_package", *ALLOWS]),
    "strategy": (f"trainer: {{strategy: {{{STRANGE}}}}}", ["strange_package", *ALLOWS]),
    "plugins": (f"trainer: {{plugins: [{{{STRANGE}}}]}}", ["strange_package", *ALLOWS]),
    "profiler": (f"trainer: {{profiler: {{{STRANGE}}}}}", ["strange_package", *ALLOWS]),
    "optimizer": ("model: {optimizer: strange_package.Thing}", ["strange_package", *ALLOWS]),
    "nested file": ("model: DIR/nested.yaml", ["strange_package", *ALLOWS]),
    "a config allows nothing": ("allow_imports: strange_package", ["allow_imports"]),
    "a script elsewhere": ("data: {prepare: ../../DIR/evil}", ["prepare=", "must be one of"]),
    "pipe": (
        "data: {prepare: null, allow_pipe: true, train_urls: 'pipe:touch SENTINEL'}",
        ["data.allow_pipe=true: must be given on the command line"],
    ),
    "chained url": (
        "data: {prepare: null, train_urls: 'reference://a.tar::file://DIR/evil.json'}",
        ["must begin with one of http"],
    ),
}


@pytest.mark.fault("19  malicious input")
@pytest.mark.parametrize("case", quick(YAML, *list(YAML)[::3]))
def test_configs(case: str, digits: None, sentinel: Path, tmp_path: Path):
    text, expected = YAML[case]
    (tmp_path / "evil.py").write_text(f"def prepare(): open({str(sentinel)!r}, 'w')\n")
    (tmp_path / "hubconf.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    torch.save(Call(sentinel), tmp_path / "evil.pt")
    (tmp_path / "nested.yaml").write_text("network: {class_path: strange_package.Thing}\n")
    config = tmp_path / "config.yaml"
    config.write_text(text.replace("SENTINEL", str(sentinel)).replace("DIR", str(tmp_path)))
    message = refusal(tmp_path / "run", "-c", str(config))
    for part in expected:
        assert part in message, message


OF_A_RUN = {
    "pipe": (
        "data: {prepare: null, allow_pipe: true, train_urls: 'pipe:touch SENTINEL'}",
        "data.allow_pipe=true: must be given on the command line",
    ),
    "a folder that says so": (
        "data: {prepare: null, allow_pipe: true, train_urls: 'pipe:touch SENTINEL'}",
        "data.allow_pipe=true: must be given on the command line",
    ),
    "import": (
        "model: {optimizer: strange_package.Thing}",
        "--allow_imports=strange_package allows",
    ),
    "the switch": ("allow_imports: strange_package", "allow_imports"),
}


@pytest.mark.fault("19  malicious input")
@pytest.mark.parametrize("case", quick(OF_A_RUN))
def test_the_config_beside_a_checkpoint(case: str, digits: None, sentinel: Path, tmp_path: Path):
    """It is read without being named, and may no more than one that is."""
    text, expected = OF_A_RUN[case]
    run = tmp_path / ("x --data.allow_pipe=true y" if case == "a folder that says so" else "run")
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    config = yaml.safe_load(MINIMAL.read_text())
    for key, part in yaml.safe_load(text.replace("SENTINEL", str(sentinel))).items():
        config[key] = config.get(key, {}) | part if isinstance(part, dict) else part
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for checkpoint in (run, run / "checkpoints" / "last.ckpt"):
        with parsers_built_once(), contextlib.chdir(ROOT), pytest.raises(SystemExit) as stop:
            main(["sample", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "out")])
        message = str(stop.value.code)
        assert expected in message and "\n" not in message, message


@pytest.mark.fault("19  malicious input")
@pytest.mark.parametrize(
    "option",
    [
        "--model.network=strange_package.Thing",
        "--model.network.class_path=os.system",
        "--trainer.callbacks={class_path: strange_package.Thing}",
        "--trainer.logger+=strange_package.Thing",
        "--model.optimizer=os.system",
        "--model.guidance={class_path: strange_package.Thing}",
        "--ckpt_path=http://127.0.0.1:1/a.ckpt",
        "--ckpt_path=file:///etc/a.ckpt",
        "--ckpt_path=s3://bucket/a.ckpt",
    ],
)
def test_options(option: str, sentinel: Path, tmp_path: Path):
    refusal(tmp_path / "run", option)


@pytest.mark.slow
def test_the_switch_allows(command, tmp_path: Path, monkeypatch):
    """On the command line, for packages by name; also beside others."""
    (tmp_path / "my_callbacks.py").write_text(
        "from lightning import Callback\n"
        "class Note(Callback):\n"
        f"    def on_fit_start(self, *args): open({str(tmp_path / 'note')!r}, 'w')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    callback = "--trainer.callbacks={class_path: my_callbacks.Note}"
    message = refusal(tmp_path / "run", callback)
    assert "class_path=my_callbacks.Note" in message and "--allow_imports=my_c" in message
    for package in ("a b", "jsonargparse"):
        message = refusal(tmp_path / "run", callback, f"--allow_imports={package}")
        assert "must name packages" in message
    command("fit", callback, "--allow_imports", "other_package,my_callbacks")
    assert (tmp_path / "note").is_file()


# ---- checkpoints -------------------------------------------------------------------------------


def weak(path: Path) -> str:
    entry = f"{{class_path: w2s_train.weak.Checkpoint, init_args: {{path: {path}}}}}"
    arguments = f"{{low: 0.0, high: 1.0, scale: 0.3, weak: {entry}}}"
    segment = f"{{class_path: w2s_train.segment.Extrapolation, init_args: {arguments}}}"
    return f"--model.objective.init_args.segments=[{segment}]"


def guidance(path: Path) -> str:
    entry = f"{{class_path: w2s_train.weak.Checkpoint, init_args: {{path: {path}}}}}"
    arguments = f"{{scale: 1.5, weak: {entry}}}"
    return (
        f"--model.guidance={{class_path: w2s_train.guidance.Autoguidance, init_args: {arguments}}}"
    )


def learned(path: Path) -> str:
    arguments = f"{{path: {path}}}"
    return f"--model.guidance={{class_path: w2s_train.guidance.Learned, init_args: {arguments}}}"


def published(path: Path) -> str:
    arguments = f"{{path: {path}}}"
    return f"--model.network={{class_path: w2s_train.models.published_sit, init_args: {arguments}}}"


def start(path: Path) -> str:
    return f"--ckpt_path={path}"


USES = {  # a command, and its option
    "fit": ("fit", start),
    "validate": ("validate", start),
    "sample": ("sample", start),
    "weak source": ("fit", weak),
    "autoguidance": ("fit", guidance),
    "learned guidance": ("fit", learned),
    "published": ("fit", published),
}


@pytest.mark.fault("19  malicious input")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("form", quick(["zip", "legacy", "pickle", "script"]))
def test_checkpoints(use: str, form: str, digits: None, sentinel: Path, tmp_path: Path):
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": {}, "network": {}, "global_step": 1, "evil": Call(sentinel)}
    if form == "script":
        torch.jit.script(Writes(str(sentinel))).save(str(path))
    elif form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    name, option = USES[use]
    if "Checkpoint" in option(path):
        assert sources.Checkpoint
    grid = ["--trainer.callbacks=w2s_train.callbacks.SampleGrid"] * (name == "validate")
    message = refusal(tmp_path / "out", option(path), *grid, name=name)
    assert f"path={path}: " in message, message


@pytest.mark.fault("19  malicious input")
def test_export_reads_no_pickle(sentinel: Path, tmp_path: Path):
    torch.save({"state_dict": {}, "network": {}, "evil": Call(sentinel)}, tmp_path / "evil.ckpt")
    options = [f"--ckpt_path={tmp_path / 'evil.ckpt'}", f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit, match="^error: path=.*evil.ckpt: cannot be read"):
        main(["export", *options])


@pytest.fixture
def trained(command) -> dict[str, Any]:
    return torch.load(command("fit") / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.fault("19  malicious input")
def test_settings_of_checkpoints(trained: dict[str, Any], sentinel: Path, tmp_path: Path):
    """What a checkpoint wants to be built by and of, which Lightning's own loading follows."""
    path, settings = tmp_path / "evil.ckpt", trained["hyper_parameters"]
    evil = {"class_path": "os.system", "init_args": {"command": f"touch {sentinel}"}}
    arguments = {"target": str(sentinel), "download": "w2s_train.features.base.digest"}
    call = {"class_path": "w2s_train.features.base.fetched", "init_args": arguments}
    changes = [
        {"network": evil},
        {"autoencoder": {"class_path": "strange_package.Thing"}},
        {"_class_path": "strange_package.Thing"},
        {"guidance": [evil]},
        {"optimizer": "strange_package.Thing"},
        {"scheduler": evil},
        {"scheduler": {"class_path": SCHEDULER, "init_args": {"lr_lambda": call}}},
    ]
    for change in changes:
        torch.save(trained | {"hyper_parameters": settings | change}, path)
        with pytest.raises(UserError, match="path=.*: must fit its own settings"):
            DiffusionModule.load_from_checkpoint(path)
    named = settings | {"_instantiator": "strange_package.Thing"}
    torch.save(trained | {"hyper_parameters": named}, path)
    state = DiffusionModule.load_from_checkpoint(path).state_dict()
    assert all(torch.equal(value, trained["state_dict"][name]) for name, value in state.items())


@pytest.mark.fault("19  malicious input")
def test_load_from_checkpoint_reads_no_pickle(sentinel: Path, tmp_path: Path):
    torch.save({"state_dict": {}, "evil": Call(sentinel)}, tmp_path / "evil.ckpt")
    for options in ({}, {"weights_only": False}):
        with pytest.raises(UserError, match="cannot be read"):
            DiffusionModule.load_from_checkpoint(tmp_path / "evil.ckpt", **options)
    for url in ("http://127.0.0.1:1/a.ckpt", "https:/host/a", "s3://b/a", "file:///a"):
        with pytest.raises(UserError, match="must be a local file, and no URL"):
            DiffusionModule.load_from_checkpoint(url)


# ---- shards ------------------------------------------------------------------------------------


def members(path: Path, *entries: tuple[str, bytes | str]) -> None:
    """A tar of files (bytes) and of symbolic links (text)."""
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.mark.slow
@pytest.mark.fault("19  malicious input")
def test_pickles_in_shards(command, sentinel: Path, tmp_path: Path):
    """Members that webdataset's decoders would unpickle lie beside the images, and are not read."""
    evil = pickle.dumps(Call(sentinel))
    entries = []
    for i in range(40):
        image = png(np.zeros((8, 8), np.uint8))
        fields = {"png": image, "cls": str(i % 10).encode()}
        fields |= dict.fromkeys(("pyd", "pickle", "pkl", "pth", "pt"), evil)
        entries += [(f"{i:04d}.{field}", content) for field, content in fields.items()]
    members(tmp_path / "train-000000.tar", *entries)
    options = ["--data.prepare=null", f"--data.train_urls={tmp_path}/train-000000.tar"]
    folder = command("fit", *options, "--trainer.callbacks=[]", "--data.num_workers=0")
    assert (folder / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.fault("19  malicious input")
def test_arrays_in_shards(command, sentinel: Path, tmp_path: Path):
    """NumPy would unpickle arrays of objects."""
    file = io.BytesIO()
    np.save(file, np.array([Call(sentinel)], dtype=object), allow_pickle=True)
    entries = [
        (f"{i}.{f}", c) for i in range(20) for f, c in (("npy", file.getvalue()), ("cls", b"1"))
    ]
    members(tmp_path / "train-000000.tar", *entries)
    options = ["--data.prepare=null", f"--data.train_urls={tmp_path}/train-000000.tar"]
    with pytest.raises(SystemExit, match="^error: .*"):
        command("fit", *options, "--trainer.callbacks=[]", "--data.num_workers=0")


@pytest.mark.slow
@pytest.mark.fault("19  malicious input")
@pytest.mark.parametrize("kind", ["fit", "prepare"])
def test_paths_in_shards(kind: str, command, sentinel: Path, tmp_path: Path):
    """Members that climb out of the folder, and links, are samples by name or nothing."""
    image = png(np.zeros((8, 8), np.uint8))
    inner = tmp_path / "in" / "deep"
    inner.mkdir(parents=True)
    entries: list[tuple[str, bytes | str]] = [("../../sentinel", b"x"), (str(sentinel), b"x")]
    entries += [("link.png", str(sentinel)), ("link.cls", "/etc/passwd")]
    for i in range(20):
        entries += [(f"../../sentinel{i}.png", image), (f"../../sentinel{i}.cls", b"1")]
    members(inner / "train-000000.tar", *entries)
    if kind == "fit":
        options = ["--data.prepare=null", f"--data.train_urls={inner}/train-000000.tar"]
        with pytest.raises(SystemExit):
            command("fit", *options, "--data.num_workers=0", "--trainer.callbacks=[]")
            sys.exit(0)  # to train on the samples is fine, too
    else:
        script = [sys.executable, "data/prepare.py", "shards", str(inner / "train-000000.tar")]
        done = subprocess.run(
            [*script, "--output", str(inner / "out")], cwd=ROOT, capture_output=True, check=False
        )
        assert b"Traceback" not in done.stderr
    assert not list(tmp_path.glob("sentinel*"))


# ---- statistics and weights --------------------------------------------------------------------


@pytest.mark.fault("19  malicious input")
def test_references(sentinel: Path, tmp_path: Path):
    path = tmp_path / "reference.npz"
    with open(path, "wb") as file:
        np.savez(file, mu=np.array([Call(sentinel)], dtype=object), sigma=np.eye(1), n=1)
    callback = (
        f"{{class_path: w2s_train.callbacks.FID, init_args: {{reference: {path}, features: "
        "{class_path: w2s_train.features.ClassifierFeatures, "
        "init_args: {weights: data/digits/classifier.safetensors}}}}"
    )
    options = ["--data.prepare=null", f"--trainer.callbacks={callback}"]
    message = refusal(tmp_path / "run", *options)
    assert "reference=" in message and "cannot be read" in message


class Writes(nn.Module):
    """TorchScript that writes a file when it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.slow
@pytest.mark.fault("19  malicious input")
@pytest.mark.parametrize("name", ["ClassifierFeatures", "InceptionFeatures", "ADMFeatures"])
@pytest.mark.parametrize("form", ["script", "pickle"])
def test_weights_of_extractors(name: str, form: str, digits: None, sentinel: Path, tmp_path: Path):
    path = tmp_path / "weights.pt"
    if name == "ADMFeatures":
        pytest.importorskip("torch_fidelity")
    if form == "script":
        torch.jit.script(Writes(str(sentinel))).save(str(path))
    else:
        torch.save({"evil": Call(sentinel)}, path)
    callback = (
        "{class_path: w2s_train.callbacks.FID, init_args: {reference: data/digits/reference.npz, "
        f"features: {{class_path: w2s_train.features.{name}, init_args: {{weights: {path}}}}}}}}}"
    )
    options = ["--data.prepare=null", f"--trainer.callbacks={callback}"]
    assert f"weights={path}" in refusal(tmp_path / "run", *options)


@pytest.mark.fault("19  malicious input")
def test_weights_of_autoencoders(place: Path, sentinel: Path, tmp_path: Path):
    from w2s_train.autoencoder import load_autoencoder

    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_bytes((place / "vae" / "config.json").read_bytes())
    torch.save({"evil": Call(sentinel)}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="path=.*: must be a folder with an AutoencoderKL"):
        load_autoencoder(str(folder), "path")


# ---- secrets -----------------------------------------------------------------------------------

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/a.tar",
        f"https://user:p@{SECRET}@host/a.tar",
        f"s3://{SECRET}@bucket/a.tar",
        f"https://host/a.tar?token={SECRET}&x=1",
        f"https://host/a.tar?x=1&X-Amz-Signature={SECRET}",
        f"https://host/a.tar?X-Amz-Credential=A/b/{SECRET}&sig={SECRET}&key={SECRET}",
        f"--logger.api_key={SECRET}",
        f"error: unrecognized arguments: --logger.api_key {SECRET}",
        f"{{'password': '{SECRET}'}}",
        f'{{"access_key": "{SECRET}"}}',
        f"aws_secret_access_key={SECRET}: must be",
        f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://host/a.tar",
        f"Bearer {SECRET}",
        f"the token hf_{SECRET}abcdefghijklmnop",
        {"pwd": SECRET},
        ["--logger.api_key", SECRET],
        ["--logger", f"{{class_path: A, init_args: {{api_key: {SECRET}}}}}"],
        {"logger": [{"init_args": {"api_key": SECRET, "hf_token": SECRET}}]},
    ],
)
def test_redacted(text: Any):
    assert SECRET not in str(redacted(text))
    assert "***" in str(redacted(text))


@pytest.mark.parametrize(
    "text",
    [
        "https://host/a.tar?version=3",
        "timm vit sha256:abc, class token, resize bicubic 224",
        "hf://datasets/owner/name@main/a.tar",
        "data.train_urls=data/digits/*.tar: must name existing files",
        {"monkey": "a", "num_tokens": 3, "author": "b", "steps": 4, "token": None},
    ],
)
def test_the_rest_stays(text: Any):
    assert redacted(text) == text


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.mark.fault("19  secrets in a config")
@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["query", *(pytest.param(w, marks=pytest.mark.long) for w in ("user", "missing"))]
)
def test_secrets_are_written_nowhere(where: str, digits: None, tmp_path: Path):
    """A fit with secrets in its URL, its logger and its command: no file and no line holds them."""
    served = tmp_path / "served" / "digits"
    served.mkdir(parents=True)
    for shard in range(2):
        with ShardWriter(served / f"train-{shard}.tar") as writer:
            for i in range(20):
                broken = b"broken" if i == 7 else None  # is reported, and counted in checkpoints
                writer.write(
                    f"{shard}{i:03d}", i % 10, npy=broken or npy(np.zeros((1, 8, 8), "f4"))
                )
    handler = functools.partial(Quiet, directory=str(served.parent))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    name = "none" if where == "missing" else "train"
    url = f"http://{host}/digits/{name}-{{0..1}}.tar?token={SECRET}a&X-Amz-Signature={SECRET}b"
    if where == "user":
        url = f"http://someone:{SECRET}c@{host}/digits/{name}-{{0..1}}.tar"
    (tmp_path / "secret_logger.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n"
        "class Secret(CSVLogger):\n"
        "    def __init__(self, save_dir: str, api_key: str, password: str) -> None:\n"
        "        super().__init__(save_dir)\n"
    )
    run = tmp_path / "run"
    arguments = f"{{save_dir: {run}, api_key: {SECRET}d, password: {SECRET}e}}"
    command = [sys.executable, "-m", "w2s_train", "fit", "-c", "configs/digits_w2s.yaml"]
    command += ["-c", "tests/tiny.yaml", "--trainer.default_root_dir", str(run)]
    command += ["--data.prepare=null", f"--data.train_urls={url}", "--data.max_skipped=1"]
    command += ["--allow_imports=secret_logger", "--data.num_workers=1"]
    command += [f"--trainer.logger={{class_path: secret_logger.Secret, init_args: {arguments}}}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--trainer.logger.init_args.api_key", f"{SECRET}f"],
        cwd=ROOT,
        env=environment | {"W2S_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    server.shutdown()
    assert (done.returncode == 0) == (where != "missing"), done.stderr
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in run.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    if where != "missing":
        assert {"config.yaml", "environment.json", "scores.json", "last.ckpt"} <= names
        assert "samples skipped" in done.stdout + done.stderr
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        assert SECRET not in str(path)

"""Shared fixtures and options."""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import BRANCH, write_run

import w2s_train.weak
from w2s_train.features import FeatureExtractor
from w2s_train.features.frechet import Moments
from w2s_train.models import DiT
from w2s_train.shards import Storage

pytest_plugins = ["tally"]
ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("W2S_SHARED", ROOT.parent / "shared"))

# Tensors are small here, and threads that wait for a busy core cost far more than they bring.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder with sit_forward.npz, dit_forward.npz, samplers.npz and w2s_loss.npz",
    )


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Skips what needs an extra that is not there, before its files are imported."""
    if module_path.parent.name == "text2image" and not find_spec("transformers"):
        pytest.skip("needs the extra [text2image]")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What CONTRIBUTING.md limits; a machine that others use, too, shows more."""
    terminalreporter.write_line(f"{sum(os.times()[:4]):.0f} s of processor time")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables and downloads of one session; not the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("W2S_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small autoencoder, three shards of ten images, and their latents."""
    from vae import encode, save_vae, write_images

    folder = tmp_path_factory.mktemp("latents")
    save_vae(folder / "vae")
    write_images(folder / "images")
    encode(folder, folder / "whole")
    return folder


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 pipeline of random parts; not to be written to."""
    from pipeline import make

    return make(tmp_path_factory.mktemp("sd3"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """Of shards, with a cache of its own."""
    return Storage(tmp_path / "cache")


WEAK_FILES = {
    "NullClass": "null_class",
    "EMA": "ema",
    "Checkpoint": "checkpoint",
    "Snapshot": "checkpoint",
    "IntermediateHead": "intermediate_head",
    "LayerSkip": "layer_skip",
    "CoTrained": "co_trained",
    "RandomBlocks": "random_blocks",
    "ShiftedTime": "shifted_time",
    "PerturbedTime": "perturbed_time",
    "RandomLabel": "random_label",
    "ShuffledTokens": "shuffled_tokens",
    "DroppedTokens": "dropped_tokens",
}


class Sources:
    """The classes of `w2s_train.weak`; a test that uses one whose file is gone is skipped."""

    def __getattr__(self, name: str) -> type:
        try:
            return getattr(w2s_train.weak, name)
        except AttributeError:
            file = WEAK_FILES.get(name)
            if file is None or (ROOT / "w2s_train/weak" / f"{file}.py").is_file():
                raise  # no such class: a mistake, and not a deleted source
            pytest.skip(f"no weak source {name}")


sources = Sources()


def quick(cases: Iterable[Any], *first: Any) -> list[Any]:
    """Cases of a parametrized test, all but the first of which, or those given, are slow."""
    known = list(cases)
    kept = first or known[:1]
    assert all(each in known for each in kept), kept
    slow = pytest.mark.slow
    return [each if each in kept else pytest.param(each, marks=slow) for each in known]


def perturbed(network: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Add noise to every parameter: an untouched adaLN-Zero network predicts 0 and hides bugs."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
    return network


def shared(name: str) -> Path:
    """A file of ``../shared``; a test that needs it is skipped where there is none."""
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"no {path}; set W2S_SHARED")
    return path


def images(n: int, channels: int = 3, size: int = 16) -> torch.Tensor:
    """Random images (n, channels, size, size) uint8."""
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8)


def moments(x: torch.Tensor) -> Moments:
    """Of features (N, F)."""
    x = x.double()
    return Moments.from_sums(x.sum(0), x.T @ x, len(x))


def loaded(extractor: FeatureExtractor) -> FeatureExtractor:
    """The extractor, with its weights."""
    extractor.load()
    return extractor


@pytest.fixture
def network() -> DiT:
    """Four blocks of width 32 on 8x8 images with 3 channels and 5 classes."""
    return perturbed(
        DiT(input_size=8, in_channels=3, hidden_size=32, depth=4, num_heads=4, num_classes=5)
    )


@pytest.fixture(scope="session")
def digits() -> None:
    """Make the digits' shards, as the first fit does."""
    from w2s_train.datamodule import ShardDataModule

    with contextlib.chdir(ROOT):
        options = dict(num_classes=10, batch_size=1, prepare="digits")
        ShardDataModule("data/digits/*.tar", **options).prepare_data()


def lightning(
    name: str, folder: Path, *options: str, config: str = "digits_w2s", tiny: bool = True
) -> Path:
    """Run ``lightning NAME ...`` in this process, on a tiny config; gives the run's folder."""
    from refusals import parsers_built_once

    from w2s_train.cli import main

    files = [f"configs/{config}.yaml", *(["tests/tiny.yaml"] if tiny else [])]
    arguments = [option for file in files for option in ("-c", file)]
    with contextlib.chdir(ROOT), parsers_built_once():
        main([name, *arguments, "--trainer.default_root_dir", str(folder), *options])
    return folder


@pytest.fixture
def command(digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run ``lightning COMMAND ...``, by default in ``tmp_path``/run."""
    monkeypatch.chdir(ROOT)

    def run(name: str, *options: str, folder: str = "run", **which: object) -> Path:
        return lightning(name, tmp_path / folder, *options, **which)

    return run


@pytest.fixture(scope="session")
def fits(digits: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a fit with some options, which is made once in a session; not to be changed.

    To be called before a test changes anything, such as what a function does.
    """

    @functools.cache
    def fit(*options: str) -> Path:
        with torch.random.fork_rng(devices=[]):
            return lightning("fit", tmp_path_factory.mktemp("fit") / "run", *options)

    return fit


@pytest.fixture
def tiny_run(fits: Callable[..., Path], tmp_path: Path) -> Path:
    """What ``command("fit")`` leaves in ``tmp_path``/run, as a copy of what one fit has made."""
    return shutil.copytree(fits(), tmp_path / "run", symlinks=True)


@pytest.fixture
def arms(tmp_path: Path) -> list[Path]:
    """Two seeds of a baseline, and of an arm that is better and takes twice as long a step."""
    write = functools.partial(write_run, pace=0.2, segments=BRANCH)
    return [
        write_run(tmp_path / "runs" / "none-0", 0, (8.0, 4.0, 2.0), grid=0),
        write_run(tmp_path / "runs" / "none-1", 1, (8.0, 4.0, 2.02), grid=80),
        write(tmp_path / "runs" / "branch-0", 0, (4.0, 1.0, 0.5), grid=160),
        write(tmp_path / "runs" / "branch-1", 1, (4.0, 1.0, 0.52), grid=240),
    ]


@pytest.fixture
def make(tmp_path: Path):
    """Write one more run beside those of ``arms``."""
    return lambda name, *args, **options: write_run(tmp_path / "runs" / name, *args, **options)


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Run ``lightning compare``; gives comparison.json and what was printed."""
    from w2s_train.cli import main

    def run(*args: object) -> tuple[dict, str]:
        main(["compare", *map(str, args), "--output", str(tmp_path / "out")])
        content = json.loads((tmp_path / "out" / "comparison.json").read_text())
        return content, capsys.readouterr().out

    return run

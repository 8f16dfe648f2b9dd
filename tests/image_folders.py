"""Images of all sorts, and the command that turns them into shards, for tests."""

import contextlib
import importlib.util
import io
import resource
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from conftest import ROOT
from PIL import Image

from w2s_train.shards.samples import read_shard

SCRIPT = ROOT / "data" / "prepare.py"
ORIENTATION = 0x0112


def encode(pixels: np.ndarray | Image.Image, kind: str = "png", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def samples(folder: Path, split: str = "train") -> list[dict]:
    return [sample for path in sorted(folder.glob(f"{split}-*.tar")) for sample in read_shard(path)]


def written(folder: Path) -> dict[str, bytes]:
    """All files but locks."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix != ".lock"]
    return {path.name: path.read_bytes() for path in paths}


def write_tar(path: Path, *members: dict) -> Path:
    with open(path, "wb") as file, contextlib.closing(wds.TarWriter(file, encoder=False)) as tar:
        for number, fields in enumerate(members):
            tar.write({"__key__": f"{number:03d}", **fields})
    return path


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Files cannot grow beyond this many bytes; as a full disk, but with another message."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def preparer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command in this process; gives what it printed."""
    spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args)])
        module.main()
        return capsys.readouterr().out

    return run


def bomb() -> bytes:
    """A PNG whose header asks for 400 million pixels."""
    content = bytearray(encode(np.zeros((1, 1), np.uint8)))
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + content[24:29]
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    return bytes(content)


BROKEN = {
    "empty.png": (b"", "empty file"),
    "text.jpg": (b"no image at all", "no image of a known type"),
    "cut.jpg": (encode(noise(64, 64, 3), "jpeg")[:900], "truncated"),
    "cut.png": (encode(noise(64, 64, 3))[:900], "OSError|truncated|SyntaxError"),
    "bomb.png": (bomb(), "DecompressionBombError"),
    "float.tiff": (encode(noise(8, 8).astype(np.float32), "tiff"), "floating-point"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known"),
}


def write_messy(folder: Path) -> None:
    """Three classes of images of all sorts, seven broken ones, and files that are none."""
    for name in ("ant", "bee/nested/deep", "cow", ".git"):
        (folder / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    files = {
        "ant/a.PNG": encode(noise(40, 50, 3)),
        "ant/b.jpeg": encode(noise(33, 20, 3), "jpeg"),
        "ant/grey.png": encode(noise(40, 40)),
        "ant/sixteen.png": encode(noise(40, 40).astype(np.uint16) * 256),
        "bee/c.webp": encode(noise(32, 32, 3), "webp"),
        "bee/nested/d.gif": encode(noise(50, 40), "gif"),
        "bee/nested/deep/e.bmp": encode(noise(20, 90, 3), "bmp"),
        "bee/f.tif": encode(noise(45, 40, 3), "tiff"),
        "cow/cmyk.jpg": encode(Image.fromarray(noise(40, 40, 4), "CMYK"), "jpeg"),
        "cow/palette.png": encode(Image.fromarray(noise(40, 40, 4)).quantize(8)),
        "cow/turned.jpg": encode(noise(30, 70, 3), "jpeg", exif=exif),
        "cow/ready.png": encode(noise(16, 16, 3)),
        "cow/notes.txt": b"",
        "cow/.hidden.png": b"",
        "loose.png": b"",
        ".git/x.png": b"",
    } | {f"cow/{name}": content for name, (content, _) in BROKEN.items()}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "cow/gone.png").symlink_to("nowhere")
    (folder / "bee/loop").symlink_to("..", target_is_directory=True)

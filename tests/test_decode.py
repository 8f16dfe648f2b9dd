"""One decoder: shards of the original bytes are read as what data/prepare.py makes of them."""

import ast
import io
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from image_folders import ORIENTATION, encode, noise, preparer, write_tar
from PIL import Image
from shard_files import files, read

from w2s_train.errors import UserError
from w2s_train.prepare.images import Conversion
from w2s_train.shards import Storage
from w2s_train.shards.decode import FORMATS, BrokenImage, decode_image, is_turned, open_image


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return preparer(monkeypatch, capsys)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def palette(clear: bool) -> Image.Image:
    image = Image.fromarray(noise(6, 9, 3)).quantize(16)
    if clear:
        image.info["transparency"] = 3
    return image


MODES = {
    "1": Image.fromarray(noise(6, 9) > 99),
    "L": Image.fromarray(noise(6, 9)),
    "LA": Image.fromarray(noise(6, 9, 2), "LA"),
    "P": palette(clear=False),
    "P, one clear": palette(clear=True),
    "RGB": Image.fromarray(noise(6, 9, 3)),
    "RGBA": Image.fromarray(noise(6, 9, 4)),
    "CMYK": Image.fromarray(noise(6, 9, 4), "CMYK"),
    "YCbCr": Image.fromarray(noise(6, 9, 3)).convert("YCbCr"),
    "LAB": Image.fromarray(noise(6, 9, 3), "LAB"),
    "I;16": Image.fromarray(noise(6, 9).astype(np.uint16) * 257 + 3),
    "I": Image.fromarray(noise(6, 9).astype(np.int32) * 256),
    "F": Image.fromarray(noise(6, 9).astype(np.float32)),
}
KINDS = ("png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm", "jpeg2000")


def stored() -> dict[str, bytes]:
    """Every mode in every format that can hold it, upright and turned."""
    found = {}
    for (mode, image), kind in itertools.product(MODES.items(), KINDS):
        for name, options in (("", {}), (", turned", {"exif": turned(6)})):
            try:
                content = encode(image, kind, **options)
                Image.open(io.BytesIO(content)).load()
            except (OSError, ValueError, KeyError):
                continue  # no such mode in this format
            found[f"{mode} as {kind}{name}"] = content
    return found


STORED = stored()


def test_every_mode_is_among_them():
    for mode in MODES:
        assert any(name.startswith(f"{mode} as ") for name in STORED)
    assert len(STORED) > 60


@pytest.mark.parametrize("exif", [True, False])
def test_prepared_equals_read_directly(exif: bool):
    """Whatever the format and the mode; "ignore" leaves nothing that would turn it later."""
    broken = []
    for name, content in STORED.items():
        as_rgb = Conversion(None, "RGB", "png", 95, exif)
        try:
            direct = decode_image(content)
        except BrokenImage as error:
            with pytest.raises(BrokenImage) as caught:
                as_rgb(content)
            assert str(caught.value) == str(error), name
            broken.append(name)
            continue
        convert = as_rgb if len(direct) == 3 else as_rgb._replace(mode="L")
        prepared = decode_image(convert(content).content)
        if not exif and is_turned(open_image(content)):
            prepared = prepared.rot90(-1, (1, 2))
        assert torch.equal(prepared, direct), name
    assert {name.partition(",")[0] for name in broken} == {"F as tiff", "F as ppm"}


def test_how_many_channels():
    """Grey of any depth has one, everything else three."""
    kinds = {"1": "png", "L": "jpeg", "LA": "png", "I;16": "png", "I": "tiff"}
    assert all(len(decode_image(STORED[f"{m} as {k}"])) == 1 for m, k in kinds.items())
    kinds = {"P": "png", "RGBA": "webp", "CMYK": "jpeg", "YCbCr": "tiff", "RGB": "bmp"}
    assert all(len(decode_image(STORED[f"{m} as {k}"])) == 3 for m, k in kinds.items())


@pytest.mark.parametrize("kind", ["png", "tiff"])
@pytest.mark.parametrize("step", [1, 256, 257])
def test_a_ramp_of_sixteen_bits(kind: str, step: int):
    """One channel, 256 levels, mean 127.5; Pillow's own conversion has two levels, mean 254."""
    ramp = (np.arange(256 if step > 1 else 65536) * step).astype(np.uint16)
    side = int(len(ramp) ** 0.5)
    found = decode_image(encode(ramp.reshape(side, side), kind))
    assert found.shape == (1, side, side)
    assert len(found.unique()) == 256
    assert found.double().mean() == 127.5


def test_dark_images_of_sixteen_bits():
    """A PGM states its range, as the others do; of 32 bits in a TIFF it is not known."""
    pixels = np.arange(256, dtype=np.uint16).reshape(16, 16)
    pgm = b"P5 16 16 65535\n" + pixels.astype(">u2").tobytes()
    for content in (pgm, encode(pixels, "png"), encode(pixels, "tiff")):
        assert decode_image(content).tolist() == np.zeros((1, 16, 16)).tolist()
    lit = b"P5 16 16 65535\n" + (pixels * 257).astype(">u2").tobytes()
    assert decode_image(lit)[0].tolist() == pixels.tolist()
    with pytest.raises(BrokenImage, match="none above 255"):
        decode_image(encode(pixels.astype(np.int32), "tiff"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_shards_are_read_upright(orientation: int, kind: str):
    pixels = np.kron(noise(2, 3), np.ones((8, 8), np.uint8))
    options = {"lossless": True} if kind == "webp" else {"quality": 100} if kind == "jpeg" else {}
    image = Image.fromarray(pixels)
    upright = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    found = decode_image(encode(image, kind, exif=turned(orientation), **options)).int()
    expected = image.transpose(upright[orientation]) if orientation > 1 else image
    target = torch.from_numpy(np.array(expected)).int()
    assert found[0].shape == target.shape
    assert (found[0] - target).abs().max() <= 3  # of a JPEG


def test_exif_that_is_none_turns_nothing():
    pixels = noise(6, 9)
    content = encode(pixels, exif=b"Exif\0\0no such thing")
    np.testing.assert_array_equal(decode_image(content)[0], pixels)


def test_transparent_pixels_are_white():
    """And half transparent ones half white; the colour that hides below is not seen."""
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[..., 0] = 200  # red
    pixels[0, :, 3] = [0, 51, 255]
    found = decode_image(encode(pixels))
    assert found[:, 0].T.tolist() == [[255] * 3, [244, 204, 204], [200, 0, 0]]
    grey = decode_image(encode(np.array([[[7, 0], [7, 255]]], np.uint8)))
    assert grey.tolist() == [[[255, 7]]]
    key = Image.fromarray(np.array([[3, 4]], np.uint8))
    assert decode_image(encode(key, transparency=3)).tolist() == [[[255, 4]]]
    wide = Image.fromarray(np.array([[768, 1024]], np.uint16))
    assert decode_image(encode(wide, transparency=768)).tolist() == [[[255, 4]]]


def test_what_was_read_before_is_read_as_before():
    """Grey and RGB of eight bits, bit for bit."""
    for kind, shape in itertools.product(("png", "jpeg", "webp"), ((6, 9), (6, 9, 3))):
        if kind == "webp" and len(shape) == 2:
            continue  # which has no grey
        content = encode(noise(*shape), kind)
        expected = np.array(Image.open(io.BytesIO(content))).reshape(6, 9, -1)
        np.testing.assert_array_equal(decode_image(content).permute(1, 2, 0), expected)


OTHERS = {
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n0 0 moveto\n",
    "DOS PostScript": b"\xc5\xd0\xd3\xc6" + b"\0" * 60,
    "PDF": b"%PDF-1.4\n",
    "PCX": encode(noise(6, 9), "pcx"),
    "TGA": encode(noise(6, 9), "tga"),
    "SGI": encode(noise(6, 9), "sgi"),
    "ICO": encode(Image.new("RGB", (16, 16)), "ico"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_formats_that_are_not_named(name: str, tmp_path: Path, storage: Storage, monkeypatch):
    """Are bad samples, whatever they are called, and start no program."""

    def started(*args: object, **options: object):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", started)
    good = {"png": encode(noise(6, 9)), "cls": b"0"}
    pattern = str(write_tar(tmp_path / "a.tar", good, {"png": OTHERS[name], "cls": b"0"}))
    rows = read(files(pattern, storage), [0, 1])
    assert rows.bad.keys() == {1}
    assert rows.bad[1] == f"no image of a known type ({', '.join(FORMATS)})"


def test_nothing_else_opens_images():
    """In the package and the scripts: no second decoder comes back."""
    opening = [
        f"{path.relative_to(ROOT)}"
        for folder in ("w2s_train", "data")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    ]
    assert opening == ["w2s_train/shards/decode.py"]


def test_prepared_shards_of_odd_images(prepare, tmp_path: Path, storage: Storage):
    """The command and the stream: the same rows of both folders."""
    names = ("RGBA as png", "P, one clear as gif", "CMYK as jpeg", "RGB as jpeg")
    members = [{"png": STORED[name], "cls": b"0"} for name in names]
    source, out = write_tar(tmp_path / "train-000000.tar", *members), tmp_path / "out"
    prepare("shards", source, "--mode", "RGB", "--output", out)
    direct = read(files(str(source), storage), range(len(names)))
    made = read(files(f"{out}/train-*.tar", storage), range(len(names)))
    assert not direct.bad and torch.equal(direct.image, made.image)


def test_a_mixed_set_says_what_helps(tmp_path: Path, storage: Storage):
    members = [{"png": STORED[name], "cls": b"0"} for name in ("L as png", "RGB as png")]
    source = write_tar(tmp_path / "train-000000.tar", *members)
    with pytest.raises(UserError, match="must be of one shape .* data/prepare.py shards makes"):
        read(files(str(source), storage), [0, 1])


def test_the_first_of_several_frames():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    content = encode(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert open_image(content).format == "GIF"
    assert decode_image(content)[:, 0, 0].tolist() == [255, 0, 0]

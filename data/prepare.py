r"""Turn images into webdataset shards, with an index, class names and reference statistics.

    python data/prepare.py folder PATH --output data/NAME --size 256
    python data/prepare.py torchvision CIFAR10 --root DIR --split train --output data/cifar10
    python data/prepare.py huggingface "PATH/train-*.parquet" --output data/NAME
    python data/prepare.py shards "PATH/train-{000000..000015}.tar.gz" --output data/NAME
    python data/prepare.py folder PATH --unlabelled --output data/NAME

Writes ``OUTPUT/SPLIT-000000.tar`` and so on, a table beside each, ``index.json``, ``classes.txt``
and, if images were broken, ``SPLIT.skipped.txt``. The same input gives the same bytes, whatever the
number of processes. Started again after an interruption, it keeps the shards that are finished.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from w2s_train.errors import UserError

if TYPE_CHECKING:
    from w2s_train.prepare.sources import Source

QUALITY = 95


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description="Turn images into webdataset shards.")
    kinds = top.add_subparsers(dest="kind", required=True, metavar="SOURCE")
    add = kinds.add_parser
    folder = add("folder", allow_abbrev=False, help="a folder of images, a sub-folder per class")
    folder.add_argument("path", type=Path, metavar="PATH")
    known = add("torchvision", allow_abbrev=False, help="a data set that torchvision reads")
    known.add_argument("name", choices=("CIFAR10", "CIFAR100", "MNIST", "ImageNet"))
    known.add_argument(
        "--root", type=Path, required=True, metavar="DIR", help="where its files lie"
    )
    known.add_argument("--download", action="store_true", help="fetch it if it is missing")
    rows = add("huggingface", allow_abbrev=False, help="parquet files or datasets.save_to_disk")
    rows.add_argument("path", metavar="PATH", help="parquet file, glob, folder, or stored data set")
    rows.add_argument("--image-column", metavar="NAME", help="found by type or name if not given")
    rows.add_argument("--label-column", metavar="NAME", help="found by type or name if not given")
    shards = add("shards", allow_abbrev=False, help="webdataset shards, compressed or not")
    shards.add_argument("urls", metavar="GLOB", help="path, glob or brace pattern")
    for each in (folder, known, rows):
        each.add_argument("--per-shard", type=int, default=1000, metavar="N", help="images in each")
        each.add_argument("--shuffle-seed", type=int, default=0, metavar="N", help="of their order")
    for each, mode in ((folder, "RGB"), (known, None), (rows, "RGB"), (shards, "auto")):
        add_common(each, mode)
    return top


def add_common(kind: argparse.ArgumentParser, mode: str | None) -> None:
    """Add the options that all sources have.

    Args:
        kind: Parser of one source.
        mode: Its default mode; None: see `mode_of`.
    """
    add = kind.add_argument
    add("--output", type=Path, required=True, metavar="DIR")
    add("--split", default="train", metavar="NAME", help="first word of the shards' names")
    add("--unlabelled", action="store_true", help="no classes: every image is of class 0")
    add("--size", type=int, metavar="N", help="cut the middle square and resize it to N, as ADM")
    add(
        "--mode",
        choices=("RGB", "L", "auto"),
        default=mode,
        help="auto: that of the first readable image; default "
        + (mode or "RGB for ImageNet, else auto"),
    )
    add("--format", choices=("png", "jpg"), default="png", help="of images that are changed")
    add("--quality", type=int, metavar="N", help=f"of jpg, 1 to 100; default {QUALITY}")
    add("--exif", choices=("apply", "ignore"), default="apply", help="turn images upright")
    add("--processes", type=int, metavar="N", default=os.cpu_count() or 1)
    add("--max-broken", type=float, default=0.01, metavar="SHARE", help="of all images")
    add("--reference", metavar="CONFIG", help="then write what this config's scores compare with")


def check(given: argparse.Namespace) -> None:
    """Refuse values out of their range.

    Raises:
        UserError: Names the first one.
    """
    least = {"per_shard": 1, "size": 1, "processes": 1, "shuffle_seed": 0}
    for name, bound in least.items():
        value = getattr(given, name, None)
        if value is not None and value < bound:
            raise UserError(f"{name}={value}: must be at least {bound}")
    if getattr(given, "shuffle_seed", 0) >= 2**32:
        raise UserError(f"shuffle_seed={given.shuffle_seed}: must be below 2**32")
    if not re.fullmatch(r"\w+", given.split):
        raise UserError(f"split={given.split}: must be letters, digits and underscores")
    if given.unlabelled and getattr(given, "label_column", None) is not None:
        raise UserError(f"label_column={given.label_column}: must be left out with --unlabelled")
    if given.quality is not None and given.format != "jpg":
        raise UserError(f"quality={given.quality}: must come with --format jpg")
    if given.quality is not None and not 1 <= given.quality <= 100:
        raise UserError(f"quality={given.quality}: must be in [1, 100]")
    if not 0 <= given.max_broken <= 1:
        raise UserError(f"max_broken={given.max_broken}: must be in [0, 1]")
    if given.output.exists() and not given.output.is_dir():
        raise UserError(f"output={given.output}: must be a folder")
    if given.reference is not None and not Path(given.reference).is_file():
        raise UserError(f"reference={given.reference}: must be an existing config")
    inputs = given.path if given.kind == "folder" else None
    if inputs is not None and given.output.resolve().is_relative_to(inputs.resolve()):
        raise UserError(f"output={given.output}: must not lie in the folder that is read")


def open_source(given: argparse.Namespace) -> "Source":
    """The images that the command names; libraries are imported when they are needed."""
    from w2s_train.prepare.sources import Dealt, Images

    images: Images
    if given.kind == "shards":
        from w2s_train.prepare.sources import ShardSource

        return ShardSource(given.urls, unlabelled=given.unlabelled)
    if given.kind == "folder":
        from w2s_train.prepare.sources import ImageFolder

        images = ImageFolder(given.path, unlabelled=given.unlabelled)
    elif given.kind == "torchvision":
        from w2s_train.prepare.sources import torchvision_images, without_labels

        images = torchvision_images(given.name, given.root, given.split, download=given.download)
        images = without_labels(images) if given.unlabelled else images
    else:
        from w2s_train.prepare.sources import HuggingFaceImages

        columns = given.image_column, given.label_column
        images = HuggingFaceImages(given.path, given.split, *columns, unlabelled=given.unlabelled)
    return Dealt(images, per_shard=given.per_shard, seed=given.shuffle_seed)


def mode_of(given: argparse.Namespace) -> str:
    """The mode that is given, or that of the source."""
    return given.mode or ("RGB" if given.name == "ImageNet" else "auto")


def write_reference(given: argparse.Namespace) -> None:
    """Run ``lightning reference`` on the shards, in a process of its own."""
    command = [sys.executable, "-m", "w2s_train", "reference", "-c", given.reference]
    command += ["--urls", f"{given.output}/{given.split}-*.tar", "--split", given.split]
    command += ["--dataset", given.output.resolve().name]
    if subprocess.run(command).returncode != 0:
        raise UserError(f"reference={given.reference}: no statistics; the shards are finished")


def main() -> None:
    """Read the command line, write the shards, then the statistics."""
    given = parser().parse_args()
    check(given)
    from w2s_train.prepare.images import Conversion, Preparation, first_mode

    source = open_source(given)
    mode = mode_of(given)
    guessed = mode == "auto"
    if guessed:
        mode = first_mode(source)
    quality, upright = given.quality or QUALITY, given.exif == "apply"
    only_grey = guessed and mode == "L"
    conversion = Conversion(given.size, mode, given.format, quality, upright, only_grey)
    preparation = Preparation(source, conversion, given.output, given.split)
    print(preparation.run(processes=given.processes, max_broken=given.max_broken), flush=True)
    if given.reference is not None:
        write_reference(given)


def stop(number: int, frame: object) -> NoReturn:
    """A batch system's signal ends the command as Ctrl-C does."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr] # of file names
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print("stopped: the same command goes on with the shards that are missing", file=sys.stderr)
        sys.exit(128 + number)

"""Parquet files, and folders that ``datasets.save_to_disk`` wrote.

The ``datasets`` library reads them. Of parquet files it makes a copy that can be read in any order,
as large as they are, in its cache (``HF_DATASETS_CACHE``).
"""

import glob
from pathlib import Path
from typing import Any

import numpy as np

from w2s_train.errors import UserError
from w2s_train.preparation.base import Images, check_labels, digest

Rows = Any  # a `datasets.Dataset`: the library is imported when it is needed

IMAGE_COLUMNS = ("image", "img", "images", "picture", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls", "y")


def load(path: str, split: str) -> Rows:
    """The rows of parquet files or of a stored data set.

    Args:
        path: A parquet file, a glob of some, a folder of some, or a folder of ``save_to_disk``.
        split: The part that is meant where there are several: of a stored ``DatasetDict``, or of a
            folder whose file names begin with splits. Files and globs are taken whole.

    Raises:
        UserError: ``datasets`` is not installed, or there is no such thing.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"huggingface={path}: needs the datasets library, pip install -e '.[huggingface]'"
        ) from error
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            stored = datasets.load_from_disk(path)
            return _part(stored, split) if isinstance(stored, datasets.DatasetDict) else stored
        files = _parquet_files(path)
        names = [file.removeprefix(path) for file in files]
        if folder.is_dir():
            found = datasets.load_dataset("parquet", data_dir=path)
            # Files whose names tell no split are all taken for "train".
            unnamed = list(found) == ["train"] and not any("train" in file for file in names)
            return found["train"] if unnamed else _part(found, split)
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"huggingface={path}: cannot be read ({reason})") from error


def _part(parts: Any, split: str) -> Rows:
    if split not in parts:
        raise UserError(f"split={split}: must be one of {', '.join(parts)}")
    return parts[split]


def _parquet_files(path: str) -> list[str]:
    """Those that a file, a folder or a glob names, sorted."""
    pattern = f"{glob.escape(path)}/**/*.parquet" if Path(path).is_dir() else path
    files = [file for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]
    if not files:
        raise UserError(
            f"huggingface={path}: must be parquet files, or a folder of them or of save_to_disk"
        )
    return files


def _column(found: list[str], columns: list[str], usual: tuple[str, ...], name: str) -> str:
    """The column that is meant: the only one of the right type, or one with a usual name.

    Args:
        found: Columns of the right type.
        columns: All columns.
        usual: Names to look for.
        name: What the option is called.
    """
    if len(found) == 1:
        return found[0]
    named = next((column for column in usual if column in (found or columns)), None)
    if named is None:
        raise UserError(f"{name}: must be given, one of {', '.join(found or columns)}")
    return named


class HuggingFaceImages(Images):
    """The rows of a data set.

    Args:
        path: See `load`.
        split: See `load`.
        image_column: Its name; None finds it by its type or a usual name.
        label_column: The same.

    Raises:
        UserError: No such columns, or a row without a label.
    """

    def __init__(
        self, path: str, split: str, image_column: str | None, label_column: str | None
    ) -> None:
        rows = load(path, split)
        from datasets import ClassLabel, Image

        types = dict(rows.features)
        pictures = [name for name, kind in types.items() if isinstance(kind, Image)]
        labels = [name for name, kind in types.items() if isinstance(kind, ClassLabel)]
        for given, name in ((image_column, "image_column"), (label_column, "label_column")):
            if given is not None and given not in types:
                raise UserError(f"{name}={given}: must be one of {', '.join(types)}")
        image = image_column or _column(pictures, list(types), IMAGE_COLUMNS, "image_column")
        label = label_column or _column(labels, list(types), LABEL_COLUMNS, "label_column")
        names = types[label].names if isinstance(types[label], ClassLabel) else []
        self.labels, self.classes = _labels(rows, label, list(names or []))
        try:
            self.rows = rows.select_columns([image]).cast_column(image, Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"image_column={image}: must hold images, not {types[image]}"
            ) from error
        self.column = image
        self.identity = {
            "source": "huggingface",
            "image_column": image,
            "label_column": label,
            "labels": digest([*self.classes, self.labels.tobytes().hex()]),
            "files": digest(f"{Path(f).name} {Path(f).stat().st_size}" for f in _sources(path)),
        }
        self.notes = []

    def name(self, index: int) -> str:
        return f"row {index}"

    def content(self, index: int) -> bytes:
        stored = self.rows[index][self.column] or {}
        if stored.get("bytes") is not None:
            return stored["bytes"]
        if stored.get("path"):
            return Path(stored["path"]).read_bytes()
        raise OSError("no image")


def _sources(path: str) -> list[str]:
    """Files that hold the data."""
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return sorted(str(file) for file in folder.rglob("*.arrow"))
    return _parquet_files(path)


def _labels(rows: Rows, column: str, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Labels (N,) int64, and the names of the classes: those given, or the texts in the column."""
    values = rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise UserError(f"label_column={column}: must have no gaps, row {missing} has no label")
    if values and all(isinstance(value, str) for value in values):
        names = sorted(set(values))
        place = {name: i for i, name in enumerate(names)}
        values = [place[value] for value in values]
    if not all(type(value) is int for value in values):
        raise UserError(f"label_column={column}: must hold whole numbers or texts")
    check_labels(values, names, "row")
    if not values:
        raise UserError(f"label_column={column}: must hold rows, there are none")
    return np.array(values, np.int64), names

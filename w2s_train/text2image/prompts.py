"""Lists of prompts in files."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from w2s_train.errors import UserError
from w2s_train.files import expanded

SUFFIXES = (".txt", ".tsv", ".jsonl")
COLUMNS = ("Prompt", "Category")  # of PartiPrompts


class Prompt(NamedTuple):
    """A prompt, and the category that its file gives it.

    Args:
        text: What the image is to show.
        category: None where the file has none.
    """

    text: str
    category: str | None = None


class _Line(NamedTuple):
    """A line of a file: its place, for errors, and what it says."""

    place: str
    text: str

    def refused(self, allowed: str) -> UserError:
        return UserError(f"{self.place}: must {allowed}")


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file, in its order. Space around them and empty lines are left out; a
    prompt that stands there again counts once, with a warning.

    Args:
        path: A UTF-8 file. ``.txt`` has a prompt a line; lines that start with # are left out.
            ``.tsv`` has the columns Prompt and Category, named in its first line, as PartiPrompts
            (Yu et al., 2022) has, and no quoting: quotation marks belong to the prompt. ``.jsonl``
            has an object a line with the key ``prompt`` and, optionally, ``category``. Other
            columns and keys are passed over.

    Raises:
        UserError: The file is missing or of another kind, a line is not as above, or there is no
            prompt.
    """
    file = expanded("prompts", path)
    if file.suffix not in SUFFIXES:
        raise UserError(f"prompts={file}: must be a file that ends in {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise UserError(f"prompts={file}: must be an existing file")
    lines = _lines(file)
    read = {".txt": _plain, ".tsv": _table, ".jsonl": _objects}[file.suffix]
    first = dict[str, int]()
    prompts = []
    for number, prompt in read(lines):
        if prompt.text in first:  # as in published lists
            same = f"the prompt of line {first[prompt.text] + 1} again, which counts once"
            warnings.warn(f"{lines[number].place}: {same}", stacklevel=2)
            continue
        first[prompt.text] = number
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"prompts={file}: must hold at least one prompt")
    return prompts


def _lines(file: Path) -> list[_Line]:
    """All of them, empty ones too."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"prompts={file}, line {line}: must be UTF-8") from error
    texts = text.replace("\r\n", "\n").split("\n")
    return [_Line(f"prompts={file}, line {i}", text) for i, text in enumerate(texts, start=1)]


def _plain(lines: list[_Line]) -> Iterator[tuple[int, Prompt]]:
    for i, line in enumerate(lines):
        text = line.text.strip()
        if text and not text.startswith("#"):
            yield i, Prompt(text)


def _table(lines: list[_Line]) -> Iterator[tuple[int, Prompt]]:
    header = [name.strip() for name in lines[0].text.split("\t")]
    for name in COLUMNS:
        if name not in header:
            raise lines[0].refused(f"name the columns Prompt and Category; {name} is missing")
    column, kind = (header.index(name) for name in COLUMNS)
    for i, line in enumerate(lines):
        if i == 0 or not line.text.strip():
            continue
        cells = [cell.strip() for cell in line.text.split("\t")]
        if len(cells) <= max(column, kind) or not cells[column]:
            raise line.refused("have a prompt and a category, in the columns of the first line")
        yield i, Prompt(cells[column], cells[kind] or None)


def _objects(lines: list[_Line]) -> Iterator[tuple[int, Prompt]]:
    for i, line in enumerate(lines):
        if not line.text.strip():
            continue
        try:
            content = json.loads(line.text)
        except ValueError as error:
            raise line.refused("be a JSON object") from error
        text = content.get("prompt") if isinstance(content, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise line.refused('be a JSON object with a text under the key "prompt"')
        category = content.get("category")
        if category is not None and not isinstance(category, str):
            raise line.refused('have a text under the key "category", or none')
        yield i, Prompt(text.strip(), category)

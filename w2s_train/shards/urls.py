"""Which shards a pattern names."""

import fnmatch
import glob
import json
import os
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand

from w2s_train.errors import UserError, one_line
from w2s_train.shards.writer import INDEX

# Of fsspec's file systems those that only fetch bytes: others unpack, chain or render templates.
PROTOCOLS = ("http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "memory")


def is_remote(url: str) -> bool:
    """Whether it is a URL of fsspec or a pipe, and no local path."""
    return is_pipe(url) or "://" in url


def is_pipe(url: str) -> bool:
    """Whether it is a shell command, ``pipe:COMMAND``, that writes the file to its output."""
    return url.startswith("pipe:")


def expand_urls(urls: str, name: str = "train_urls", *, allow_pipe: bool = False) -> list[str]:
    """Shards that a path, a glob, a brace pattern or such a URL names, sorted within each pattern.

    A local shard that is missing is among them if the folder's index lists it.

    Args:
        urls: The pattern.
        name: What the user calls it.
        allow_pipe: Accept ``pipe:COMMAND``.

    Raises:
        UserError: The pattern names nothing, or something that does not exist; or it is a pipe.
    """
    try:
        patterns = list(braceexpand(urls))
    except ValueError as error:
        raise UserError(f"{name}={urls}: must have balanced braces") from error
    found: dict[str, None] = {}  # in order, and none twice
    for pattern in patterns:
        pattern = os.path.expanduser(pattern.removeprefix("file://"))
        if is_pipe(pattern):
            if not allow_pipe:
                raise UserError(f"{name}={urls}: must not run commands unless allow_pipe is true")
            found[pattern] = None
        elif is_remote(pattern):
            found |= dict.fromkeys(_expand_remote(pattern, name))
        else:
            found |= dict.fromkeys(_expand_local(pattern, f"{name}={urls}"))
    return list(found)


def local_shards(urls: str, name: str) -> list[Path]:
    """As `expand_urls`, for what reads whole shards from the disk.

    Raises:
        UserError: Also where one is remote or missing.
    """
    found = expand_urls(urls, name)
    for url in found:
        if is_remote(url) or not Path(url).is_file():
            raise UserError(f"{name}={url}: must be an existing local file")
    return [Path(url) for url in found]


def split_url(url: str) -> tuple[str, str]:
    """Folder and name, without the query of a web address."""
    folder, _, name = (url.partition("?")[0] if is_remote(url) else url).rpartition("/")
    return folder, name


def _expand_local(pattern: str, what: str) -> list[str]:
    folder, name = os.path.split(pattern)
    if glob.has_magic(pattern):
        found = {match for match in glob.glob(pattern) if Path(match).is_file()}
    else:
        found = {pattern} if Path(pattern).is_file() else set()
    if not glob.has_magic(folder):  # what should be there as well
        listed = _listed(Path(folder))
        found |= {os.path.join(folder, each) for each in fnmatch.filter(listed, name)}
    if not found:
        raise UserError(f"{what}: must name existing files; {pattern or 'nothing'} does not")
    return sorted(found)


def _listed(folder: Path) -> list[str]:
    path = folder / INDEX
    return list(parse_index(path.read_text(), str(path))) if path.is_file() else []


def parse_index(text: str, name: str) -> dict[str, Any]:
    """The shards that an index lists.

    Args:
        text: Its contents.
        name: Where it is.

    Raises:
        UserError: It is something else.
    """
    try:
        shards = json.loads(text)["shards"]
        for entry in shards.values():
            int(entry["samples"]), int(entry["bytes"]), str(entry["sha256"]), list(entry["labels"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"index={name}: must be the index of a folder of shards") from None
    return shards


def _expand_remote(pattern: str, name: str) -> list[str]:
    if pattern.partition("://")[0] not in PROTOCOLS or "::" in pattern:
        raise UserError(f"{name}={pattern}: must begin with one of {', '.join(PROTOCOLS)}, or file")
    web = pattern.startswith(("http://", "https://"))
    if not glob.has_magic(pattern.partition("?")[0] if web else pattern):
        return [pattern]
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        found = sorted(str(system.unstrip_protocol(match)) for match in system.glob(path))
    except Exception as error:  # each file system has its own
        raise UserError(f"{name}={pattern}: cannot be listed ({one_line(error)})") from error
    if not found:
        raise UserError(f"{name}={pattern}: must name existing files; none match")
    return found

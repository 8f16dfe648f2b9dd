"""Where shards come from: local files, fsspec's remote ones through a cache, pipes by a switch.

What cannot be read at any place, because it is remote or compressed, is copied into the cache.
"""

import contextlib
import fnmatch
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import time
import zlib
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand
from filelock import FileLock

from w2s_train.errors import UserError
from w2s_train.shards.writer import INDEX

ATTEMPTS, WAIT = 3, 1.0  # downloads of one file, and seconds before the second, doubled each time
GIGABYTE = 1e9
COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
CUT = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


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
    found: list[str] = []
    for pattern in braceexpand(urls):
        pattern = pattern.removeprefix("file://")
        if is_pipe(pattern):
            if not allow_pipe:
                raise UserError(f"{name}={urls}: must not run commands unless allow_pipe is true")
            found.append(pattern)
        elif is_remote(pattern):
            found += _expand_remote(pattern, name)
        else:
            found += _expand_local(pattern, f"{name}={urls}")
    return found


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


def _expand_local(pattern: str, what: str) -> list[str]:
    matches = glob.glob(pattern) if glob.has_magic(pattern) else [pattern]
    files = {match for match in matches if Path(match).is_file()}
    if glob.has_magic(pattern) and not glob.has_magic(os.path.dirname(pattern)):
        listed = [str(Path(pattern).parent / name) for name in _listed(Path(pattern).parent)]
        files |= set(fnmatch.filter(listed, str(Path(pattern))))
    elif not files and Path(pattern).name in _listed(Path(pattern).parent):
        files = {pattern}
    if not files:
        raise UserError(f"{what}: must name existing files; {pattern} does not")
    return sorted(files)


def _listed(folder: Path) -> list[str]:
    path = folder / INDEX
    return list(read_json(path)["shards"]) if path.is_file() else []


def read_json(path: Path) -> dict[str, Any]:
    """An index.

    Raises:
        UserError: It is no JSON.
    """
    try:
        content = json.loads(path.read_text())
        assert isinstance(content["shards"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"index={path}: must be the index of a folder of shards") from None
    return content


def _expand_remote(pattern: str, name: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        found = sorted(str(system.unstrip_protocol(match)) for match in system.glob(path))
    except Exception as error:  # each file system has its own
        raise UserError(f"{name}={pattern}: cannot be listed ({one_line(error)})") from error
    if not found:
        raise UserError(f"{name}={pattern}: must name existing files; none match")
    return found


def one_line(error: BaseException) -> str:
    """Its kind and message, or only its kind where it says nothing."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


class Storage:
    """Gives local, uncompressed files for URLs.

    Remote files are downloaded whole, once per machine: to a file beside their place, checked
    against their sha256 where an index states it, and renamed. Compressed ones are unpacked there.

    Args:
        cache: Folder for downloads and tables; None is ``$W2S_CACHE`` or ``~/.cache/w2s_train``.
        gigabytes: Drop the downloads that were not used for longest beyond this size; None keeps
            all.
        allow_pipe: Run ``pipe:COMMAND`` in a shell.
    """

    def __init__(
        self,
        cache: str | Path | None = None,
        gigabytes: float | None = None,
        allow_pipe: bool = False,
    ) -> None:
        default = os.environ.get("W2S_CACHE") or Path.home() / ".cache" / "w2s_train"
        self.cache, self.gigabytes = Path(cache or default).expanduser(), gigabytes
        self.allow_pipe = allow_pipe

    def local(self, url: str, sha256: str = "", *, version: str = "") -> Path:
        """The file, downloaded first where it is remote.

        Args:
            url: Of the file.
            sha256: That it must have; empty if that is not known.
            version: A download of another version is not used.

        Raises:
            OSError: It cannot be had; names the URL.
        """
        if not is_remote(url):
            if Path(url).suffix not in COMPRESSED:
                return Path(url)
            state = os.stat(url)
            version = f"{Path(url).resolve()} {state.st_size} {state.st_mtime_ns}"
        name = hashlib.sha256(f"{url} {sha256}{version}".encode()).hexdigest()[:16]
        base = "pipe" if is_pipe(url) else url.rpartition("/")[2].partition(".")[0]
        target = self.cache / "files" / f"{name}-{base}.tar"
        for folder in (target.parent, self.cache / "locks"):
            folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / "locks" / f"{name}.lock", mode=0o600):
            if target.is_file():
                os.utime(target)
            else:
                self._download(url, target, sha256)
        return target

    def text(self, url: str) -> str | None:
        """The contents of a small remote file, never from the cache; None if there is none."""
        with contextlib.suppress(FileNotFoundError):
            with fsspec.open(url, "rt") as file:
                return str(file.read())
        return None

    def _download(self, url: str, target: Path, sha256: str) -> None:
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        fetch = _run_pipe if is_pipe(url) else _copy
        try:
            for attempt in range(ATTEMPTS):
                try:
                    fetch(url, partial)
                    _verify(partial, sha256)
                    break
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{url}: {one_line(error)}") from error
                except Exception as error:  # each file system has its own
                    if attempt + 1 == ATTEMPTS:
                        raise OSError(f"{url}: {one_line(error)}") from error
                    time.sleep(WAIT * 2**attempt)
            self._make_room(partial.stat().st_size)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        if self.gigabytes is None:
            return
        # A file that another process reads stays readable to it when it is unlinked.
        files = [p for p in (self.cache / "files").iterdir() if p.suffix != ".partial"]
        by_use = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in files)
        total = size + sum(each for _, each, _ in by_use)
        for _, each, path in by_use:
            if total <= self.gigabytes * GIGABYTE:
                return
            path.unlink(missing_ok=True)
            total -= each


def _copy(url: str, target: Path) -> None:
    compression = COMPRESSED.get(Path(url.partition("?")[0]).suffix)
    with fsspec.open(url, "rb", compression=compression) as source, open(target, "wb") as file:
        if compression is None:
            shutil.copyfileobj(source, file, 1 << 22)
            return
        try:
            while chunk := source.read1(1 << 20):  # gives what it has before it fails
                file.write(chunk)
        except CUT:
            # A broken download is repeated. A broken file is used as far as it goes: what is
            # missing shows when its samples are looked up.
            if is_remote(url):
                raise


def _run_pipe(url: str, target: Path) -> None:
    with open(target, "wb") as file:
        subprocess.run(url.removeprefix("pipe:"), shell=True, check=True, stdout=file)


def _verify(path: Path, sha256: str) -> None:
    if not sha256:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise OSError(f"its sha256 is {found[:12]}..., the index says {sha256[:12]}...")

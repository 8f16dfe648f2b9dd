"""Where shards come from: which of them a pattern names, and a local file for each.

What cannot be read at any place, because it is remote or compressed, is copied into a cache. Remote
files are fsspec's; commands run by a switch only.
"""

import errno
import fnmatch
import glob
import gzip
import hashlib
import lzma
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import fsspec
from braceexpand import braceexpand

from w2s_train.errors import UserError, one_line
from w2s_train.files import OF_THE_DISK, locked, sha256_of
from w2s_train.secrets import redacted
from w2s_train.shards.format import read_index

# Of fsspec's file systems those that only fetch bytes: others unpack, chain or render templates.
PROTOCOLS = ("http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "abfss", "memory")
COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
CUT = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
ATTEMPTS, WAIT = 3, 1.0  # downloads of one file, and seconds before the second, doubled each time
GIGABYTE = 1e9
Result = TypeVar("Result")


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
        listed = fnmatch.filter(read_index(Path(folder)), name)
        found |= {os.path.join(folder, each) for each in listed}
    if not found:
        raise UserError(f"{what}: must name existing files; {pattern or 'nothing'} does not")
    return sorted(found)


def _expand_remote(pattern: str, name: str) -> list[str]:
    if pattern.partition("://")[0] not in PROTOCOLS or "::" in pattern:
        raise UserError(f"{name}={pattern}: must begin with one of {', '.join(PROTOCOLS)}, or file")
    web = pattern.startswith(("http://", "https://"))
    if not glob.has_magic(pattern.partition("?")[0] if web else pattern):
        return [pattern]
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        found = sorted(str(system.unstrip_protocol(match)) for match in system.glob(path))
        found = [each for each in found if not each.rpartition("/")[2].startswith(".")]  # as local
    except Exception as error:  # each file system has its own
        raise UserError(f"{name}={pattern}: cannot be listed ({one_line(error)})") from error
    if not found:
        raise UserError(f"{name}={pattern}: must name existing files; none match")
    return found


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
        self.named, self.gigabytes = cache or os.environ.get("W2S_CACHE"), gigabytes
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
        base = "pipe" if is_pipe(url) else split_url(url)[1].partition(".")[0]
        target = self.folder("files") / f"{name}-{base}.tar"
        with locked(self.folder("locks") / f"{name}.lock") as alone:
            if target.is_file():
                os.utime(target)
            else:
                if alone:
                    _remove_partials(target)
                self._download(url, target, sha256)
        return target

    @property
    def cache(self) -> Path:
        """The folder of the cache; only asked for where something is kept there.

        Raises:
            UserError: None is named, and the user has no home.
        """
        try:
            return Path(self.named or Path.home() / ".cache" / "w2s_train").expanduser()
        except RuntimeError as error:
            raise UserError(
                f"cache={self.named}: must be a folder, as data.cache or $W2S_CACHE: this user has "
                f"no home folder ({error})"
            ) from error

    def folder(self, name: str) -> Path:
        """A folder of the cache.

        Raises:
            UserError: It cannot be made, or not written.
        """
        cache = self.cache
        try:
            (cache / name).mkdir(parents=True, exist_ok=True)
            if not os.access(cache / name, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise UserError(
                f"cache={cache}: must be a folder that can be written ({error.strerror}); "
                "data.cache or $W2S_CACHE names another one"
            ) from error
        return cache / name

    def cached(self, path: Path) -> bool:
        """Whether a file is a download in the cache."""
        return path.parent.name == "files" and path.parent == self.cache / "files"

    def text(self, url: str) -> str | None:
        """The contents of a small remote file, never from the cache; None if there is none.

        Raises:
            UserError: It cannot be known.
        """
        try:
            return _repeated(lambda: _read_text(url))
        except Exception as error:  # each file system has its own
            if _is_missing(error):
                return None
            reason = one_line(error.__cause__ or error)
            raise UserError(f"train_urls={url}: cannot be read ({reason})") from error

    def _download(self, url: str, target: Path, sha256: str) -> None:
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        fetch = _run_pipe if is_pipe(url) else _copy

        def attempt() -> None:
            fetch(url, partial)
            _verify(partial, sha256)

        try:
            _repeated(attempt)
            with locked(self.folder("locks") / "room.lock"):
                self._make_room(partial.stat().st_size)
                os.replace(partial, target)
        except Exception as error:  # each file system has its own
            number = error.errno if isinstance(error, OSError) else None
            reason = f"{redacted(url)}: {one_line(error.__cause__ or error)}"
            raise OSError(number, reason) if number else OSError(reason) from error
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        if self.gigabytes is None:
            return
        # A file that another process reads stays readable to it when it is unlinked.
        files = [p for p in self.folder("files").iterdir() if p.suffix != ".partial"]
        by_use = sorted((p.stat().st_mtime, p.stat().st_size, p) for p in files)
        total = size + sum(each for _, each, _ in by_use)
        for _, each, path in by_use:
            if total <= self.gigabytes * GIGABYTE:
                return
            path.unlink(missing_ok=True)
            total -= each


def _remove_partials(target: Path) -> None:
    """Delete what processes that were killed have left of a download."""
    for left in target.parent.glob(f"{target.name}.*.partial"):
        left.unlink(missing_ok=True)


def _is_missing(error: BaseException) -> bool:
    """Whether a file is not there, and not merely out of reach: fsspec says the same of both."""
    if not isinstance(error, FileNotFoundError | PermissionError):
        return False
    cause = error.__cause__
    status = getattr(cause, "status", None)
    return cause is None or isinstance(cause, FileNotFoundError) or status in (401, 403, 404)


def _repeated(action: Callable[[], Result]) -> Result:
    """What an action gives; networks fail now and then, so it is tried a few times."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except Exception as error:  # each file system has its own
            if _is_missing(error) or (isinstance(error, OSError) and error.errno in OF_THE_DISK):
                raise
            time.sleep(WAIT * 2**attempt)
    return action()


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


def _read_text(url: str) -> str:
    with fsspec.open(url, "rt") as file:
        return str(file.read())


def _run_pipe(url: str, target: Path) -> None:
    with open(target, "wb") as file:
        subprocess.run(url.removeprefix("pipe:"), shell=True, check=True, stdout=file)


def _verify(path: Path, sha256: str) -> None:
    if sha256 and (found := sha256_of(path)) != sha256:
        raise OSError(f"its sha256 is {found[:12]}..., the index says {sha256[:12]}...")

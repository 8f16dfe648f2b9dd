"""Where shards come from: patterns, downloads, compressed files, pipes, and the cache."""

import functools
import gzip
import http.server
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from conftest import quick
from shard_files import numbers, write_numbers
from test_stream import take

from w2s_train.errors import UserError
from w2s_train.shards import Storage, expand_urls
from w2s_train.shards.format import ShardTable
from w2s_train.shards.index import find_shards

COUNTS = [10, 7, 13]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Counts what it is asked for, and fails as it is told."""

    asked: Counter[str] = Counter()
    failing: Counter[str] = Counter()  # requests of a file that are still to fail

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        Handler.asked[name] += 1
        if Handler.failing[name]:
            Handler.failing[name] -= 1
            self.send_error(503)
            return
        super().do_GET()

    def do_HEAD(self) -> None:
        if Handler.failing[self.path.rpartition("/")[2]]:
            self.send_error(503)
            return
        super().do_HEAD()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch):
    """A web server of ``tmp_path``/served; gives its address."""
    monkeypatch.setattr("w2s_train.shards.storage.WAIT", 0.01)
    Handler.asked, Handler.failing = Counter(), Counter()
    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def everything(urls: str, **changes) -> list[int]:
    """One epoch."""
    options = dict(batch_size=5, in_memory=False) | changes
    return sorted(n for batch in take(urls, 6, **options) for n in numbers(batch))


@pytest.mark.parametrize("index", quick([True, False]))
@pytest.mark.parametrize("workers", quick([0, 2]))
def test_http(tmp_path: Path, server: str, index: bool, workers: int):
    """The same samples as from the disk, and every file fetched once."""
    write_numbers(tmp_path / "served", COUNTS, index=index)
    options = dict(cache=str(tmp_path / "cache"), num_workers=workers)
    urls = server + "/train-{000000..000002}.tar"
    assert everything(urls, **options) == list(range(30))
    first = Handler.asked.copy()
    assert all(first[f"train-{i:06d}.tar"] == 1 for i in range(3))
    assert everything(urls, **options) == list(range(30))
    again = Handler.asked - first
    assert set(again) <= {"index.json"}


def test_http_orders_as_the_disk_does(tmp_path: Path, server: str):
    local = write_numbers(tmp_path / "served", COUNTS)
    remote = take(server + "/train-{000000..000002}.tar", 9, cache=str(tmp_path / "cache"))
    for one, other in zip(take(local, 9), remote, strict=True):
        assert numbers(one) == numbers(other)


def test_failed_downloads_are_repeated(tmp_path: Path, server: str):
    """Of a shard, and of the index, without which nothing would be known of the shards."""
    write_numbers(tmp_path / "served", COUNTS)
    Handler.failing["train-000001.tar"] = 2
    Handler.failing["index.json"] = 2
    urls = server + "/train-{000000..000002}.tar"
    assert everything(urls, cache=str(tmp_path / "cache")) == list(range(30))
    assert Handler.asked["train-000001.tar"] == 3
    assert Handler.asked["index.json"] >= 3


def test_an_index_out_of_reach(tmp_path: Path, server: str):
    write_numbers(tmp_path / "served", COUNTS)
    Handler.failing["index.json"] = 1000
    with pytest.raises(UserError, match="index.json: cannot be read .*503"):
        take(server + "/train-000000.tar", 1, cache=str(tmp_path / "cache"))
    Handler.failing.clear()
    (tmp_path / "served" / "index.json").write_text("<html>")
    with pytest.raises(UserError, match="index.json: must be the index"):
        take(server + "/train-000000.tar", 1, cache=str(tmp_path / "cache"))


def test_signed_addresses(tmp_path: Path, server: str):
    """A query is no glob, and no part of the name."""
    write_numbers(tmp_path / "served", COUNTS)
    url = server + "/train-000001.tar?signature=a1"
    assert expand_urls(url) == [url]
    [shard] = find_shards([url], Storage(tmp_path / "cache"))
    assert (shard.samples, len(shard.sha256)) == (7, 64)


@pytest.mark.parametrize("fault", ["failing", "missing", "changed"])
def test_a_shard_that_cannot_be_had_is_skipped(tmp_path: Path, server: str, fault: str):
    """Faults row 11: an unreadable URL; with the index, its samples are known and counted."""
    write_numbers(tmp_path / "served", COUNTS)
    shard = tmp_path / "served" / "train-000001.tar"
    if fault == "failing":
        Handler.failing["train-000001.tar"] = 1000
    elif fault == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[700] ^= 1
        shard.write_bytes(content)
    urls = server + "/train-{000000..000002}.tar"
    batches = take(urls, 6, batch_size=5, cache=str(tmp_path / "cache"))
    skipped = [entry for batch in batches for entry in batch["skipped"]]
    assert Counter(each.shard for each in skipped) == {f"{server}/train-000001.tar": 7}
    told = {"failing": "503", "missing": "404", "changed": "its sha256 is"}[fault]
    assert all(told in each.reason for each in skipped)
    assert not set(range(10, 17)) & {n for batch in batches for n in numbers(batch)}
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_remote_shards_without_an_index_must_be_there(tmp_path: Path, server: str):
    with pytest.raises(UserError, match=r"shard=http.*/none.tar: must be readable"):
        take(server + "/none.tar", 1, cache=str(tmp_path / "cache"))


def test_processes_share_one_download(tmp_path: Path, server: str):
    write_numbers(tmp_path / "served", [10])
    storages = [Storage(tmp_path / "cache") for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda s: s.local(f"{server}/train-000000.tar"), storages))
    assert len(paths) == 1 and Handler.asked["train-000000.tar"] == 1


def test_the_cache_keeps_to_its_size(tmp_path: Path, server: str):
    """What was not used for longest goes first."""
    write_numbers(tmp_path / "served", [10] * 4)
    size = (tmp_path / "served" / "train-000000.tar").stat().st_size
    storage = Storage(tmp_path / "cache", gigabytes=2.5 * size / 1e9)
    for number in (0, 1, 0, 2, 3):
        storage.local(f"{server}/train-{number:06d}.tar")
        time.sleep(0.01)  # times of use differ
    kept = sorted(path.name[-8:-4] for path in (tmp_path / "cache" / "files").iterdir())
    assert kept == ["0002", "0003"]
    assert Handler.asked["train-000000.tar"] == 1
    storage.local(f"{server}/train-000000.tar")
    assert Handler.asked["train-000000.tar"] == 2


def test_left_overs_of_a_killed_download_go(tmp_path: Path, server: str):
    write_numbers(tmp_path / "served", [3])
    storage = Storage(tmp_path / "cache")
    path = storage.local(f"{server}/train-000000.tar")
    path.rename(f"{path}.123456.partial")
    assert storage.local(f"{server}/train-000000.tar") == path
    assert list(path.parent.iterdir()) == [path]


def test_a_cache_that_is_no_folder(tmp_path: Path):
    pattern = write_numbers(tmp_path, [3], index=False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cache=.*file: must be a folder that can be written"):
        take(pattern, 1, cache=str(tmp_path / "file"))


def test_globs_of_a_file_system(tmp_path: Path):
    """What stands for s3, gs and hf: a file system of fsspec that can be listed."""
    write_numbers(tmp_path / "local", COUNTS)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "local").iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    try:
        urls = expand_urls("memory://bucket/train-*.tar")
        assert [url.rpartition("/")[2] for url in urls] == [f"train-{i:06d}.tar" for i in range(3)]
        shards = find_shards(urls, Storage(tmp_path / "cache"))
        assert [shard.samples for shard in shards] == COUNTS
        found = everything("memory://bucket/train-*.tar", cache=str(tmp_path / "cache"))
        assert found == list(range(30))
        with pytest.raises(UserError, match="train_urls=memory://bucket/no-.*none match"):
            expand_urls("memory://bucket/no-*.tar")
    finally:
        memory.rm("/bucket", recursive=True)


def test_unknown_file_systems():
    with pytest.raises(UserError, match="train_urls=nowhere://.*must begin with one of http"):
        expand_urls("nowhere://bucket/train-*.tar")


def test_file_urls_are_local(tmp_path: Path):
    pattern = write_numbers(tmp_path, COUNTS)
    assert expand_urls(f"file://{pattern}") == expand_urls(pattern)


@pytest.mark.parametrize("in_memory", [True, False])
def test_compressed_shards(tmp_path: Path, in_memory: bool):
    """Unpacked once into the cache; then read as any other."""
    write_numbers(tmp_path, COUNTS)
    for path in tmp_path.glob("*.tar"):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    options = dict(cache=str(tmp_path / "cache"), in_memory=in_memory)
    assert everything(str(tmp_path / "train-*.tar.gz"), **options) == list(range(30))
    assert len(list((tmp_path / "cache" / "files").iterdir())) == 3


def test_a_cut_compressed_shard(tmp_path: Path):
    """Faults row 11: what can be unpacked is used, and the damage is named."""
    write_numbers(tmp_path, [30])
    path = tmp_path / "train-000000.tar.gz"
    whole = gzip.compress((tmp_path / "train-000000.tar").read_bytes(), mtime=0)
    path.write_bytes(whole[: len(whole) * 2 // 3])
    [shard] = find_shards([str(path)], Storage(tmp_path / "cache"))
    assert 5 < shard.samples < 30
    assert "cut off after" in shard.damage


def test_pipes_need_the_switch(tmp_path: Path):
    """Faults row 19: no command runs unless the user says so."""
    write_numbers(tmp_path, COUNTS)
    sentinel = tmp_path / "sentinel"
    urls = f"pipe:touch {sentinel}; cat {tmp_path}/train-{{000000..000002}}.tar"
    with pytest.raises(UserError, match="must not run commands unless allow_pipe is true"):
        take(urls, 1)
    assert not sentinel.exists()
    found = everything(urls, allow_pipe=True, cache=str(tmp_path / "cache"))
    assert found == list(range(30)) and sentinel.exists()


def test_a_pipe_that_fails(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("w2s_train.shards.storage.WAIT", 0.01)
    with pytest.raises(UserError, match="pipe:exit 3: must be readable .*exit status 3"):
        take("pipe:exit 3", 1, allow_pipe=True, cache=str(tmp_path / "cache"))


def test_scans_are_kept(tmp_path: Path, monkeypatch):
    """Other people's shards are scanned once, and again when they change."""
    pattern = write_numbers(tmp_path, COUNTS, index=False)
    storage, scans = Storage(tmp_path / "cache"), []
    real = ShardTable.scan
    monkeypatch.setattr(
        ShardTable, "scan", lambda path, name=None, **o: scans.append(name) or real(path, name=name)
    )
    compressed = tmp_path / "packed.tar.gz"
    compressed.write_bytes(gzip.compress((tmp_path / "train-000000.tar").read_bytes()))
    find_shards([*expand_urls(pattern), str(compressed)], storage)
    assert len(scans) == 4
    scans.clear()
    take(str(compressed), 3, in_memory=False, cache=str(tmp_path / "cache"))
    find_shards(expand_urls(pattern), storage)
    assert scans == []
    write_numbers(tmp_path, [4], index=False)
    scans.clear()  # of the writer
    shards = find_shards(expand_urls(pattern), storage)
    assert [shard.samples for shard in shards] == [4, 7, 13]
    assert scans == [str(tmp_path / "train-000000.tar")]

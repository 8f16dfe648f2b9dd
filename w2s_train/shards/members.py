"""What a tar holds: its members, and the samples that they make.

A sample has a key, and fields by name: ``KEY.png``, ``KEY.cls``. As in webdataset a key ends at the
first dot of a file's name, unless it has dots itself: where ``a.1.png`` comes with ``a.1.cls``, or
nothing is called ``a.png`` or ``a.cls``, the key is ``a.1``. Members that are no samples are passed
over: those of file managers (``.DS_Store``, ``._x``, ``__MACOSX/``), webdataset's own, and texts
without data or label, such as ``README.md``.

Several tars in one file, one after another (``cat a.tar b.tar``), are read as one.
"""

import re
import tarfile
from collections.abc import Iterable
from typing import IO, NamedTuple

from w2s_train.errors import UserError

LABEL = "cls"
IMAGE_TYPES = ("png", "jpg", "jpeg", "webp")
ARRAY_TYPES = ("npy", "bf16.npy")  # bfloat16 is stored as its bits, uint16
FLIPPED = "flip."  # before the name of an array: the same of the mirrored image
TOKENS = "tokens."  # before the name of an array: an encoder's tokens (N, F) of the image
# What a field is called that holds data; the longer names first.
DATA = (FLIPPED + "bf16.npy", "bf16.npy", FLIPPED + "npy", "npy", *IMAGE_TYPES)
META = re.compile(r"__[^/]*__($|/)")  # webdataset's own members, which are no samples
LEFT_BEHIND = {
    "__macosx",
    ".appledouble",
    ".trashes",
    "thumbs.db",
    "desktop.ini",
}  # by file managers
TEXTS = {"txt", "md", "json", "jsonl", "yaml", "yml", "csv", "tsv", "xml", "html", "pdf", "log"}
BLANKS = r"[\s\ufeff\u200b\0]*"  # a byte-order mark is none of Unicode's spaces
NUMBER = re.compile(rf"{BLANKS}([+-]?[0-9]{{1,100}}){BLANKS}")
TRUTHS = {"false": 0, "true": 1}
CHUNK = 1 << 20  # bytes

Members = dict[str, tuple[int, int]]  # offset and size in bytes of each field of a sample


class Member(NamedTuple):
    """A file in a tar: its name, and where its content lies."""

    name: str
    offset: int
    size: int


def read_samples(
    file: IO[bytes], shard: str, *, compressed: bool = False
) -> tuple[dict[str, Members], str]:
    """The samples of a tar by key, in its order, and what is wrong with it, if anything is.

    Args:
        file: The tar, from its start.
        shard: What to call it in messages.
        compressed: It may be; offsets are of what it holds then.

    Raises:
        UserError: It is none, or a sample has a field twice.
    """
    members, damage = _list(file, shard, compressed)
    names = [member.name for member in members]
    samples: dict[str, Members] = {}
    for member, (key, field) in zip(members, _split(names), strict=True):
        fields = samples.setdefault(key, {})
        if field in fields:
            raise UserError(f"shard={shard}: holds two members {member.name}")
        fields[field] = (member.offset, member.size)
    found = {key: fields for key, fields in samples.items() if not TEXTS.issuperset(fields)}
    if samples and not found:
        raise UserError(
            f"shard={shard}: must hold samples, such as KEY.png with KEY.{LABEL}; it holds "
            f"{names[0]} and the like"
        )
    return found, damage


def unpacked(file: IO[bytes]) -> IO[bytes]:
    """What a tar holds, compressed or not; a `tarfile.ReadError` if it is none."""
    content = tarfile.open(fileobj=file, mode="r:*").fileobj
    assert content is not None
    return content  # type: ignore[return-value]


def _list(file: IO[bytes], shard: str, compressed: bool) -> tuple[list[Member], str]:
    """The members that may be of samples, and the damage."""
    found: list[Member] = []
    last, start = "its start", 0
    try:
        content = unpacked(file) if compressed else file
        while True:
            content.seek(start)
            tar = tarfile.open(fileobj=content, mode="r:")
            while (member := tar.next()) is not None:
                last = member.name
                if member.isreg() and _may_be_of_sample(last):
                    found.append(Member(last, member.offset_data, member.size))
            content.seek(tar.offset)
            block = content.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:  # a whole tar ends with blocks of zeros
                return found, f"cut off after {last}"
            if any(block):
                return found, f"unreadable at byte {tar.offset:,}, after {last}"
            following = _after_zeros(content, tar.offset)
            if following is None:
                return found, ""
            start = following
    except tarfile.ReadError as error:
        if last == "its start":
            kind = "a whole tar" if compressed else "an uncompressed tar"
            reason = " ".join(str(error).split())
            raise UserError(f"shard={shard}: must be {kind} ({reason})") from None
        return found, f"cut off after {last} ({error})"


def _after_zeros(content: IO[bytes], start: int) -> int | None:
    """Where the first block that is not of zeros begins, from a block on; None if none does."""
    content.seek(start)
    while chunk := content.read(CHUNK):
        if rest := chunk.lstrip(b"\0"):
            place = start + len(chunk) - len(rest)
            return place - place % tarfile.BLOCKSIZE
        start += len(chunk)
    return None


def _may_be_of_sample(name: str) -> bool:
    *_, base = parts = name.lower().split("/")
    return 0 < base.find(".") and LEFT_BEHIND.isdisjoint(parts) and not META.match(name)


def _split(names: Iterable[str]) -> list[tuple[str, str]]:
    """Key and field of each name."""
    at_first = [_at_first_dot(name) for name in names]
    rests: dict[str, list[str]] = {}
    for key, rest in at_first:
        rests.setdefault(key, []).append(rest)
    inner = {key: found for key, rest in rests.items() if (found := _inner_keys(rest))}
    split = []
    for key, rest in at_first:
        longest = ""
        if key in inner:
            dots = (i for i in range(len(rest) - 1, 0, -1) if rest[i] == ".")
            longest = next((rest[:i] for i in dots if rest[:i] in inner[key]), "")
        key, rest = (f"{key}.{longest}", rest[len(longest) + 1 :]) if longest else (key, rest)
        split.append((key, rest.lower()))
    return split


def _at_first_dot(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, rest = base.partition(".")
    return f"{folder}{slash}{stem}", rest


def _inner_keys(rests: list[str]) -> set[str]:
    """Of files whose names agree up to their first dot, what keys have behind it; often nothing."""
    if not any("." in rest for rest in rests):
        return set()
    known = (LABEL, *DATA)
    kinds: dict[str, set[str]] = {}  # by what stands before a known field
    for rest in rests:
        lower = rest.lower()
        kind = next((kind for kind in known if lower == kind or lower.endswith(f".{kind}")), None)
        if kind is not None:
            kinds.setdefault(rest[: len(rest) - len(kind)].rstrip("."), set()).add(kind)
    alone = "" not in kinds
    inner = {key for key, held in kinds.items() if key and (alone or {LABEL} < held)}
    # What has no label may be a further field, such as ``mask.png``, of a key that it begins with.
    return {key for key in inner if {LABEL} < kinds[key] or not _parents(key) & inner}


def _parents(key: str) -> set[str]:
    """What stands before each of its dots."""
    return {key[:i] for i, letter in enumerate(key) if letter == "."}


def parse_label(content: bytes) -> int:
    """The number in a ``.cls``, or 0 and 1 for false and true.

    Raises:
        ValueError: It is none.
    """
    text = _label_text(content)
    if (match := NUMBER.fullmatch(text)) is not None:
        return int(match[1])
    if (truth := TRUTHS.get(_stripped(text).lower())) is None:
        raise ValueError("no whole number")
    return truth


def shown_label(content: bytes) -> str:
    """The text in a ``.cls`` for a message, short and with nothing in it that cannot be seen."""
    text = _stripped(_label_text(content))[:20]
    return text if text.isprintable() else ascii(text)


def _label_text(content: bytes) -> str:
    wide = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # a byte-order mark of UTF-16
    return content.decode("utf-16" if wide else "utf-8", errors="replace")


def _stripped(text: str) -> str:
    return re.sub(rf"^{BLANKS}|{BLANKS}$", "", text)

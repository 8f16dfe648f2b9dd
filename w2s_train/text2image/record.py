"""``imagine.json``: how the images of a folder came about, and what is known of each."""

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from w2s_train.errors import UserError
from w2s_train.files import atomic_write, locked

SCHEMA = 1
NAME = "imagine.json"
FREE = ("git_commit", "model.name")  # of the protocol, may change while a folder is filled
SHARE, MOST = 20.0, 30.0  # time between two writings over that of one; and at most, in seconds
SHORT = 100  # characters of a value in an error

Entries = dict[tuple[str, int], dict[str, Any]]  # by prompt and seed
Change = Callable[[dict[str, Any], Entries], None]


class Item(NamedTuple):
    """One image to be made.

    Args:
        prompt: What it shows.
        category: Of the prompt, if its file has one.
        seed: Of the noise.
    """

    prompt: str
    category: str | None
    seed: int

    @property
    def file(self) -> str:
        """Its name, by prompt and seed alone: words to read, and a hash to tell prompts apart."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower())[:40].strip("-")
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:8]
        return "-".join(filter(None, (words, digest, f"{self.seed:06d}.png")))


class ImageRecord:
    """The file in a folder of images; any number of processes write to it, one at a time.

    Args:
        folder: Of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._changes: list[Change] = []
        self._due = 0.0  # on the clock
        self._held = False

    def begin(self, protocol: dict[str, Any]) -> None:
        """Take the folder for images of one protocol, whether there are some or not.

        Args:
            protocol: What all images depend on, as plain values.

        Raises:
            UserError: The folder has images of another protocol, or holds something else.
        """
        now = json.loads(json.dumps(protocol))
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output={self.folder}: must be a folder, not a file")
        held = {p.name for p in self.folder.glob("*")} if self.folder.is_dir() else set()
        held = {name for name in held if not name.startswith(".")}
        if held and NAME not in held:
            raise UserError(
                f"output={self.folder}: must be new, empty, or a folder of `lightning imagine`; it "
                f"holds {sorted(held)[0]}"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output={self.folder}: must be a folder to write to") from error

        def start(content: dict[str, Any], entries: Entries) -> None:
            content["protocol"] = content["protocol"] if entries else now
            self._compare(content["protocol"], now)

        self._update(start)

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        old, new = dict(_leaves(before)), dict(_leaves(now))
        for key in [*new, *(key for key in old if key not in new)]:
            if key not in FREE and old.get(key) != new.get(key):
                raise UserError(
                    f"{key}={_short(new.get(key))}: must be {_short(old.get(key))}, as in "
                    f"{self.path}; another --output begins other images"
                )

    def entries(self) -> dict[tuple[str, int], dict[str, Any]]:
        """What is known of the images that are there, by prompt and seed."""
        images = self._read()["images"]
        there = [entry for entry in images if (self.folder / entry["file"]).is_file()]
        return {(entry["prompt"], entry["seed"]): entry for entry in there}

    def add(self, item: Item, **about: Any) -> None:
        """An image is there.

        Args:
            item: Which.
            about: What is to be known of it.
        """

        def change(_: dict[str, Any], entries: Entries) -> None:
            entries.pop((item.prompt, item.seed), None)
            made = item._asdict() | {"file": item.file} | about | {"scores": {}}
            entries[item.prompt, item.seed] = made

        self._soon(change)

    def judge(self, name: str, fingerprint: str) -> None:
        """Scores of a judge are going to be added.

        Args:
            name: Of the scores.
            fingerprint: Of its weights.

        Raises:
            UserError: Images were scored by others of that name.
        """

        def change(content: dict[str, Any], entries: Entries) -> None:
            scored = any(name in entry["scores"] for entry in entries.values())
            before = content["judges"].get(name) if scored else None
            content["judges"][name] = before or fingerprint
            if before not in (None, fingerprint):
                raise UserError(
                    f"scores={name}: must come from weights {before}, as in {self.path}; these are "
                    f"{fingerprint}"
                )

        self._update(change)

    def score(self, item: Item, name: str, value: float) -> None:
        """Add a score of an image that is there.

        Args:
            item: Which image.
            name: Of the score.
            value: It.

        Raises:
            UserError: It is no finite number.
        """
        if not math.isfinite(value):
            raise UserError(f"scores={name}: must be finite, is {value} of {item.file}")

        def change(_: dict[str, Any], entries: Entries) -> None:
            if entry := entries.get((item.prompt, item.seed)):
                entry["scores"][name] = value

        self._soon(change)

    def has_distance(self, about: dict[str, Any]) -> bool:
        """Whether the record has distances of these images, from this extractor and reference.

        Args:
            about: All three.
        """
        there = self._read().get("distances", {}).values()
        return any({key: entry.get(key) for key in about} == about for entry in there)

    def measure(self, values: dict[str, float], about: dict[str, Any]) -> None:
        """Add distances of the images together; earlier ones of the same names are replaced.

        Args:
            values: By name.
            about: Which images, extractor and reference.
        """

        def change(content: dict[str, Any], _: Entries) -> None:
            named = {name: {"value": value} | about for name, value in values.items()}
            content["distances"] = content.get("distances", {}) | named

        self._update(change)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Images and scores may be written later, at the latest at the end of the context.

        The whole file is written each time: of many images that is done rarely enough to take a
        small share of the time. What a killed process had not written is made again.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
            if self._changes:
                self._update()

    def _soon(self, change: Change) -> None:
        self._changes.append(change)
        if not self._held or time.monotonic() >= self._due:
            self._update()

    def _update(self, *changes: Change) -> None:
        with locked(self.folder / ".imagine.lock"):
            began = time.monotonic()
            content = self._read()
            entries = {(each["prompt"], each["seed"]): each for each in content["images"]}
            for change in (*self._changes, *changes):
                change(content, entries)
            content["images"] = [*entries.values()]
            text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
            with atomic_write(self.path) as file:
                file.write(text.encode() + b"\n")
        self._changes.clear()
        now = time.monotonic()
        self._due = now + min(SHARE * (now - began), MOST)

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {"schema": SCHEMA, "protocol": None, "judges": {}, "images": []}
        try:
            content: dict[str, Any] = json.loads(self.path.read_text("utf-8"))
            for entry in content["images"]:
                _ = entry["prompt"], entry["seed"], entry["file"], entry["scores"]
            schema, _, _ = content["schema"], content["protocol"], content["judges"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path}: must be a record of `lightning imagine`") from error
        if schema != SCHEMA:
            raise UserError(f"{self.path}: schema={schema}: must be {SCHEMA}, for this w2s_train")
        return content


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."

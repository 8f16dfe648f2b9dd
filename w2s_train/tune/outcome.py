"""What a tuning has found: ``result.json``, the winner as an overlay, a table in the terminal."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from w2s_train.compare.numbers import half_width
from w2s_train.compare.report import score
from w2s_train.compare.tuned import RESULT, SCHEMA
from w2s_train.files import atomic_write
from w2s_train.secrets import redacted
from w2s_train.tune.search import Trial

SHOWN = 10  # candidates in the terminal


@dataclass(frozen=True)
class Fresh:
    """Scores on seeds that the search has never seen, one a set, of the winner and unguided.

    The interval is the 95 % t interval of the mean difference, winner minus unguided, set by set.
    """

    metric: str
    winner: list[float]
    unguided: list[float]

    @property
    def differences(self) -> list[float]:
        """Set by set; the images of a set share their noise."""
        return [a - b for a, b in zip(self.winner, self.unguided, strict=True)]

    @property
    def interval(self) -> tuple[float, float, float]:
        """Low end, mean and high end."""
        mean, n = statistics.fmean(self.differences), len(self.differences)
        width = half_width(statistics.stdev(self.differences), n)
        return mean - width, mean, mean + width

    @property
    def verdict(self) -> str:
        """In words."""
        low, _, high = self.interval
        return "better" if high < 0 else "worse" if low > 0 else "inconclusive"


@dataclass(frozen=True)
class Images:
    """How many were generated for the search, of how many allowed, and for the last scores."""

    budget: int
    used: int
    fresh: int


@dataclass(frozen=True)
class Outcome:
    """Everything that is reported.

    Args:
        name: Of the tuning.
        about: What was searched, and how images were generated.
        metric: Of the scores on tuning seeds.
        guidance: The winner in words, as scores name it.
        settings: The winner as a config spells it.
        trials: The winner first.
        images: Their numbers.
        seeds: First and last seed of each set, of the search ("tuning") and of the end ("fresh").
        fresh: The last scores.
        commit: Of the code.
    """

    name: str
    about: dict[str, Any]
    metric: str
    guidance: str
    settings: dict[str, Any]
    trials: list[Trial]
    images: Images
    seeds: dict[str, list[list[int]]]
    fresh: Fresh
    commit: str | None

    def to_json(self) -> dict[str, Any]:
        """``result.json``; docs/tune.md."""
        low, mean, high = self.fresh.interval
        return {
            "schema": SCHEMA,
            "name": self.name,
            "about": self.about,
            "metric": self.metric,
            "guidance": self.guidance,
            "settings": self.settings,
            "candidates": [
                {"values": each.values, "scores": each.scores, "mean": each.mean}
                for each in self.trials
            ],
            "images": asdict(self.images),
            "seeds": self.seeds,
            "fresh": {
                **asdict(self.fresh),
                "difference": {"low": low, "mean": mean, "high": high},
                "verdict": self.fresh.verdict,
            },
            "git_commit": self.commit,
        }

    def write(self, folder: Path) -> None:
        """Write ``result.json`` and ``winner.yaml``."""
        found, scores = self.to_json(), (self.fresh.winner, self.fresh.unguided)
        guided, unguided = map(_mean, scores)
        overlay = (
            f"# Found by lightning tune: {len(self.trials)} candidates on {self.images.used:,} "
            "images.\n"
            f"# {self.fresh.metric} on fresh seeds: {guided}; unguided {unguided}.\n"
        )
        overlay += yaml.safe_dump({"model": {"guidance": self.settings}}, sort_keys=False)
        text = json.dumps(redacted(found), indent=1, allow_nan=False) + "\n"
        for name, content in ((RESULT, text), ("winner.yaml", overlay)):
            with atomic_write(folder / name) as file:
                file.write(content.encode())

    def table(self) -> Table:
        """The best candidates, then the fresh scores."""
        table = Table(title=Text(f"{self.name}: {self.metric}"), title_justify="left")
        for name in (*self.trials[0].values, "tuning seeds", "sets"):
            table.add_column(name, justify="right")
        for each in self.trials[:SHOWN]:
            cells = [*map(str, each.values.values()), score(each.mean), str(len(each.scores))]
            table.add_row(*map(Text, cells))
        return table

    def summary(self) -> list[str]:
        """Lines below the table."""
        low, mean, high = map(score, self.fresh.interval)
        fresh, images = self.fresh, self.images
        return [
            f"{len(self.trials)} candidates on {images.used:,} of {images.budget:,} images of "
            f"tuning seeds; {images.fresh:,} images of fresh seeds:",
            f"{self.guidance}: {fresh.metric} {_mean(fresh.winner)}, unguided "
            f"{_mean(fresh.unguided)}; difference {mean}, 95 % interval {low} to {high}: "
            f"{fresh.verdict}",
        ]


def _mean(scores: Sequence[float]) -> str:
    """With the standard deviation over sets."""
    mean, std = statistics.fmean(scores), statistics.stdev(scores)
    return f"{score(mean)} ± {score(std, mean)}"

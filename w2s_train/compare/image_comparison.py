"""The comparison of folders of images: paired by prompt and seed, intervals over prompts."""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from w2s_train.compare.images import Folder, Image, Key, common_scores
from w2s_train.compare.numbers import Interval, half_width
from w2s_train.compare.sweep import ENOUGH, Sweep, find_sweep
from w2s_train.errors import UserError

PREFERRED = ("hps_v2.1", "pick_score", "clip_score", "aesthetic")  # without --metric, the first
WHY = "preference scores rise with the scale of classifier-free guidance alone (arXiv 2602.22570)"
HOW = (
    "a sweep is, for S of 3.0 4.5 6.0 7.5: lightning imagine -c configs/text2image/MODEL.yaml ... "
    "--guidance.init_args.guidance_scale S --output images/cfg_S"
)
HOW_SCORED = (
    "the command of each folder again, with --scores, scores what is there (docs/imagine.md)"
)
SAMPLES = 4  # prompts on the page


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Args:
        mean: It.
        noise: Half its 95 % t interval; None for one prompt.
    """

    mean: float
    noise: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of one number per prompt."""
        n = len(values)
        noise = half_width(statistics.stdev(values), n) if n > 1 else None
        return cls(statistics.fmean(values), noise)

    @property
    def interval(self) -> Interval | None:
        """Its two ends."""
        return None if self.noise is None else self.around(self.mean)

    def around(self, centre: float) -> Interval | None:
        """An interval of this width elsewhere."""
        return None if self.noise is None else Interval(centre - self.noise, centre + self.noise)

    @property
    def verdict(self) -> str:
        """Of a difference from the baseline, of a score that is better if it is higher."""
        if self.noise is None:
            return "inconclusive: one prompt"
        if abs(self.mean) <= self.noise:
            return "inconclusive: within the noise"
        return "better" if self.mean > 0 else "worse"


@dataclass(frozen=True)
class ImageRow:
    """One arm.

    Args:
        folder: Its images.
        scale: If it is part of the sweep.
        scores: Means by score.
        differences: From the baseline, paired, by score.
        crossed: The difference of the metric from the scale that is best for the other half of
            the prompts; None of the baseline, and without a sweep.
        evaluations: An image, mean, in whole networks.
        seconds: An image, mean.
        median_seconds: An image.
        ratios: Of evaluations and of median seconds to the baseline's; None where that is 0.
        against_sweep: Paired differences of the metric from each arm of the sweep, by its name.
        categories: Paired differences of the metric from the baseline, by category.
        distances: By name.
    """

    folder: Folder
    scale: float | None
    scores: dict[str, Estimate]
    differences: dict[str, Estimate]
    crossed: Estimate | None
    evaluations: float
    seconds: float
    median_seconds: float
    ratios: tuple[float | None, float | None]
    against_sweep: dict[str, Estimate]
    categories: dict[str, Estimate]
    distances: dict[str, float]

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.folder.name

    def verdict(self, metric: str) -> str:
        """Against the baseline: each way by the choice of it that does not favour that way.

        The best scale of the same images is ahead by chance, so that "better" than it stands; the
        one that was best for other prompts is behind by chance, so that "worse" than it stands.
        """
        found = self.differences[metric].verdict
        if found != "worse" or self.crossed is None or self.crossed.verdict == "worse":
            return found
        return "inconclusive: worse than the best scale, which was chosen on these images, alone"


@dataclass(frozen=True)
class ImageComparison:
    """What the reports show.

    Args:
        metric: The score that decides.
        scores: All scores that are compared, the metric first.
        distances: Names of the distances that all arms have.
        protocol: What all images share.
        keys: Prompts and seeds of the images, in the order of the baseline's record.
        baseline: Name of its arm.
        sweep: Of classifier-free guidance's scales.
        rows: Baseline first, then by mean, best first.
        categories: Number of prompts by category; empty where there are none.
        refused: A line for each score that is left out.
        notes: Lines about what else is worth knowing.
        differences: Settings that differ, by key and arm.
    """

    metric: str
    scores: list[str]
    distances: list[str]
    protocol: dict[str, Any]
    keys: list[Key]
    baseline: str
    sweep: Sweep
    rows: list[ImageRow]
    categories: dict[str, int]
    refused: list[str]
    notes: list[str]
    differences: dict[str, dict[str, Any]]

    @property
    def prompts(self) -> list[str]:
        """Those of the images."""
        return list(dict.fromkeys(prompt for prompt, _ in self.keys))


@dataclass(frozen=True)
class Table:
    """The images that all folders have: numbers per prompt, means over its seeds.

    Args:
        folders: Of the comparison.
        keys: Prompts and seeds.
        known: Scores that were looked up before.
    """

    folders: Sequence[Folder]
    keys: list[Key]
    known: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)

    def of(self, folder: Folder, value: Callable[[Image], float]) -> dict[str, float]:
        """By prompt."""
        found: dict[str, list[float]] = {}
        for key in self.keys:
            found.setdefault(key[0], []).append(value(folder.images[key]))
        return {prompt: statistics.fmean(values) for prompt, values in found.items()}

    def score(self, folder: Folder, name: str) -> dict[str, float]:
        """A score by prompt."""
        if (key := (folder.name, name)) not in self.known:
            self.known[key] = self.of(folder, lambda image: image.scores[name])
        return self.known[key]

    @property
    def prompts(self) -> list[str]:
        """Those of the images."""
        return list(dict.fromkeys(prompt for prompt, _ in self.keys))

    def difference(
        self, folder: Folder, other: Folder, name: str, prompts: Sequence[str] | None = None
    ) -> Estimate:
        """Mean over prompts, all or some, of a score of one folder less that of another."""
        ours, theirs = self.score(folder, name), self.score(other, name)
        return Estimate.of([ours[p] - theirs[p] for p in prompts or ours])

    def crossed(self, folder: Folder, chosen: dict[str, Folder], name: str) -> Estimate:
        """The same, less that of a folder for each prompt."""
        ours = self.score(folder, name)
        return Estimate.of([ours[p] - self.score(each, name)[p] for p, each in chosen.items()])

    def best(self, folders: Sequence[Folder], name: str, prompts: Sequence[str]) -> Folder:
        """The one with the highest mean score of these prompts, of several the first."""
        means = [
            statistics.fmean([self.score(folder, name)[p] for p in prompts]) for folder in folders
        ]
        return folders[means.index(max(means))]


@dataclass(frozen=True)
class Baseline:
    """What arms are set against.

    Args:
        folder: It.
        chosen: Of a sweep, for each prompt the scale that was best for the other half of them.
    """

    folder: Folder
    chosen: dict[str, Folder] = field(default_factory=dict)


def compare_images(
    folders: Sequence[Folder], metric: str | None, baseline: str | None
) -> ImageComparison:
    """Compare folders of images.

    Args:
        folders: Of one protocol, sorted by name.
        metric: The score that decides; by default the first of `PREFERRED`, or any.
        baseline: Name of an arm; by default the best of the sweep.

    Raises:
        UserError: No image or score is in all folders, no such metric or arm, or no sweep and no
            baseline.
    """
    notes, refused = list[str](), list[str]()
    shared = set.intersection(*(set(folder.images) for folder in folders))
    if not shared:
        raise UserError("prompts=null: must have a prompt and seed in common; no two images pair")
    table = Table(folders, sorted(shared))
    _note_left_out(table, notes)
    scores = _with_first(common_scores(folders, table.keys, refused), metric, refused)
    sweep = find_sweep(folders)
    against = _find_baseline(table, sweep, scores[0], baseline, notes)
    base = against.folder
    order = [key for key in base.images if key in shared]
    categories = _categories(base, order)
    distances = _distances(folders, refused)
    rows = [_row(table, each, against, scores, sweep, categories, distances) for each in folders]
    rows.sort(key=lambda row: (row.name != base.name, -row.scores[scores[0]].mean))
    return ImageComparison(
        scores[0],
        scores,
        distances,
        base.facts,
        order,
        base.name,
        sweep,
        rows,
        {category: len(prompts) for category, prompts in categories.items()},
        refused,
        notes,
        _differences([row.folder for row in rows]),
    )


def _note_left_out(table: Table, notes: list[str]) -> None:
    for folder in table.folders:
        if more := len(folder.images) - len(table.keys):
            notes.append(
                f"{folder.name}: {more:,} of {len(folder.images):,} images are left out, whose "
                "prompt and seed others lack"
            )


def _with_first(scores: list[str], metric: str | None, refused: list[str]) -> list[str]:
    """The scores, the one that decides first."""
    if not scores:
        last = "metric=null: must be a score that all folders have; there is none: " + HOW_SCORED
        raise UserError("\n".join([*refused, last]))
    if metric is None:
        metric = next((name for name in PREFERRED if name in scores), scores[0])
    if metric not in scores:
        last = f"metric={metric}: must be one of {', '.join(scores)}"
        raise UserError("\n".join([*refused, last]))
    return [metric, *(name for name in scores if name != metric)]


def _find_baseline(
    table: Table, sweep: Sweep, metric: str, name: str | None, notes: list[str]
) -> Baseline:
    """The arm of that name, or the best of the sweep; ``notes`` says what that is worth."""
    names = ", ".join(folder.name for folder in table.folders)
    count = len(sweep.scales)
    if count < ENOUGH:
        notes.append(f"the baseline was not swept ({count} of {ENOUGH} scales): {WHY}; {HOW}")
    if name is not None:
        named = [folder for folder in table.folders if folder.name == name]
        if not named:
            raise UserError(f"baseline={name}: must be one of {names}")
        return Baseline(named[0])
    if not sweep.folders:
        raise UserError(
            "baseline=null: no folder has classifier-free guidance; must be one of "
            f"{names}, or {HOW}"
        )
    best = table.best(sweep.folders, metric, table.prompts)
    if count == 1:
        return Baseline(best)
    scale = sweep.scales[sweep.folders.index(best)]
    chosen, said = _crossed(table, sweep, metric)
    notes.append(
        f"baseline: {best.name}, scale {scale:g}, has the best {metric} of {count} scales of "
        f"classifier-free guidance; {said}"
    )
    if scale in (sweep.scales[0], sweep.scales[-1]):
        side = "smallest" if scale == sweep.scales[0] else "largest"
        notes.append(
            f"baseline: {scale:g} is the {side} scale of the sweep; one beyond it may score "
            "better yet"
        )
    return Baseline(best, chosen)


def _crossed(table: Table, sweep: Sweep, metric: str) -> tuple[dict[str, Folder], str]:
    """For each prompt the scale that is best for the other half of the prompts, and what that is.

    The best of several on the very images that it is compared on is ahead by chance, the one that
    is best on others is behind by chance. Halves are drawn by a hash of the prompts.
    """
    if len(table.prompts) < 2:
        return {}, "it was chosen on these very images, which favours it"
    drawn = sorted(table.prompts, key=lambda text: hashlib.sha256(text.encode()).digest())
    halves = drawn[::2], drawn[1::2]
    chosen, scales = dict[str, Folder](), list[str]()
    for half, other in (halves, halves[::-1]):
        best = table.best(sweep.folders, metric, other)
        chosen |= dict.fromkeys(half, best)
        scales.append(f"{sweep.scales[sweep.folders.index(best)]:g}")
    return chosen, (
        "the best on the very images is favoured by that, so that an arm is worse only if it is "
        "also worse than the scale that is best for the other half of the prompts "
        f"({' and '.join(scales)})"
    )


def _categories(base: Folder, keys: Sequence[Key]) -> dict[str, list[str]]:
    """Prompts by category, if there are two or more categories."""
    found: dict[str, dict[str, None]] = {}
    for key in keys:
        if (category := base.images[key].category) is not None:
            found.setdefault(category, {})[key[0]] = None
    return {name: list(found[name]) for name in sorted(found)} if len(found) > 1 else {}


def _distances(folders: Sequence[Folder], refused: list[str]) -> list[str]:
    """Names of the distances that all folders have, of as many images and to one reference."""
    kept = []
    for name in sorted({name for folder in folders for name in folder.distances}):
        about = [
            json.dumps(dict(folder.distances.get(name, {}), value=None), sort_keys=True)
            for folder in folders
        ]
        if len({*about}) == 1:
            kept.append(name)
        else:
            usual = max(sorted({*about}), key=about.count)
            odd = next(f.name for f, each in zip(folders, about, strict=True) if each != usual)
            refused.append(f"{name}: is missing in {odd}, or of other images or another reference")
    return kept


def _row(
    table: Table,
    folder: Folder,
    base: Baseline,
    scores: Sequence[str],
    sweep: Sweep,
    categories: dict[str, list[str]],
    distances: Sequence[str],
) -> ImageRow:
    swept = zip(sweep.folders, sweep.scales, strict=True)
    evaluations, seconds, median = _costs(table, folder)
    base_evaluations, _, base_median = _costs(table, base.folder)
    return ImageRow(
        folder,
        next((scale for each, scale in swept if each is folder), None),
        {name: Estimate.of([*table.score(folder, name).values()]) for name in scores},
        {name: table.difference(folder, base.folder, name) for name in scores},
        table.crossed(folder, base.chosen, scores[0])
        if base.chosen and folder is not base.folder
        else None,
        evaluations,
        seconds,
        median,
        (_ratio(evaluations, base_evaluations), _ratio(median, base_median)),
        {each.name: table.difference(folder, each, scores[0]) for each in sweep.folders},
        {
            category: table.difference(folder, base.folder, scores[0], prompts)
            for category, prompts in categories.items()
        },
        {name: float(folder.distances[name]["value"]) for name in distances},
    )


def _costs(table: Table, folder: Folder) -> tuple[float, float, float]:
    """Evaluations and seconds, means over images; the median of seconds, without the first ones."""
    seconds = [folder.images[key].seconds for key in table.keys]
    evaluations = statistics.fmean(folder.images[key].evaluations for key in table.keys)
    return evaluations, statistics.fmean(seconds), statistics.median(seconds)


def _ratio(ours: float, base: float) -> float | None:
    return ours / base if base and math.isfinite(ours / base) else None


def _differences(folders: Sequence[Folder]) -> dict[str, dict[str, Any]]:
    """Settings that differ, by key and arm; arms that do not have one are left out of it."""
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(key for folder in folders for key in folder.listed):
        by_arm = {folder.name: folder.listed.get(key) for folder in folders}
        if len({json.dumps(value) for value in by_arm.values()}) > 1:
            found[key] = {name: value for name, value in by_arm.items() if value is not None}
    return found

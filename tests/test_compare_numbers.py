"""The statistics of a comparison."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from run_folders import BRANCH, write_run
from test_old_runs import NEWER

from w2s_train.compare import numbers
from w2s_train.compare.runs import LATER, Run, read


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 5), (8, 3)])
def test_welch_against_scipy(sizes: tuple[int, int]):
    """The same standard error, and never more degrees of freedom than Welch's."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 0.3, sizes[0]).tolist(), rng.normal(2, 1.0, sizes[1]).tolist()
    found = scipy.stats.ttest_ind(a, b, equal_var=False)
    half = numbers.welch_half_width(a, b)
    error = (np.mean(a) - np.mean(b)) / found.statistic
    assert half == pytest.approx(abs(error) * scipy.stats.t.ppf(0.975, min(sizes) - 1), rel=1e-9)
    interval = found.confidence_interval(0.95)
    assert half >= (interval.high - interval.low) / 2


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.0), (1.0, 3.0)])
def test_unequal_numbers_of_seeds_without_an_effect_pass_no_more_often(scales: tuple):
    rng = np.random.default_rng(0)
    passed = 0
    for _ in range(1000):
        a, b = (rng.normal(0, s, n).tolist() for s, n in zip(scales, (2, 20), strict=True))
        passed += abs(np.mean(a) - np.mean(b)) > numbers.welch_half_width(a, b)
    assert passed <= 65


@pytest.mark.slow
def test_three_seeds_without_an_effect_pass_one_time_in_twenty():
    """What the verdict rests on keeps its promise; the bootstrap of three seeds does not."""
    rng = np.random.default_rng(0)
    welch = bootstrap = 0
    for a, b in rng.normal(size=(1000, 2, 3)).tolist():
        welch += abs(np.mean(a) - np.mean(b)) > numbers.welch_half_width(a, b)
        draws = [numbers.bootstrap([[x] for x in s], seed)[:500] for seed, s in enumerate((a, b))]
        found = numbers.percentiles(draws[0] - draws[1])
        bootstrap += not found.low <= 0 <= found.high
    assert welch <= 60
    assert bootstrap >= 120


def test_bootstrap_has_the_variance_of_crossed_seeds():
    """Of populations: runs / n + sampling seeds / m + the rest / (n m)."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 1)) + 2.0 * rng.normal(size=(1, 4)) + rng.normal(size=(6, 4))
    runs, seeds = scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    rest = scores - runs - seeds + scores.mean()
    draws = numbers.bootstrap(scores.tolist())
    expected = runs.var() / 6 + seeds.var() / 4 + rest.var() / 24
    assert draws.var() == pytest.approx(expected, rel=0.06)
    assert draws.mean() == pytest.approx(scores.mean(), abs=4 * draws.std() / math.sqrt(len(draws)))


def test_both_arms_draw_the_same_sampling_seeds():
    """What sampling seeds do to both arms alike does nothing to the ratio."""
    base = [[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]]
    half = [[0.5, 1.0, 2.0]] * 3
    found = numbers.judge(half, base, higher_is_better=False).interval
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(0.5))


def test_bootstrap_covers_and_repeats():
    rng = np.random.default_rng(1)
    covered = 0
    for sample in rng.normal(3.0, 1.0, size=(200, 25)).tolist():
        found = numbers.bootstrap_interval([[x] for x in sample])
        covered += found.low <= 3.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.98
    sample = [[1.0, 1.1], [2.0, 2.0], [4.0, 4.5]]
    assert numbers.bootstrap_interval(sample) == numbers.bootstrap_interval(sample)
    assert numbers.bootstrap_interval([[1.0, 2.0]]) is None


def test_means_and_deviations_of_two_levels():
    sample = [[1.0, 3.0], [4.0]]
    assert numbers.mean(sample) == 3.0
    assert numbers.spread(sample) == pytest.approx(math.sqrt(2))
    assert numbers.sampling_spread(sample) == pytest.approx(math.sqrt(2))
    assert numbers.spread([[1.0, 3.0]]) is None
    assert numbers.sampling_spread([[1.0], [3.0]]) is None


@pytest.mark.parametrize(
    "ours, base, higher, verdict",
    [
        ([0.991] * 2, [1.0] * 2, False, "inconclusive: the gap is 0.9 %, the noise 1.3 %"),
        ([0.98] * 2, [1.0] * 2, False, "better"),
        ([0.98] * 2, [1.0] * 2, True, "worse"),
        ([1.02] * 2, [1.0] * 2, False, "worse"),
        # With one degree of freedom, t sqrt((ln(8/6)^2 + ln(11/9)^2) / 4) = 12.7 x 0.175 = 2.23:
        # the score may fall by 1 - e^-2.23 or rise by e^2.23 - 1 by chance.
        ([0.6, 0.8], [0.9, 1.1], False, "inconclusive: the gap is 30 %, the noise 89 %"),
        ([0.9, 1.1], [0.6, 0.8], False, "inconclusive: the gap is 43 %, the noise 828 %"),
        # t sqrt(1.3 / 3 / 4 + 0.02 / 2) = 12.7 x 0.344, of amounts, for one score is not positive
        (
            [0.6, 0.8, -0.1, 1.5],
            [0.9, 1.1],
            False,
            "inconclusive: the gap is 30 %, the noise 437 %",
        ),
        ([0.5], [1.0] * 3, False, "inconclusive: one seed, the gap is 50 %"),
        ([-0.1] * 2, [-0.2] * 2, False, "worse"),
        ([0.1] * 2, [0.0] * 2, False, "inconclusive: the baseline's score is 0"),
    ],
)
def test_verdicts(ours: list, base: list, higher: bool, verdict: str):
    judged = numbers.judge([[x] for x in ours], [[x] for x in base], higher_is_better=higher)
    assert judged.verdict == verdict
    expected = np.mean(ours) / np.mean(base) if base[0] > 0 else None
    assert judged.ratio == (None if expected is None else pytest.approx(expected))


def test_interpolation():
    x = [1.0, 2.0, 4.0]
    assert numbers.interpolate(x, [-5.0, -3.0, 1.0], 3.0) == pytest.approx(-1.0)  # 2 x - 7
    assert numbers.interpolate(x, [-5.0, -3.0, 1.0], 1.25) == pytest.approx(-4.5)
    halved = [2.0**-value for value in x]
    assert numbers.interpolate(x, halved, 3.0) == pytest.approx(2.0**-3)
    assert numbers.interpolate(x, halved, 4.0) == halved[-1]
    assert numbers.interpolate(x, halved, 0.9) is None
    assert numbers.interpolate(x, halved, 4.1) is None


def test_a_name_of_a_segment_makes_no_other_recipe(tmp_path: Path):
    """It stands in logs only; a scale does."""
    named, other = copy.deepcopy(BRANCH), copy.deepcopy(BRANCH)
    named[0]["init_args"]["name"] = "high"
    other[0]["init_args"]["scale"] = 0.4
    plain, same, differs = (
        read(write_run(tmp_path / name, segments=segments)).recipe
        for name, segments in (("a", BRANCH), ("b", named), ("c", other))
    )
    assert plain == same != differs


def test_arguments_that_came_later_make_no_other_recipe(tmp_path: Path):
    """At what runs before them had."""
    own = {key: value for key, value in NEWER.items() if value is not None and value is not False}
    assert own == LATER
    network = {"class_path": "w2s_train.models.DiT", "init_args": {"depth": 4}}

    def run(**arguments: object) -> Run:
        made = copy.deepcopy(network)
        made["init_args"] |= arguments  # type: ignore[operator]
        return read(write_run(tmp_path / f"{arguments}", segments=BRANCH, network=made))

    before, same = run(), run(**LATER)
    assert same.recipe == before.recipe and same.settings == before.settings
    for key, value in (("shift", False), ("class_tokens", 2), ("scales_from", 1)):
        assert run(**LATER | {key: value}).recipe != before.recipe

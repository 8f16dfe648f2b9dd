"""The figure of guideability against time, and where a comparison shows it."""

import csv
from pathlib import Path

import pytest
from run_folders import BRANCH, write_run

from w2s_train.compare import guideability
from w2s_train.compare.guideability import Entry, Value, pooled, read, stages
from w2s_train.compare.runs import LOOK_ON
from w2s_train.look_on import LookOn

LOOKERS = [{"class_path": LOOK_ON, "init_args": {"low": 0.0, "high": 1.0, "name": "head"}}]


def log(folder: Path, *rows: tuple[int, str, float, float]) -> Path:
    """Write a ``metrics.csv``: step, place and segment, gamma in two tenths, its error."""
    names = {f"{where}/tenth_{tenth}/guideability" for _, where, _, _ in rows for tenth in TENTHS}
    columns = ["step", "train/loss", *(n + end for n in sorted(names) for end in ("", "_error"))]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step, where, gamma, error in rows:
            row = {"step": step, "train/loss": 1.0}
            for k, tenth in enumerate(TENTHS):
                name = f"{where}/tenth_{tenth}/guideability"
                row |= {name: gamma + k, f"{name}_error": error}
            writer.writerow(row)
    return folder


TENTHS = ("0-0.1", "0.9-1")


def test_what_was_logged_is_read(tmp_path: Path):
    """Of a step that a resumed run has taken twice, the last."""
    head, low = "held_out/head", "train/t_0-0.2"
    log(
        tmp_path,
        (10, head, 0.5, 0.1),
        (20, head, 9.0, 0.1),
        (20, low, -0.3, 0.2),
        (20, head, 0.7, 0.1),
    )
    found = read(tmp_path)
    assert {key: [entry.step for entry in some] for key, some in found.items()} == {
        ("held_out", "head"): [10, 10, 20, 20],
        ("train", "t_0-0.2"): [20, 20],
    }
    last = [entry.value for entry in found["held_out", "head"] if entry.step == 20]
    assert [each.t for each in last] == pytest.approx([0.05, 0.95])
    assert [each.gamma for each in last] == pytest.approx([0.7, 1.7])
    assert read(tmp_path / "none") == {}


def test_means_are_weighted_by_what_is_known():
    """Of two values, one with a third of the error: nine parts and one."""
    (mean,) = pooled([Value(0.5, 1.0, 0.3), Value(0.5, 0.0, 0.1)])
    assert mean.gamma == pytest.approx(0.1)
    assert mean.error == pytest.approx((1 / 0.09 + 1 / 0.01) ** -0.5)


def test_stages_are_quarters_of_the_steps():
    entries = [Entry(step, Value(0.5, float(step), 0.1)) for step in range(10, 101, 10)]
    means = [[round(each.gamma) for each in values] for values in stages(entries)]
    assert means == [[15], [40], [65], [90]]  # to 25, 50, 75 and 100


def test_the_figure_shows_what_was_logged(tmp_path: Path):
    rows = [(step, "held_out/head", 1 / step, 0.01) for step in (100, 200, 300, 400)]
    log(tmp_path, *rows, (400, "train/class", -0.5, 0.01))
    panels = guideability.figure(read(tmp_path)).axes
    shown = {axes.get_title(): axes for axes in panels if axes.get_visible()}
    assert set(shown) == {"head, held-out rows", "class, training rows"}
    curves = {line.get_label(): line for line in shown["head, held-out rows"].lines[1:]}
    assert list(curves) == ["steps to 100", "steps to 200", "steps to 300", "steps to 400"]
    for step in (200, 400):
        assert curves[f"steps to {step}"].get_xdata() == pytest.approx([0.05, 0.95])
        assert curves[f"steps to {step}"].get_ydata() == pytest.approx([1 / step, 1 + 1 / step])
    guideability.write(tmp_path)
    assert (tmp_path / "guideability.png").read_bytes().startswith(b"\x89PNG")


def test_without_numbers_there_is_no_figure(tmp_path: Path):
    guideability.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_comparison_shows_it(arms, compare, tmp_path: Path):
    log(arms[2], (100, "train/head", -0.2, 0.05), (300, "train/head", -0.3, 0.05))
    log(arms[3], (300, "train/head", -0.31, 0.05))
    compare(*arms)
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Guideability against time" in page and "γ of head, training rows" in page
    (_, chart), *more = guideability.charts([[arms[2], arms[3]], [arms[0]]])
    assert not more and chart.startswith("<svg")


def test_a_run_that_looks_on_is_one_of_the_baseline(arms, make, compare):
    assert f"{LookOn.__module__}.{LookOn.__name__}" == LOOK_ON
    write_run(arms[0].parent / "none_looks-2", 2, (8.0, 4.0, 2.01), segments=LOOKERS)
    make("branch_looks-2", 2, (4.0, 1.0, 0.51), segments=BRANCH + LOOKERS)
    found, _ = compare(arms[0].parent / "*")
    assert [arm["seeds"] for arm in found["arms"]] == [[0, 1, 2], [0, 1, 2]]
    assert found["baseline"] == "none"

"""`lightning compare` of folders of images: pairs, intervals over prompts, the sweep."""

import hashlib
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import quick
from imagined_folders import cfg, change, segmented, write_images
from scipy import stats

from w2s_train.compare.image_comparison import ImageComparison, compare_images
from w2s_train.compare.images import read_folders
from w2s_train.compare.sweep import scale_of


def judged(*folders: Path, metric: str | None = None, baseline: str | None = None):
    return compare_images(read_folders([str(folder) for folder in folders]), metric, baseline)


def row(comparison: ImageComparison, name: str) -> Any:
    return next(row for row in comparison.rows if row.name == name)


def noisy(mean: float, seed: int, noise: float = 0.3):
    """Scores of a prompt that all arms share, and noise of their own."""
    own = random.Random(seed)
    return lambda i, k: 10.0 + 3.0 * math.sin(i) + mean + own.gauss(0.0, noise)


def sweep_in(folder: Path, **scales: float) -> list[Path]:
    """Folders cfg_SCALE with these mean scores."""
    return [
        write_images(folder / name, cfg(float(name[4:].replace("_", "."))), noisy(mean, i), 40)
        for i, (name, mean) in enumerate(scales.items())
    ]


def test_difference_and_interval_by_hand(tmp_path: Path):
    """Means over seeds first, then Student's t over prompts."""
    base = write_images(tmp_path / "cfg_4.5", cfg(4.5), lambda i, k: i)
    ours = write_images(tmp_path / "sgg", segmented(), lambda i, k: i + (0.5, 1.0, 1.5, 3.0)[i] + k)
    found = judged(base, ours)
    differences = [1.0, 1.5, 2.0, 3.5]
    estimate = row(found, "sgg").differences["hps_v2.1"]
    assert estimate.mean == pytest.approx(2.0)
    expected = stats.t.interval(0.95, 3, loc=2.0, scale=stats.sem(differences))
    assert estimate.interval == pytest.approx(expected)
    assert found.baseline == "cfg_4.5" and estimate.verdict == "better"
    assert row(found, "sgg").scores["hps_v2.1"].mean == pytest.approx(3.5)
    assert row(judged(base, ours, baseline="sgg"), "cfg_4.5").differences[
        "hps_v2.1"
    ].mean == pytest.approx(-2.0)


def test_order_of_folders_and_images_says_nothing(tmp_path: Path):
    folders = [*sweep_in(tmp_path, cfg_3=0.0, cfg_4=0.2, cfg_5=0.1)]
    folders.append(write_images(tmp_path / "sgg", segmented(), noisy(0.3, 9), 40))
    first = judged(*folders)
    random.Random(0).shuffle(folders)
    change(folders[0], lambda content: content["images"].reverse())
    again = judged(*folders)
    assert [each.name for each in again.rows] == [each.name for each in first.rows]
    for ours, theirs in zip(first.rows, again.rows, strict=True):
        for name, estimate in ours.differences.items():
            assert estimate.mean == pytest.approx(theirs.differences[name].mean, abs=1e-12)
    assert first.notes == again.notes


def test_verdicts(tmp_path: Path):
    """What was planted is found, and noise is not; prompts differ far more than arms do."""
    folders = sweep_in(tmp_path, cfg_3=-0.4, cfg_4_5=0.0, cfg_6=-0.4)
    for name, mean in {"more": 0.3, "same": 0.0, "less": -0.3}.items():
        folders.append(write_images(tmp_path / name, segmented(), noisy(mean, 100), 40))
    found = judged(*folders)
    assert found.baseline == "cfg_4_5"
    kinds = {r.name: r.differences[found.metric].verdict.partition(":")[0] for r in found.rows}
    assert {name: kinds[name] for name in ("more", "same", "less")} == {
        "more": "better",
        "same": "inconclusive",
        "less": "worse",
    }
    against = row(found, "same").against_sweep
    assert against["cfg_3"].verdict == against["cfg_6"].verdict == "better"
    assert row(found, "more").scores[found.metric].noise > 3 * against["cfg_3"].noise


def test_how_often_nothing_is_called_something(tmp_path: Path):
    """Of arms without an effect about one in twenty: 400 of them, of 10 prompts."""
    random.seed(1)
    from w2s_train.compare.image_comparison import Estimate

    draws = (Estimate.of([random.gauss(0, 1) for _ in range(10)]) for _ in range(400))
    hits = sum(not each.verdict.startswith("inconclusive") for each in draws)
    assert 8 <= hits <= 34  # 20 expected; 0.2 % beyond, to both sides together


def test_the_best_of_the_sweep_is_the_baseline(tmp_path: Path):
    folders = sweep_in(tmp_path, cfg_1=-3.0, cfg_3=0.0, cfg_4=1.0, cfg_6=0.5)
    folders.append(
        write_images(tmp_path / "rescaled", cfg(5.0, guidance_rescale=0.7), noisy(9, 9), 40)
    )
    folders.append(write_images(tmp_path / "zero_border", segmented(border=0.0), noisy(0.6, 8), 40))
    found = judged(*folders)
    assert found.baseline == "cfg_4" and found.sweep.scales == [1.0, 3.0, 4.0, 4.5, 6.0]
    assert row(found, "rescaled").scale is None
    assert any("best hps_v2.1 of 5 scales" in note and "(4 and 4)" in note for note in found.notes)
    assert not any("not swept" in note or "smallest" in note for note in found.notes)
    assert [row.name for row in found.rows][:2] == ["cfg_4", "rescaled"]


@pytest.mark.parametrize("peak", quick([0.0, 0.09]))
def test_equal_arms_are_seldom_called_something(tmp_path: Path, peak: float):
    """Seven scales, equal or with a peak, and an arm like the best: of 30 one or two by chance.

    The best on the very images alone would be favoured, the best for other prompts a handicap.
    """
    found, swept, same, crossed = list[str](), list[str](), [], []
    for trial in range(30):
        folder, own = tmp_path / str(trial), iter(range(1000 * trial, 1000 * trial + 99))
        folders = [
            write_images(
                folder / f"cfg_{k}", cfg(float(k)), noisy(-peak * abs(k - 5), next(own)), 16
            )
            for k in range(2, 9)
        ]
        folders.append(write_images(folder / "sgg", segmented(), noisy(0.0, next(own)), 16))
        compared = judged(*folders)
        rivals = [each for each in compared.rows if each.name.startswith("cfg")]
        swept += [r.verdict("hps_v2.1") for r in rivals if r.name != compared.baseline]
        ours = row(compared, "sgg")
        found.append(ours.verdict("hps_v2.1").partition(":")[0])
        same.append(ours.differences["hps_v2.1"].mean)
        crossed.append(ours.crossed.mean)
    assert found.count("better") + found.count("worse") <= 5
    assert statistics.fmean(same) < statistics.fmean(crossed)
    if not peak:  # all scales are equal
        assert swept.count("worse") <= 5 and not swept.count("better")


def test_the_scale_is_chosen_on_the_other_half(tmp_path: Path):
    """By hand: scale 3 is far better for one half of the prompts, 4 for the other."""
    base = sweep_in(tmp_path, cfg_3=0.0, cfg_4=0.4)
    ours = write_images(tmp_path / "sgg", segmented(), noisy(1.0, 9), 40)
    prompts = judged(*base, ours).prompts
    drawn = sorted(prompts, key=lambda text: hashlib.sha256(text.encode()).digest())

    def lift(content: dict[str, Any]) -> None:
        for image in content["images"]:
            if image["prompt"] in drawn[::2]:
                image["scores"]["hps_v2.1"] += 5.0

    change(base[0], lift)
    found = judged(*base, ours)
    assert found.baseline == "cfg_3" and any("4 and 3" in note for note in found.notes)
    scores = {
        loaded.name: {
            text: statistics.fmean(
                image.scores["hps_v2.1"] for key, image in loaded.images.items() if key[0] == text
            )
            for text in drawn
        }
        for loaded in read_folders([str(folder) for folder in (*base, ours)])
    }
    crossed = [
        scores["sgg"][text] - scores["cfg_4" if i % 2 == 0 else "cfg_3"][text]
        for i, text in enumerate(drawn)
    ]
    plain = [scores["sgg"][text] - scores["cfg_3"][text] for text in drawn]
    judged_row = row(found, "sgg")
    assert judged_row.crossed.mean == pytest.approx(statistics.fmean(crossed))
    assert judged_row.differences["hps_v2.1"].mean == pytest.approx(statistics.fmean(plain))
    assert judged_row.differences["hps_v2.1"].verdict == "worse"
    assert judged_row.verdict("hps_v2.1").startswith("inconclusive: worse than the best scale")
    assert {each.name for each in found.rows if not each.crossed} == {found.baseline}


def test_a_sweep_that_is_none(tmp_path: Path):
    """Notes say so, and that its best is at its end."""
    folders = sweep_in(tmp_path, cfg_3=0.0, cfg_6=1.0)
    notes = " ".join(judged(*folders).notes)
    assert "not swept (2 of 3 scales)" in notes and "arXiv 2602.22570" in notes
    assert "guidance_scale S" in notes and "6 is the largest scale" in notes
    chosen = judged(*folders, baseline="cfg_3")
    assert chosen.baseline == "cfg_3" and not any("chosen" in note for note in chosen.notes)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        (cfg(4.5), 4.5),
        (cfg(3.5, use_original_formulation=True), 4.5),
        (cfg(4.5, enabled=False), None),
        (segmented(), None),
        (segmented(border=None, switch=0.5), None),
        (segmented(border=0.0), 4.5),
        (segmented(border=None, switch=1.0), 4.5),
        (segmented(border=None, switch=1.0, guidance_delta=1.0), None),
        (
            {"class": "w2s_train.text2image.stage_wise.StageWiseGuidance", "guidance_scale": 4.5},
            None,
        ),
        ({"class": "w2s_train.text2image.learned.LearnedGuidance", "path": "a"}, None),
    ],
)
def test_scales(settings: dict[str, Any], scale: float | None):
    assert scale_of(settings) == scale


def test_only_what_all_have_counts(tmp_path: Path):
    """Fewer prompts or seeds in one; each pair alike in value, whatever else there is."""
    base = write_images(tmp_path / "cfg_4.5", cfg(4.5), lambda i, k: i, prompts=5, seeds=3)
    ours = write_images(tmp_path / "sgg", segmented(), lambda i, k: i + 1, prompts=3, seeds=4)
    found = judged(base, ours)
    assert len(found.keys) == 9 and len(found.prompts) == 3
    assert row(found, "sgg").differences["hps_v2.1"].mean == pytest.approx(1.0)
    assert "cfg_4.5: 6 of 15 images are left out, whose prompt and seed others lack" in found.notes
    assert "sgg: 3 of 12 images are left out, whose prompt and seed others lack" in found.notes


def test_scores_that_not_all_have(tmp_path: Path):
    folders = [write_images(tmp_path / f"cfg_{i}", cfg(i)) for i in (3, 4)]

    def more(content: dict[str, Any], name: str, value: float, fingerprint: str = "a") -> None:
        content["judges"][name] = fingerprint
        for entry in content["images"]:
            entry["scores"][name] = value

    for i, folder in enumerate(folders):
        change(folder, lambda content: more(content, "clip_score", 30.0))
        change(folder, lambda content, i=i: more(content, "aesthetic", 5.0, f"print{i}"))
    change(folders[0], lambda content: more(content, "pick_score", 20.0))
    change(folders[1], lambda content: content["images"][0]["scores"].pop("clip_score"))
    found = judged(*folders)
    assert found.scores == ["hps_v2.1"]
    assert found.refused == [
        "aesthetic: comes from different weights, print0 (cfg_3) and print1 (cfg_4)",
        "clip_score: is missing in cfg_4 (1 of 8 images); the command with `--scores` adds it",
        "pick_score: is missing in cfg_4 (8 of 8 images); the command with `--scores` adds it",
    ]


def test_distances_are_shown_where_they_are_of_the_same_images(tmp_path: Path):
    folders = [write_images(tmp_path / f"cfg_{i}", cfg(i)) for i in (3, 4)]
    about = {"images": "8, sha256:ab", "extractor": "x", "reference": {"n": 9}}
    for i, folder in enumerate(folders):
        distances = {"fid": about | {"value": 2.0 + i}, "fd_x": about | {"value": 1.0, "images": i}}
        change(folder, lambda content, d=distances: content.update(distances=d))
    found = judged(*folders)
    assert found.distances == ["fid"] and row(found, "cfg_4").distances == {"fid": 3.0}
    assert found.refused == ["fd_x: is missing in cfg_4, or of other images or another reference"]


def test_categories_and_costs(tmp_path: Path):
    """By category the same differences, of its prompts; seconds are a median."""
    base = write_images(tmp_path / "cfg_4.5", cfg(4.5), lambda i, k: 0.0)
    ours = write_images(tmp_path / "sgg", segmented(), lambda i, k: i + (1.0 if i > 1 else 0.0))

    def edit(content: dict[str, Any]) -> None:
        for entry in content["images"]:
            entry["category"] = "late" if entry["prompt"] > "prompt 1" else "early"
            entry["evaluations"] = 28.0
        content["images"][0]["seconds"] = 1000.0

    for folder in (base, ours):
        change(folder, edit)
    change(base, lambda content: [e.update(evaluations=56.0) for e in content["images"]])
    found = judged(base, ours)
    sgg = row(found, "sgg")
    assert found.categories == {"early": 2, "late": 2}
    assert {name: each.mean for name, each in sgg.categories.items()} == {"early": 0.5, "late": 3.5}
    assert (sgg.evaluations, sgg.ratios) == (28.0, (0.5, 1.0))
    assert sgg.median_seconds == 2.0 and sgg.seconds == pytest.approx((1000 + 7 * 2) / 8)


def refuse(content: dict[str, Any], key: str, value: Any) -> None:
    content["protocol"][key] = value


ERRORS = {
    "steps": (lambda c: refuse(c, "steps", 40), r"cfg_4: steps=40: must be 28, as in .*cfg_3$"),
    "model": (lambda c: refuse(c, "model", {"sha256": "b"}), r"model.sha256=b: must be aa"),
    "schema": (lambda c: c.update(schema=2), r"imagine.json: schema=2: must be 1$"),
    "shape": (lambda c: c.update(images=3), r"must be a record of `lightning imagine`; TypeError"),
    "not a number": (
        lambda c: c["images"][0]["scores"].update({"hps_v2.1": math.nan}),
        r"must be a record of `lightning imagine`; .*NaN is no number",
    ),
    "unscored": (
        lambda c: [e["scores"].clear() for e in c["images"]],
        r"metric=null: must be a score that all folders have",
    ),
    "other prompts": (
        lambda c: [e.update(prompt="x" + e["prompt"]) for e in c["images"]],
        r"prompts=null: must have a prompt and seed in common",
    ),
    "empty": (lambda c: c.update(images=[]), r"must have at least one image"),
    "no sweep": (
        lambda c: c["protocol"].update(guidance_settings=segmented()),
        r"baseline=null: no folder has classifier-free guidance; must be one of cfg_3, cfg_4, or",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(tmp_path: Path, compare, name: str):
    edit, message = ERRORS[name]
    folders = [
        write_images(tmp_path / f"cfg_{i}", segmented() if name == "no sweep" else cfg(i))
        for i in (3, 4, 5)
    ][: 2 if name != "steps" else 3]
    change(folders[1], edit)
    with pytest.raises(SystemExit, match=message) as error:
        compare(*folders)
    assert str(error.value.code).startswith("error: ") and "\n" not in str(error.value.code)


def test_options_and_folders_that_do_not_fit(tmp_path: Path, compare, arms):
    folders = [write_images(tmp_path / "images" / f"cfg_{i}", cfg(i)) for i in (3, 4)]
    cases = [
        ((*folders, "--weights", "ema"), "weights=ema: must be left out for folders of images"),
        ((*folders, "--settings"), "settings=True: must be left out for folders of images"),
        ((*folders, "--guidance", "none"), "guidance=none: must be left out"),
        ((*folders, "--unfinished"), "unfinished=True: must be left out"),
        ((*folders, arms[0]), "must be a folder of `lightning imagine`, as"),
        ((*folders, tmp_path / "nothing"), "run=.*nothing: must be a run folder"),
        ((*folders, tmp_path), "must be a folder of `lightning imagine`, with imagine.json"),
        ((folders[0], folders[0]), "must be at least two folders of images"),
        ((*folders, "--metric", "fid"), "metric=fid: must be one of hps_v2.1"),
        ((*folders, "--baseline", "x"), "baseline=x: must be one of cfg_3, cfg_4"),
    ]
    for args, message in cases:
        with pytest.raises(SystemExit, match=message):
            compare(*args)


def test_the_command_and_its_files(tmp_path: Path, compare):
    """Numbers agree in all of them, names and prompts are no markup, samples are embedded."""
    evil = "<script>alert(1)</script> | {{ 7 * 7 }}"
    scales = {3.0: -0.4, 4.5: 0.0, 6.0: -0.4}
    folders = [
        write_images(tmp_path / "i" / f"cfg_{s}", cfg(s), noisy(m, 3), png=True)
        for s, m in scales.items()
    ]
    folders.append(write_images(tmp_path / "i" / "<b>sgg", segmented(), noisy(0.5, 4), png=True))
    for folder in folders:
        change(
            folder,
            lambda c: [e.update(category=evil, prompt=evil + e["prompt"]) for e in c["images"]],
        )
    (folders[0] / "prompt-1-0.png").unlink()
    content, out = compare(str(tmp_path / "i" / "*"))
    html, markdown = ((tmp_path / "out" / f"comparison.{x}").read_text() for x in ("html", "md"))
    assert content["kind"] == "images" and content["baseline"] == "cfg_4.5"
    assert [each["scale"] for each in content["sweep"]] == [3.0, 4.5, 6.0]
    difference = content["arms"][1]["scores"]["hps_v2.1"]["difference"]
    text = f"+{difference['mean']:.3f} ± {difference['mean'] - difference['interval'][0]:.3f}"
    assert content["arms"][1]["name"] == "<b>sgg"
    assert text in html and text in markdown and text in " ".join(out.split())
    assert "<script" not in html and "<b>sgg" not in html and html.count("data:image/jpeg") == 15
    assert "prompt-1-0.png: must be a PNG image" in html
    assert "better" in out and "note: baseline: cfg_4.5" in out

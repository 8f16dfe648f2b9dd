"""Comparing runs that are not all alike: what still holds, what is said about it."""

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from run_folders import BRANCH

from w2s_train.compare.report import score
from w2s_train.compare.runs import read
from w2s_train.scores import grid_name


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch: pytest.MonkeyPatch):
    """Charts take longer than all the rest, and no test here looks at them."""
    monkeypatch.setattr("w2s_train.compare.page.chart", lambda *_, **__: "")


def edit(folder: Path, change) -> None:
    """Rewrite the scores of a run."""
    path = folder / "scores.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def add_range(folder: Path, offset: float, steps: tuple[int, ...] = (100, 200, 300)) -> None:
    """Score steps with further sampling seeds, higher by some offset."""

    def change(scores: list) -> list:
        more = copy.deepcopy([s for s in scores if s["step"] in steps])
        for entry in more:
            entry["value"] += offset
            entry["protocol"]["seeds"] = [1000, 1999]
        return scores + more

    edit(folder, change)


def with_entries(**values: object):
    return lambda scores: [s | values for s in scores]


def with_protocol(**values: object):
    return lambda scores: [s | {"protocol": s["protocol"] | values} for s in scores]


def names(found: dict) -> list[str]:
    return [arm["name"] for arm in found["arms"]]


# ---- points ----------------------------------------------------------------------------------


def test_a_point_has_the_sampling_seeds_that_all_have(arms, compare):
    """Sampling seeds with higher scores that only one arm has there decide nothing."""
    without, _ = compare(*arms)
    for folder in arms[:2]:
        add_range(folder, 100.0)
    for folder in arms[2:]:
        add_range(folder, 100.0, (100,))
    found, _ = compare(*arms)
    for ours, theirs in zip(found["arms"], without["arms"], strict=True):
        assert ours["equal_steps"] == theirs["equal_steps"]
        assert ours["equal_wall_clock"] == theirs["equal_wall_clock"]
    assert found["protocol"]["seeds"] == [[0, 999]]
    base, arm = found["arms"]
    assert [p["mean"] for p in base["curve"]] == pytest.approx([58, 54, 52.01])
    assert [p["mean"] for p in arm["curve"]] == pytest.approx([54, 1, 0.51])


def test_a_shorter_run_is_named(make, arms, compare):
    short = make("short-0", 0, (9.0, 8.0), segments=BRANCH, flip=True)
    text = (short / "config.yaml").read_text().replace("max_steps: 300", "max_steps: -1")
    (short / "config.yaml").write_text(text)
    found, _ = compare(*arms, short)
    assert found["arms"][1]["step"] == 200
    assert f"equal steps are step 200: {short} ends at 200, others at up to 300" in found["notes"]


def test_a_baseline_without_times(arms, compare):
    for folder in arms[:2]:
        edit(folder, with_protocol(training_seconds=None))
    found, printed = compare(*arms)
    assert [arm["equal_wall_clock"] for arm in found["arms"]] == [None, None]
    assert found["notes"] == ["none: the baseline has no times, so none are equal"]
    assert "not scored" not in printed


def test_an_arm_without_times_is_said_to_have_none(arms, compare, tmp_path: Path):
    for folder in arms[2:]:
        edit(folder, with_protocol(training_seconds=None))
    compare(*arms)
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "| branch |  | – | – | no times | – | – |" in report


# ---- arms ------------------------------------------------------------------------------------


def test_names_are_unique(make, arms, compare):
    for folder, last in (("a", 1), ("b", 2), ("c", 3), ("d", 4)):
        many = dict.fromkeys(("k1", "k2", "k3"), int(folder == "d"))
        make(f"{folder}/x-5", 5, segments=BRANCH, **many, k4=last)
    found, _ = compare(*arms, arms[0].parent / "?/x-5")
    assert len(set(names(found))) == len(found["arms"]) == 6


def test_absent_null_and_false_are_the_same(make, arms, compare):
    make("branch-2", 2, segments=BRANCH, flip=False)
    make("branch-3", 3, segments=BRANCH, flip=None)
    found, _ = compare(arms[0].parent / "*")
    assert names(found) == ["none", "branch"]
    assert found["arms"][1]["seeds"] == [0, 1, 2, 3]


def test_what_evaluates_makes_no_arm(make, arms, compare):
    more = dict(scored_weights=["ema", "raw"], generation_block=50, guidance={"class_path": "a.B"})
    folder = make("branch-2", 2, segments=BRANCH, **more)
    text = (folder / "config.yaml").read_text()
    text = text.replace("data:\n", "data:\n  num_generated: 7\n  generation_batch_size: 3\n")
    text = text.replace(
        "trainer:\n", "trainer:\n  callbacks: [{class_path: c.D}]\n  logger: true\n"
    )
    (folder / "config.yaml").write_text(text)
    found, _ = compare(*arms, folder)
    assert [arm["seeds"] for arm in found["arms"]] == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    "name, seed, stem",
    [
        ("w10", 0, "w10"),
        ("w-10", 10, "w"),
        ("w10", 10, "w10"),
        ("w_seed10", 10, "w"),
        ("wseed=1", 1, "w"),
        ("scale-0.1", 1, "scale-0.1"),
    ],
)
def test_stems(make, name: str, seed: int, stem: str):
    assert read(make(name, seed)).stem == stem


def test_commits_that_were_dirty_stay_so(arms, compare):
    edit(arms[2], with_protocol(git_commit="6b7eb92aaaaaaaaaaa-dirty"))
    found, _ = compare(*arms)
    assert found["differences"]["git_commit"] == {
        "none": "6b7eb92",
        "branch": "6b7eb92, 6b7eb92-dirty",
    }


# ---- one foreign run -------------------------------------------------------------------------


def foreign(folder: Path, change) -> Path:
    """The run under a name that comes first, changed."""
    edit(folder, change)
    return folder


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_entries(metric="outliers"), "metric=fd_digits: no score with"),
        (with_entries(metric="fid"), "metric=fd_digits: no score with"),
        (with_protocol(sampler="Heun"), "sampler=Heun: the others have Euler"),
        (with_protocol(reference={"dataset": "cats"}), "reference.dataset=cats: the others have"),
    ],
)
def test_one_foreign_plain_run_changes_nothing(make, arms, compare, change, reason: str):
    without, _ = compare(*arms)
    for seed in (0, 1):
        edit(make(f"aa-{seed}", seed, width=4), change)
    found, _ = compare(arms[0].parent / "*")
    assert found["arms"] == without["arms"]
    assert [reason in line for line in found["refused"]] == [True, True]


def later(scores: list) -> list:
    """The same one step later each."""
    return [with_protocol(step=s["step"] + 1)([s | {"step": s["step"] + 1}])[0] for s in scores]


@pytest.mark.parametrize(
    "change, reason",
    [
        (later, "steps=101, 201, 301: must include one of 100, 200, 300, which the others have"),
        (with_protocol(n=10), "n=10: the others have 1000"),
    ],
)
def test_of_two_baseline_runs_that_differ_most_runs_decide(make, arms, compare, change, reason):
    first = make("aa-0", 0)
    edit(first, change)
    found, _ = compare(first, *arms[1:])
    assert names(found) == ["none", "branch"]
    assert found["refused"] == [f"{first}: {reason}"]


def test_versions_places_and_missing_keys_are_notes(arms, compare):
    reference = {"dataset": "digits", "split": "train", "n": 1497}
    edit(arms[1], with_protocol(reference=reference | {"images": "1x8x8"}))
    for folder, versions in zip(arms[2:], ("torch 1", "torch 2"), strict=True):
        edit(folder, with_protocol(reference=reference | {"versions": versions}))
    text = (arms[0] / "config.yaml").read_text()
    (arms[0] / "config.yaml").write_text(text.replace("data/digits/", "/disk/digits/"))
    found, _ = compare(*arms)
    assert found["refused"] == []
    assert [arm["seeds"] for arm in found["arms"]] == [[0, 1], [0, 1]]
    for note in (
        "data.train_urls=/disk/digits/train.tar: the others have data/digits/train.tar",
        "; reference.images=not recorded: the others have 1x8x8",
        "reference.versions=torch 2: the others have torch 1",
    ):
        assert note in "\n".join(found["notes"])


# ---- files -----------------------------------------------------------------------------------


def test_bad_entries_elsewhere_are_a_note(arms, compare):
    without, _ = compare(*arms)
    edit(
        arms[2],
        lambda s: [
            *s,
            s[0] | {"metric": "kid", "value": float("nan")},
            s[0] | {"metric": "kid", "value": 10**400},
        ],
    )
    found, _ = compare(*arms)
    assert found["arms"] == without["arms"] and found["refused"] == []
    (note,) = found["notes"]
    assert note.endswith('scores.json[3]: value="NaN": must be a finite number (and 1 more)')
    edit(arms[2], lambda s: [*s[:3], s[0] | {"value": 10**400}])
    found, _ = compare(*arms)
    assert found["arms"][1]["seeds"] == [1]
    assert found["refused"][0].startswith(f"{arms[2]}: scores.json[3]: value=1000")


def test_a_broken_record_is_a_note(arms, compare):
    (arms[2] / "environment.json").write_text("[{]")
    found, _ = compare(*arms)
    assert found["refused"] == [] and found["arms"][1]["seeds"] == [0, 1]
    assert found["notes"][0].startswith(f"{arms[2]}: environment.json: cannot be read")


def test_odd_files_make_one_line_each(make, arms, compare, monkeypatch):
    date = make("date-0", 0, segments=BRANCH)
    (date / "config.yaml").write_text("model: {day: 2026-13-45}")
    closed = make("closed-0", 0, segments=BRANCH)
    read_text = Path.read_text

    def denied(self: Path, *args: object, **options: object) -> str:
        if self.parent == closed:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    long = "x" * 5000
    found, _ = compare(*arms, date, closed, long)
    assert len(found["refused"]) == 3 and not any("\n" in line for line in found["refused"])
    assert found["refused"][0].startswith(f"run={long}: must be")
    assert "month must be in 1..12" in found["refused"][1]
    assert "Permission denied" in found["refused"][2]


def test_what_json_cannot_say_is_shown_as_text(make, arms, compare):
    folder = make("branch-2", 2, segments=BRANCH)
    text = (
        (folder / "config.yaml")
        .read_text()
        .replace("model:\n", "model:\n  day: 2026-01-02\n  clip: .inf\n")
    )
    (folder / "config.yaml").write_text(text)
    found, _ = compare(*arms, folder)
    assert "2026-01-02" in found["differences"]["model.day"].values()
    assert "Infinity" in found["differences"]["model.clip"].values()


def test_a_folder_whose_name_is_not_utf_8(make, arms, compare):
    folder = arms[0].parent / os.fsdecode(b"odd\xff-5")
    shutil.move(make("odd-5", 5, segments=BRANCH, flip=True), folder)
    found, printed = compare(*arms, folder)
    assert "odd\udcff" in names(found)
    assert "odd\\udcff" in printed


def test_an_earlier_comparison_is_no_run(arms, compare):
    shutil.copytree(arms[0].parent, arms[0].parent.parent / "all")
    earlier = arms[0].parent / "comparison"
    earlier.mkdir()
    (earlier / "comparison.json").write_text("{}")
    found, _ = compare(arms[0].parent / "*")
    assert found["refused"] == []


# ---- what is shown ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, like, text",
    [
        (2.43, None, "2.430"),
        (0.012346, None, "0.01235"),
        (0.000123, 0.012346, "0.00012"),
        (1234.56, None, "1235"),
        (0.000012346, None, "1.235e-05"),
        (0.0, None, "0.000"),
    ],
)
def test_four_significant_digits(value: float, like: float | None, text: str):
    assert score(value, like) == text


def test_the_deviation_over_sampling_seeds_is_shown(arms, compare, tmp_path: Path):
    for folder in arms:
        add_range(folder, 0.5)
    _, printed = compare(*arms)
    expected = f"sampling ± {0.5 / 2**0.5:.3f}"
    for name in ("comparison.md", "comparison.html"):
        assert expected in (tmp_path / "out" / name).read_text()


def test_left_out_scores_are_one_note_per_run_and_reason(arms, compare):
    edit(arms[2], lambda s: s + with_protocol(n=9, seeds=[0, 8])(s))
    for first in (1000, 2000):
        edit(arms[3], lambda s, f=first: s + with_protocol(seeds=[f, f + 999])(s[:3]))
    found, _ = compare(*arms)
    assert found["notes"] == [
        f"{arms[2]}: scores at step 100, 200, 300 are left out; n=9: the others have 1000",
        f"{arms[3]}: scores at step 100, 200, 300 are left out; sampling seeds: the others have "
        "0-999",
    ]


def test_grids_are_those_of_the_scores(make, arms, compare, tmp_path: Path):
    """Of the selected weights and guidance; the plain file only where it is theirs."""
    for folder in arms:
        guided = {"guidance": "cfg(1.5, [0, 1])"}
        edit(folder, lambda s, g=guided: s + with_entries(**g)(with_protocol(**g)(s)))
    options = ("--guidance", guided["guidance"])
    named = arms[2] / "grids" / grid_name(300, "ema", guided["guidance"])
    assert named.name == "step-000300-ema-cfg-1.5-0-1.png"
    # Without a file of its own, the setting that was scored last wrote the plain one.
    compare(*arms, *options)
    assert (tmp_path / "out" / "comparison.html").read_text().count("<img") == 2
    found, _ = compare(*arms)
    assert (tmp_path / "out" / "comparison.html").read_text().count("<img") == 0
    note = "sample grids: none of step 300, weights ema, guidance none in none, branch"
    assert note in found["notes"]
    shutil.copy(arms[2] / "grids" / "step-000300.png", named)
    assert read(arms[2]).grid(300, "ema", "none") is not None
    assert read(arms[2]).grid(300, "ema", guided["guidance"]) is not None
    assert read(arms[2]).grid(300, "raw", "none") is None


def test_every_guidance_is_an_arm(arms, compare, tmp_path: Path):
    """Of runs with a score each; the unguided one of the baseline judges, times are of training."""
    head, cfg = "inbuilt(head 0.6 [0.2, 1))", "cfg(1.5, [0, 1])"
    for folder, factor in zip(arms, (1, 1, 2, 2), strict=True):
        last = json.loads((folder / "scores.json").read_text())[-1]
        for how, change in ((head, 0.5), (cfg, 0.8))[: 2 if "branch" in folder.name else 1]:
            guided = {"guidance": how}
            new = with_entries(value=last["value"] * change * factor, **guided)([last])
            new = with_protocol(training_seconds=99.0, **guided)(new)
            edit(folder, lambda s, new=new: s + new)
            named = folder / "grids" / grid_name(300, "ema", how)
            shutil.copy(folder / "grids" / "step-000300.png", named)
    found, _ = compare(*arms, "--settings")
    base = found["arms"][0]
    assert (base["name"], base["mean"]) == ("none: unguided", pytest.approx(2.01))
    means = {arm["name"]: (arm["mean"], arm["ratio_to_baseline"]) for arm in found["arms"]}
    for name, mean in {
        "none: head 0.6 [0.2, 1)": 1.005,
        "branch: unguided": 0.51,
        "branch: head 0.6 [0.2, 1)": 0.51,
        "branch: cfg(1.5, [0, 1])": 0.816,
    }.items():
        assert means[name] == (pytest.approx(mean), pytest.approx(mean / 2.01)), name
    assert len(means) == 5
    paces = {arm["name"]: arm["seconds_per_step"] for arm in found["arms"]}
    assert all(paces[name] == pytest.approx(0.1 + 0.1 * ("branch" in name)) for name in means)
    assert all(arm["seeds"] == [0, 1] for arm in found["arms"])
    page = (tmp_path / "out" / "comparison.html").read_text().replace("<wbr>", "")
    assert page.count("<img") == 5 and "branch: head 0.6 [0.2, 1)" in page
    # Of one run, its unguided scores are the baseline, whatever it was trained with.
    found, _ = compare(arms[2], "--settings")
    assert found["baseline"] == "branch: unguided" and len(found["arms"]) == 3
    found, _ = compare(arms[2], "--settings", "--baseline", "branch: cfg(1.5, [0, 1])")
    assert found["arms"][0]["mean"] == pytest.approx(0.8)
    for options, message in (
        ([arms[2]], "baseline=null: no arm has no segments; must be one of branch"),
        ([arms[2], "--settings", "--guidance", cfg], "guidance=cfg.* must be left out with --sett"),
        ([arms[2], "--settings", "--baseline", "x"], "baseline=x: must be one of branch: unguided"),
    ):
        with pytest.raises(SystemExit, match=message):
            compare(*options)
    # A run with one guidance keeps its name.
    edit(arms[0], lambda s: s[:3])
    edit(arms[1], lambda s: s[:3])
    found, _ = compare(*arms, "--settings")
    assert found["baseline"] == "none"


# ---- with a trainer --------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_of_the_trainer_can_be_compared(command, compare, tmp_path: Path):
    overlays = {"none": ["-c", str(ROOT / "configs/weak/none.yaml")], "w2s": []}
    for name, overlay in overlays.items():
        for seed in (0, 1):
            command("fit", *overlay, f"--seed_everything={seed}", folder=f"real/{name}-{seed}")
    found, _ = compare(tmp_path / "real" / "*")
    late = "takes no part at equal time"  # the first of two scores took longer than others' both
    assert (found["refused"], [n for n in found["notes"] if late not in n]) == ([], [])
    assert sorted(names(found)) == ["none", "w2s"] and found["baseline"] == "none"
    for arm in found["arms"]:
        entries = [json.loads((Path(run) / "scores.json").read_text()) for run in arm["runs"]]
        last = [
            next(e for e in reversed(some) if e["metric"] == found["metric"]) for some in entries
        ]
        assert arm["mean"] == pytest.approx(sum(e["value"] for e in last) / 2)
        assert (arm["step"], arm["seeds"]) == (6, [0, 1])
        assert arm["seconds_per_step"] > 0
        assert all((Path(run) / "grids" / grid_name(6)).is_file() for run in arm["runs"])
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.count("<img") == 2

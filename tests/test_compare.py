"""Comparing runs: which may be compared, and what comes out."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, quick
from run_folders import BRANCH, ENTRY
from test_scores import documented

from w2s_train.cli import main


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch: pytest.MonkeyPatch):
    """Charts take longer than all the rest, and no test here looks at them."""
    monkeypatch.setattr("w2s_train.compare.page.chart", lambda *_, **__: "")


def failure(*args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, args)])
    return str(caught.value.code)


def test_better_at_equal_steps_is_not_better_at_equal_time(arms, compare):
    found, printed = compare(arms[0].parent / "none-*", arms[0].parent / "branch-*")
    base, arm = found["arms"]
    assert (base["name"], arm["name"], found["baseline"]) == ("none", "branch", "none")
    assert base["seeds"] == arm["seeds"] == [0, 1]
    assert (arm["step"], arm["mean"]) == (300, pytest.approx(0.51))
    assert arm["std"] == pytest.approx(0.02 / math.sqrt(2))
    assert arm["ratio_to_baseline"] == pytest.approx(0.51 / 2.01)
    assert arm["verdict"] == "better"
    assert {key: arm[key] for key in arm["equal_steps"]} == arm["equal_steps"]
    # After 30 s the slow arm is halfway between 4.0 at 20 s and 1.0 at 40 s.
    timed = arm["equal_wall_clock"]
    assert (timed["seconds"], timed["mean"]) == (30.0, pytest.approx(2.0))
    # t sqrt(ln(2.02 / 2)^2 / 4) = 12.7 x 0.00498 = 0.0632: by chance down by 1 - e^-0.0632
    assert timed["verdict"] == "inconclusive: the gap is 0.5 %, the noise 6.1 %"
    assert arm["seconds_per_step"] == pytest.approx(0.2)
    assert arm["time_ratio"] == pytest.approx(2.0)
    assert [point["training_seconds"] for point in arm["curve"]] == pytest.approx([20, 40, 60])
    assert [point["mean"] for point in base["curve"]] == pytest.approx([8, 4, 2.01])
    assert "better" in printed and "left out" not in printed


def test_the_document_lists_the_keys_of_comparison_json(arms, compare):
    found, _ = compare(*arms)
    arm = found["arms"][1]
    assert documented("Comparison") == [*found, "tuned"]  # which is left out where nothing was
    assert sorted(documented("Arm")) == sorted(arm)
    assert documented("Point") == list(arm["curve"][0])
    assert ["step", *documented("Result")] == list(arm["equal_steps"])
    assert ["seconds", *documented("Result")] == list(arm["equal_wall_clock"])


def test_epochs_until_a_score_is_reached(make, compare, tmp_path: Path):
    """By hand: 3,200 samples are 50 steps of 64; from 8 at epoch 2 to 4 at 4, 5 is reached at
    2 + 2 ln(8 / 5) / ln 2.
    """
    size = {"training_samples": 3200}
    for seed, last in ((0, 2.0), (1, 2.1)):
        make(f"none-{seed}", seed, values=(8.0, 4.0, last), entry=size)
        make(f"branch-{seed}", seed, values=(4.0, 1.0, 1.0), segments=BRANCH, entry=size)
    runs = ["none-0", "none-1", "branch-0", "branch-1"]
    found, printed = compare(*(tmp_path / "runs" / run for run in runs), "--reach", "5,1.5,0.5")
    five, low, never = found["reached"]
    assert (five["score"], five["unit"]) == (5.0, "epochs")
    base, arm = five["arms"]
    assert base["needed"] == pytest.approx(dict.fromkeys("01", 2 + 2 * math.log2(8 / 5)))
    assert arm["needed"] == {"0": 2.0, "1": 2.0}  # its first score was as good already
    assert arm["ratio_to_baseline"] == pytest.approx(2 / base["needed"]["0"])
    assert (arm["verdict"], arm["at_first"], base["at_first"]) == ("better", [0, 1], [])
    assert "≤ 2.00" in printed
    base, arm = low["arms"]
    assert base["needed"] == {"0": None, "1": None} and base["last"] == 6
    assert arm["needed"]["0"] == pytest.approx(2 + 2 * math.log(4 / 1.5) / math.log(4))
    assert arm["ratio_to_baseline"] is arm["verdict"] is None
    assert "not by 6.00" in printed
    assert [each["needed"] for each in never["arms"]] == [{"0": None, "1": None}] * 2


def test_scores_that_rise_are_reached_from_below(make, compare, tmp_path: Path):
    """By default the worst end of the baseline; what is only a bound decides nothing by itself."""

    def rising(name: str, seed: int, *values: float, **options: object) -> None:
        path = make(f"{name}-{seed}", seed, values=values, **options) / "scores.json"
        path.write_text(path.read_text().replace('"fd_digits"', '"agreement_toy"'))

    rising("none", 0, 0.29, 0.5, 0.6)
    rising("none", 1, 0.1, 0.2, 0.3)
    rising("branch", 0, 0.3, 0.5, 0.5, segments=BRANCH)
    rising("branch", 1, 0.01, 0.2, 0.31, segments=BRANCH)
    which = (tmp_path / "runs" / "*", "--metric", "agreement_toy")
    found, _ = compare(*which)
    (only,) = found["reached"]
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert only["score"] == 0.3 and "until agreement_toy rises to 0.3" in report
    base, arm = only["arms"]
    first = 64 * (100 + 100 * math.log(0.3 / 0.29) / math.log(0.5 / 0.29))
    assert base["needed"] == {"0": pytest.approx(first), "1": 64 * 300}
    second = 64 * (200 + 100 * math.log(0.3 / 0.2) / math.log(0.31 / 0.2))
    assert arm["needed"] == {"0": 6400.0, "1": pytest.approx(second)} and arm["at_first"] == [0]
    assert arm["ratio_to_baseline"] < 1 and arm["verdict"] is None

    found, _ = compare(*which, "--reach", "0.05,0.05")
    (early,) = found["reached"]
    base, arm = early["arms"]
    assert (base["at_first"], arm["at_first"]) == ([0, 1], [0])
    assert arm["ratio_to_baseline"] is arm["verdict"] is None


def test_what_the_baseline_ends_with_is_reached_by_all_its_runs(make, compare, tmp_path: Path):
    """The worst of its last scores; in images where a run does not say what an epoch is."""
    for seed, last in ((0, 2.0), (1, 2.1)):
        make(f"none-{seed}", seed, values=(8.0, 4.0, last))
        make(f"branch-{seed}", seed, values=(6.0, last, 1.0), segments=BRANCH)
    found, _ = compare(tmp_path / "runs" / "*")
    (only,) = found["reached"]
    assert (only["score"], only["unit"]) == (2.1, "images")
    base, arm = only["arms"]
    assert base["needed"]["1"] == 64 * 300 and 64 * 200 < base["needed"]["0"] < 64 * 300
    assert arm["needed"]["1"] == 64 * 200
    for run in (tmp_path / "runs").iterdir():  # scored on other seeds at its end
        entries = json.loads((run / "scores.json").read_text())
        again = copy.deepcopy(entries[-1]) | {"value": 1.5 * entries[-1]["value"]}
        again["protocol"]["seeds"] = [3_000_000, 3_000_999]
        (run / "scores.json").write_text(json.dumps([*entries, again]))
    assert compare(tmp_path / "runs" / "*")[0]["reached"] == [only]
    early, _ = compare(tmp_path / "runs" / "*", "--reach", "9")
    assert "reached" not in early
    assert any("reach=9: the first scores of all runs" in note for note in early["notes"])
    assert "reach=9: must be left out with --settings" in failure(
        tmp_path / "runs" / "*", "--settings", "--reach", "9"
    )
    assert "reach=2,x: must be one score" in failure(tmp_path / "runs" / "*", "--reach", "2,x")
    assert "reach=nan: must be one score" in failure(tmp_path / "runs" / "*", "--reach", "nan")


def test_with_and_without_guidance_beside_each_other(make, compare, tmp_path: Path):
    """The tuning of each run that is best on tuning seeds; by another metric it does not count."""

    def tuned(
        run: str, name: str, fresh: list[float], seen=1.0, size=500, metric="fd_digits", **other
    ) -> None:
        folder = tmp_path / "runs" / run / "tune" / name
        folder.mkdir(parents=True)
        scores = {"metric": metric, "winner": fresh, "unguided": [2.0], "verdict": "better"}
        about = {"schema": 1, "guidance": f"{name}(2)", "images": {"used": 9}}
        known = ("weights", "sampler", "steps", "autoencoder", "precision")
        made = {"step": 300} | {key: ENTRY["protocol"].get(key) for key in known} | other
        about["candidates"] = [{"mean": seen}, {"mean": 2.0}]
        about["about"] = {"protocol": made, "num_generated": 1000, "set_images": size}
        about["about"]["features"] = made.pop("features", ENTRY["protocol"]["extractor"])
        (folder / "result.json").write_text(json.dumps(about | {"fresh": scores}))

    for seed in (0, 1):
        make(f"none-{seed}", seed)
        make(f"branch-{seed}", seed, segments=BRANCH)
    plain, _ = compare(tmp_path / "runs" / "*")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "guided" not in text.partition("## At step 300")[2].splitlines()[2]
    tuned("none-0", "cfg", [1.0, 1.2])
    tuned("none-0", "slow", [0.4, 0.6], seen=1.1)
    tuned("none-0", "large", [0.8, 1.0], seen=0.9, size=250)
    tuned("none-1", "cfg", [1.3, 1.3])
    tuned("none-1", "other", [0.1], metric="kid")
    tuned("none-1", "early", [0.2], step=200)
    tuned("none-1", "live", [0.2], weights="raw")
    tuned("none-1", "judge", [0.2], features="another judge")
    tuned("none-1", "half", [0.2], precision="16-true")
    tuned("none-1", "endless", [math.inf])
    tuned("none-1", "unknown", [0.2], seen=math.nan)
    tuned("branch-0", "cfg", [1.5])
    found, _ = compare(tmp_path / "runs" / "*")
    text = (tmp_path / "out" / "comparison.md").read_text()
    head, _, *lines = text.partition("## At step 300")[2].splitlines()[2:6]
    assert head.endswith("| guided |")
    assert [line.split("|")[-2].strip() for line in lines] == [
        "1.200 ± 0.141",
        "1.500, 1 of 2 runs",
    ]
    assert any("tuning early is of step 200, left out" in note for note in found["notes"])
    assert any("tuning live is of weights raw, left out" in note for note in found["notes"])
    assert any("tuning judge is of extractor another judge, left" in n for n in found["notes"])
    assert any("tuning half is of precision 16-true, left out" in note for note in found["notes"])
    for name in ("endless", "unknown"):
        assert any(f"{name}/result.json: cannot be read" in note for note in found["notes"])
    assert any("tuned equally hard; not tuned: branch in part" in note for note in found["notes"])
    none, branch = (arm.pop("guided") for arm in found["arms"])
    assert none == {"scores": [pytest.approx(1.1), pytest.approx(1.3)], "runs": 2}
    assert branch == {"scores": [1.5], "runs": 2}
    assert [arm.pop("guided") for arm in plain["arms"]] == [None, None]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "Guided at sampling" in page and "1.200 ± 0.141" in page
    assert found["arms"] == plain["arms"]


def test_what_differs_is_listed(make, arms, compare):
    make("branch-2", 2, segments=BRANCH, ema_decay=0.999)
    make("branch-3", 3, segments=BRANCH, ema_decay=0.9)
    found, _ = compare(arms[0].parent / "*")
    names = [arm["name"] for arm in found["arms"]]
    assert sorted(names) == [
        "branch (ema_decay=0.9)",
        "branch (ema_decay=0.999)",
        "branch (ema_decay=null)",
        "none",
    ]
    assert found["differences"]["model.objective.segments.0.scale"] == dict.fromkeys(
        [name for name in names if name != "none"], 0.3
    )
    assert found["differences"]["model.objective.segments.0.low"]["branch (ema_decay=0.9)"] == 0.0
    assert found["differences"]["model.ema_decay"] == {
        "branch (ema_decay=0.9)": 0.9,
        "branch (ema_decay=0.999)": 0.999,
    }
    assert not any("seed" in key or "root_dir" in key for key in found["differences"])


def test_sampling_seeds_belong_to_their_run(make, arms, compare):
    """Another range of seeds at a step is one more score of the same training seed."""
    for folder, value in zip(arms, (2.4, 2.42, 0.7, 0.72), strict=True):
        scores = json.loads((folder / "scores.json").read_text())
        scores.append(copy.deepcopy(scores[-1]) | {"value": value})
        scores[-1]["protocol"]["seeds"] = [1000, 1999]
        (folder / "scores.json").write_text(json.dumps(scores))
    found, _ = compare(*arms)
    base = found["arms"][0]
    assert (base["seeds"], base["mean"]) == ([0, 1], pytest.approx((2.2 + 2.22) / 2))
    assert base["sampling_std"] == pytest.approx(0.4 / math.sqrt(2))
    assert found["protocol"]["seeds"] == [[0, 999], [1000, 1999]]
    make("few-5", 5, segments=BRANCH)
    found, printed = compare(*arms, arms[0].parent / "few-5")
    assert "few-5: sampling seeds: must include 1000-1999, as the others do" in printed


def test_a_single_odd_score_is_left_out_and_its_run_stays(arms, compare):
    scores = json.loads((arms[2] / "scores.json").read_text())
    scores.append(copy.deepcopy(scores[-1]) | {"value": 0.01})
    scores[-1]["protocol"] |= {"n": 50000, "seeds": [0, 49999]}
    (arms[2] / "scores.json").write_text(json.dumps(scores))
    found, printed = compare(*arms)
    assert found["arms"][1]["mean"] == pytest.approx(0.51)
    assert f"note: {arms[2]}: scores at step 300 are left out; n=50000: the others have 1000" in (
        printed
    )


def test_runs_without_times_take_no_part_at_equal_time(make, arms, compare):
    folder = make("untimed-0", 0, segments=BRANCH, entry={"evaluation_seconds": None}, flip=True)
    scores = json.loads((folder / "scores.json").read_text())
    for score in scores:
        score["protocol"]["training_seconds"] = None
    (folder / "scores.json").write_text(json.dumps(scores))
    found, printed = compare(*arms, folder)
    arm = next(arm for arm in found["arms"] if arm["name"] == "untimed")
    assert (arm["mean"], arm["equal_wall_clock"], arm["seconds_per_step"]) == (2.0, None, None)
    assert f"note: {folder}: has no times and takes no part at equal time" in printed


def test_options(make, arms, compare):
    for folder in arms:
        scores = json.loads((folder / "scores.json").read_text())
        more = copy.deepcopy(scores)
        for score in more:
            score["metric"], score["value"] = "recall", score["value"] / 10
        (folder / "scores.json").write_text(json.dumps(scores + more))
    found, _ = compare(*arms, "--metric", "recall", "--baseline", "branch")
    assert found["metric"] == "recall"
    assert [arm["name"] for arm in found["arms"]] == ["branch", "none"]
    assert found["arms"][1]["verdict"] == "better"  # four times the recall
    single = [arms[0], arms[2]]
    assert compare(*single)[0]["arms"][1]["verdict"] == "inconclusive: one seed, the gap is 75 %"


# ---- bad input -------------------------------------------------------------------------------


def with_scores(change):
    """Rewrite the entries of a run."""

    def apply(folder: Path) -> None:
        scores = json.loads((folder / "scores.json").read_text())
        (folder / "scores.json").write_text(json.dumps(change(scores)))

    return apply


def with_protocol(**values: object):
    return with_scores(lambda scores: [s | {"protocol": s["protocol"] | values} for s in scores])


def with_text(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def with_reference(**values: object):
    return with_protocol(reference=ENTRY["protocol"]["reference"] | values)


BAD = {
    "no scores": (lambda f: (f / "scores.json").unlink(), "scores.json: there is none"),
    "broken scores": (with_text("scores.json", '[{"metric'), "scores.json: cannot be read"),
    "empty scores": (with_text("scores.json", "[]"), "scores.json: must be a list with at least"),
    "nan": (
        with_scores(lambda s: [s[0] | {"value": math.nan}]),
        'scores.json[0]: value="NaN": must',
    ),
    "newer": (
        with_scores(lambda s: [s[0] | {"schema": 2}]),
        "scores.json[0]: schema=2: must be 1",
    ),
    "no config": (lambda f: (f / "config.yaml").unlink(), "config.yaml: there is none"),
    "broken config": (with_text("config.yaml", "model: [}"), "config.yaml: cannot be read"),
    "no model": (with_text("config.yaml", "a: 1"), "config.yaml: must be a config with a model"),
    "unfinished": (with_scores(lambda s: s[:2]), "step=200: unfinished, must be scored up to"),
    "no fingerprint": (with_protocol(reference=None), "scores.json[0]: reference=null: must be a"),
    "other data": (
        with_reference(dataset="cats"),
        "reference.dataset=cats: the others have digits",
    ),
    "other split": (with_reference(split="test"), "reference.split=test: the others have train"),
    "sampler": (with_protocol(sampler="Heun"), "sampler=Heun: the others have Euler"),
    "steps": (with_protocol(steps=50), "steps=50: the others have 25"),
    "n": (with_protocol(n=100), "n=100: the others have 1000"),
    "labels": (
        with_protocol(labels="as in training, counts sha256:0"),
        "labels=as in training, counts sha256:0: the others have None",
    ),
    "precision": (with_protocol(precision="bf16-mixed"), "precision=bf16-mixed: the others have"),
    "extractor": (with_protocol(extractor="VGG"), "extractor=VGG: the others have classifier"),
    "seeds": (with_protocol(seeds=[5, 1004]), "sampling seeds: must include 0-999, as the others"),
    "other metric": (
        with_scores(lambda s: [x | {"metric": "kid"} for x in s]),
        "metric=fd_digits: no score with weights=ema, guidance=none; it has kid (ema, none)",
    ),
    "other steps": (
        with_scores(
            lambda s: [
                x | {"step": x["step"] + 1, "protocol": x["protocol"] | {"step": x["step"] + 1}}
                for x in s
            ]
        ),
        "steps=101, 201, 301: must include one of 100, 200, 300, which the others have",
    ),
}


@pytest.mark.parametrize("name", quick(BAD, *list(BAD)[::3]))
def test_a_bad_run_is_named_and_the_rest_stands(make, arms, compare, name: str):
    without, _ = compare(*arms)
    spoil, message = BAD[name]
    bad = make("branch-7", 7, (1.0, 0.1, 0.01), pace=0.01, segments=BRANCH)
    spoil(bad)
    found, printed = compare(*arms, bad)
    assert found["arms"] == without["arms"]
    (line,) = found["refused"]
    assert line.startswith(f"{bad}: {message}")
    assert "\n" not in line and f"left out: {line}\n" in printed


def test_other_training_data_is_refused(make, arms, compare):
    bad = make("branch-7", 7, segments=BRANCH)
    text = (bad / "config.yaml").read_text()
    (bad / "config.yaml").write_text(text.replace("data/digits/", "data/cats/"))
    found, _ = compare(*arms, bad)
    assert found["refused"] == [f"{bad}: data.dataset=cats: the others have digits"]


def test_paths_that_are_no_runs_are_named(arms, compare, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    found, _ = compare(*arms, tmp_path / "empty", tmp_path / "nothing-*", arms[0])
    assert found["refused"] == [
        f"run={tmp_path}/nothing-*: must be a run folder, or a glob of some",
        f"{tmp_path}/empty: the folder is empty",
    ]


def test_runs_that_a_later_try_moved_aside_must_be_named(make, arms, compare):
    """And no others whose names end in a dot and a number."""
    moved = make("none-5", 5).rename(arms[0].with_name("none-5.1"))
    make("none-5", 5)
    make("none-0.1", 7)
    found, _ = compare(arms[0].parent / "*")
    line = "moved aside by a later try; taken if named, without a glob"
    assert found["refused"] == [f"{moved}: {line}"]
    assert found["arms"][0]["seeds"] == [0, 1, 5, 7]
    found, _ = compare(arms[0].parent / "none-?", moved, arms[2])
    assert [line.partition(": ")[2][:17] for line in found["refused"]] == ["seed_everything=5"]


def test_a_repeated_seed_is_no_evidence(make, arms, compare):
    again = make("none-again-0", 0, (1.0, 1.0, 1.0))
    found, _ = compare(*arms, again)
    assert found["arms"][0]["mean"] == pytest.approx(2.01)
    assert found["refused"] == [
        f"{again}: seed_everything=0: must differ from that of {arms[0]}, which has the same config"
    ]


def test_unfinished_runs_can_be_asked_for(arms, compare):
    with_scores(lambda s: s[:2])(arms[3])
    found, _ = compare(*arms, "--unfinished")
    assert (found["arms"][1]["seeds"], found["arms"][1]["step"]) == ([0, 1], 200)
    assert found["refused"] == []


def test_broken_grids_are_named(arms, compare):
    for folder in arms[2:]:
        path = folder / "grids" / "step-000300.png"
        path.write_bytes(path.read_bytes()[:-20])
    found, _ = compare(*arms)
    assert found["notes"] == [
        f"{folder / 'grids/step-000300.png'}: must be a PNG image; it is broken and not shown"
        for folder in arms[2:]
    ]


def test_mistakes_end_with_one_line(make, arms, capsys):
    assert failure() == "error: run=null: must be at least one run folder, or a glob of some"
    assert failure(*arms, "--sort").startswith("error: option=--sort: must be one of --metric, ")
    assert failure(*arms, "--metric") == "error: --metric: expected one argument"
    assert failure(*arms, "--metric", "fid") == "error: metric=fid: must be one of fd_digits"
    assert failure(*arms, "--weights", "raw") == "error: weights=raw: must be one of ema"
    assert failure(*arms, "--baseline", "x") == "error: baseline=x: must be one of none, branch"
    only = failure(*arms[2:])
    assert only == "error: baseline=null: no arm has no segments; must be one of branch"
    make("plain-0", 0, width=3)
    assert failure(*arms, arms[0].parent / "plain-0") == (
        "error: baseline=null: several arms have no segments; must be one of none, branch, plain"
    )
    assert failure(*arms[:2]) == "error: runs=none: must be at least two arms that can be compared"
    assert failure(*arms, "--output", arms[0] / "config.yaml").startswith(
        f"error: output={arms[0] / 'config.yaml'}: must be a folder to write to; "
    )


def test_nothing_can_be_read(make, capsys):
    broken = make("none-0")
    (broken / "scores.json").write_text("[]")
    assert failure(broken) == "error: runs=null: must be at least two arms; no run can be read"
    assert capsys.readouterr().err == (
        f"left out: {broken}: scores.json: must be a list with at least one score\n"
    )


def test_a_metric_without_a_direction_is_refused(make, capsys):
    for name, segments in (("none-0", None), ("branch-0", BRANCH)):
        with_scores(lambda s: [x | {"metric": "loveliness"} for x in s])(
            make(name, segments=segments)
        )
    runs = make("x-0").parent
    assert failure(runs / "none-0", runs / "branch-0").startswith(
        "error: metric=loveliness: must begin with one of inception_score, "
    )


def test_lines_about_runs_come_before_the_error(arms, capsys):
    with_protocol(sampler="Heun")(arms[2])
    with_protocol(sampler="Heun")(arms[3])
    assert failure(*arms) == "error: runs=none: must be at least two arms that can be compared"
    assert capsys.readouterr().err.splitlines() == [
        f"left out: {folder}: sampler=Heun: the others have Euler" for folder in arms[2:]
    ]


@pytest.mark.slow
def test_torch_is_not_loaded(arms, tmp_path: Path):
    code = (
        "import sys; from w2s_train.cli import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'lightning', 'matplotlib') if m in sys.modules])"
    )
    args = ["compare", *map(str, arms), "--output", str(tmp_path / "out")]
    for more, loaded in (["--help"], "[]"), ([], "['matplotlib']"):  # which charts need
        command = [sys.executable, "-c", code, *args, *more]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout.splitlines()[-1] == loaded

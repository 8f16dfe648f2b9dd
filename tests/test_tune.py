"""`lightning tune`: the search, its bookkeeping, its seeds, and what it leaves behind."""

import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT
from PIL import Image

from w2s_train.cli import main
from w2s_train.errors import INTERRUPTED, PREEMPTED, UserError
from w2s_train.evaluation.fid import FID
from w2s_train.guidance import Unguided
from w2s_train.inbuilt.laws import UniformScale
from w2s_train.scores import read_scores
from w2s_train.signals import REQUESTS
from w2s_train.tune import tuning
from w2s_train.tune.evaluator import Scored, build
from w2s_train.tune.ledger import Ledger
from w2s_train.tune.outcome import Fresh
from w2s_train.tune.search import FINALISTS, Proposals, Trial, plan, search
from w2s_train.tune.space import DEFAULTS, Parameter, Space

CFG = Space.of("cfg", [])


def allowed(values: dict) -> None:
    return None


def found(space: Space, function: Any, evaluations: int, seed: int, refusal=allowed) -> list[Trial]:
    """What a search finds on three sets, with calls counted and each made once."""
    calls = list[tuple[str, int]]()

    def score(values: dict, k: int) -> float:
        calls.append((json.dumps(values), k))
        return function(**values) * (1 + 0.01 * math.sin(1000 * values["scale"] + k))

    number, finalists = plan(evaluations, 3)
    trials = search(Proposals(space, refusal, seed), number, 3, score)
    assert len(calls) == len(set(calls)) == number + 2 * finalists <= evaluations
    assert sum(len(each.scores) for each in trials) == len(calls)
    return trials


def u_shape(scale: float, low: float = 0.2, high: float = 0.8) -> float:
    strength = (scale - 1) * (high - low)
    return 0.3 + 3 * (strength - 0.5) ** 2 + 2 * (low - 0.2) ** 2 + (high - 0.8) ** 2


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_is_found(seed: int):
    """Of a curve and of three arguments, whose best value is 0.3; the middle has 0.68 and more."""
    [best, *_] = found(Space.of("cfg", ["scale=1:4"]), u_shape, 24, seed)
    assert u_shape(**best.values) < 0.33 and len(best.scores) == 3
    [best, *others] = found(CFG, u_shape, 60, seed)
    assert u_shape(**best.values) < 0.36
    assert all(best.mean <= other.mean for other in others if len(other.scores) == 3)


def test_as_many_candidates_as_the_budget_allows():
    """One more would be too many, and there is always a finalist."""
    for sets in (3, 5):
        for evaluations in range(sets, 200):
            number, finalists = plan(evaluations, sets)
            more = number + 1 + max(1, (number + 1) // FINALISTS) * (sets - 1)
            assert number + finalists * (sets - 1) <= evaluations < more
            assert finalists == max(1, number // FINALISTS)


@pytest.mark.slow
def test_refused_candidates_cost_nothing():
    def refusal(values: dict) -> str | None:
        return "too strong" if values["scale"] > 1.5 else None

    trials = found(CFG, u_shape, 30, 0, refusal)
    assert len(trials) == plan(30, 3)[0] and max(t.values["scale"] for t in trials) <= 1.5
    with pytest.raises(UserError, match="must leave a candidate that is allowed; never"):
        found(CFG, u_shape, 30, 0, lambda values: "never")


def test_candidates_depend_on_seed_and_scores_alone():
    """The same scores: the same candidates; one other score: others, from the next modelled one."""

    def proposed(seed: int, first: float) -> list[dict]:
        proposals, values = Proposals(CFG, allowed, seed), list[dict]()
        for k in range(12):
            values.append(proposals.next() or {})
            proposals.tell(u_shape(**values[-1]) if k else first)
        return values

    same = proposed(0, 0.1)
    assert proposed(0, 0.1) == same and proposed(1, 0.1)[0] != same[0]
    other = proposed(0, 99.0)
    assert other[:6] == same[:6] and other[6:] != same[6:]


def test_a_few_values_are_tried_once_each():
    space = Space.of("cfg", ["scale=1,1.5,2", "low=0,0.2"])
    trials = search(Proposals(space, allowed), 50, 3, lambda values, k: u_shape(**values))
    assert len(trials) == len({repr(each.values) for each in trials}) == 6
    assert trials[0].values == {"scale": 2, "low": 0.2}


@pytest.mark.parametrize(
    "text", ["scale", "scale=", "=1:2", "scale=2:1", "scale=1:1", "scale=1:2:3", "scale=[", "a=x:y"]
)
def test_bad_parameters(text: str):
    with pytest.raises(UserError, match="must be NAME=LOW:HIGH with LOW < HIGH"):
        Parameter.parse(text)


def test_names_lead_to_arguments():
    """Into a guidance within a guidance, and as a config spells it."""
    space = Space.of("segmented", ["border=0.2:0.8", "low_noise.scale=1:3", "high_noise.low=0.1"])
    made = space.settings(space.values([0.5, 0.25, 0.0]))["init_args"]
    assert (made["border"], made["low_noise"]["init_args"]["scale"]) == (0.5, 1.5)
    assert made["high_noise"]["init_args"] == {"scale": 1.5, "low": 0.1}
    assert made["low_noise"]["init_args"]["weak"]["class_path"].endswith("LayerSkip")


class OfSources(Unguided):
    """Takes a table, as `Inbuilt` does."""

    def __init__(self, scales: dict[str, dict[str, float]]) -> None:
        self.scales = scales


def test_names_of_sources_are_keys_of_a_table(monkeypatch: pytest.MonkeyPatch):
    """Dots included; the default is what was trained."""
    monkeypatch.setattr("w2s_train.guidance.Inbuilt", OfSources, raising=False)
    drawn = SimpleNamespace(name="t_0.2-1", low=0.2, high=1.0, drawn=SimpleNamespace(high=0.75))
    fixed = SimpleNamespace(name="fixed", low=0.0, high=0.2, drawn=None)
    space = Space.of("inbuilt", [], SimpleNamespace(segments=[fixed, drawn]))
    made = space.settings(space.values([0.0, 0.0, 1.0]))["init_args"]
    assert made == {"scales": {"t_0.2-1": {"scale": 0.0, "low": 0.2, "high": 1.0}}}
    assert space.parameters[0].high == 0.75


@pytest.mark.parametrize(
    "guidance, search, message",
    [
        ("cgf", [], "guidance=cgf: must be one of .*cfg.*, a YAML file, or a class path"),
        ("none.yaml", [], "guidance=none.yaml: must be a YAML file with one model.guidance"),
        ("os.path", [], "guidance=os.path: may not be imported; --allow_imports=os"),
        ("w2s_train.guidance.evaluate", [], "must be a class of guidance"),
        ("cfg", ["scael=1:2"], "search=scael: scael must be one of scale, low, high"),
        ("cfg", ["scale=1:2", "scale=1:3"], "search=scale: must stand once"),
        ("cfg", ["scale.of=1:2"], "search=scale.of: scale must be a class or a dictionary"),
        ("learned", [], "search=null: must be given for Learned, .* its arguments: path"),
    ],
)
def test_bad_spaces(guidance: str, search: list[str], message: str):
    with pytest.raises(UserError, match=message):
        Space.of(guidance, search)


def test_a_range_needs_a_scale():
    """Without one the source does not act, wherever it may."""
    drawn = SimpleNamespace(name="head", low=0.2, high=1.0, drawn=UniformScale(high=0.75))
    objective = SimpleNamespace(segments=[drawn])
    with pytest.raises(UserError, match="^search=head.low=0.2:0.5: must come with one of head.sc"):
        Space.of("inbuilt", ["head.low=0.2:0.5"], objective)
    for texts in (["head.low=0.2:0.5", "head.scale=0.3"], ["head.scale=0:0.5"]):
        Space.of("inbuilt", texts, objective)


@pytest.mark.parametrize(
    "scales, reason",
    [
        ({"scale": 1.92}, r"scale=1.92: must be in \[0, 1\)"),
        ({"scale": 0.3, "low": 1.1}, "low=1.1, high=1.0: must be 0 <= low <= high <= 1"),
        ({"scale": "abc"}, "Parser key \"scale\": Expected a <class 'float'>. Got value: abc"),
        ({"low": 0.3}, "the following arguments are required: scale"),
    ],
)
def test_a_refused_candidate_says_why(scales: dict, reason: str):
    """Whatever refuses it, a class or the parser, so that a search goes on to the next one."""
    spec = {"class_path": "w2s_train.guidance.Inbuilt", "init_args": {"scales": {"head": scales}}}
    with pytest.raises(UserError, match=f"Inbuilt: must take its arguments; {reason}$"):
        build(spec, None)


def test_defaults_fit_their_classes():
    for name in ("cfg", "autoguidance", "adg", "tv_cfg", "segmented"):
        space = Space.of(name, [])
        assert len(space.parameters) == len(DEFAULTS[space.guidance["class_path"].split(".")[-1]])


def test_the_interval_of_paired_scores():
    """t(2) = 4.3027, of the differences -1, -2 and -3."""
    fresh = Fresh("fd", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    low, mean, high = fresh.interval
    assert mean == -2 and high - mean == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert low == pytest.approx(-4.4841, rel=1e-4) and fresh.verdict == "inconclusive"
    assert Fresh("fd", [1.0, 1.1, 1.2], [2.0, 2.1, 2.2001]).verdict == "better"


# ---- the course, without images --------------------------------------------------------------


class Course:
    """A tuning whose scores are those of a function; notes the seeds of every one."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.seeds, self.left = folder, list[range](), math.inf
        monkeypatch.setattr(tuning, "protocol_of", lambda module: {"step": 6})
        monkeypatch.setattr(tuning, "Evaluator", lambda *_: self)
        monkeypatch.setattr(
            tuning, "weights_digest", lambda _: SimpleNamespace(hexdigest=lambda: "0" * 64)
        )

    def score(self, guidance: Any, seeds: range) -> Scored:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        self.seeds.append(seeds)
        noise = 0.01 * math.sin(seeds[0])
        values = (
            {key: getattr(guidance, key) for key in ("scale", "low", "high")}
            if hasattr(guidance, "scale")
            else {"scale": 1.0}
        )
        return Scored("fd", u_shape(**values) + noise, 2.0)

    def __call__(self, name: str = "cfg", **budget: Any) -> dict:
        trainer = SimpleNamespace(
            default_root_dir=str(self.folder),
            is_global_zero=True,
            world_size=1,
            ckpt_path="last.ckpt",
            strategy=SimpleNamespace(barrier=lambda name: None),
        )
        extractor = SimpleNamespace(num_features=8, describe=lambda: "none")
        fid = SimpleNamespace(extractor=extractor, reference_path="r.npz")
        data = SimpleNamespace(
            num_generated=50, sampling_seeds=2, first_seed=0, labels_as_in_training=False
        )
        module = SimpleNamespace(
            settings=[SimpleNamespace(network=None)],
            network=None,
            objective=None,
            unconditional=False,
        )
        space = budget.pop("space", CFG)
        budget = tuning.Budget(**budget)
        tuning.Tuning(name, space, budget, fid, data, lambda last: None)(trainer, module)
        return json.loads((self.folder / "tune" / name / "result.json").read_text())


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    return Course(tmp_path, monkeypatch)


def test_seeds_and_images(course: Course, capsys):
    """Every image of the search is counted; scoring seeds are never read, fresh ones at the end."""
    result = course(images=1010, set_images=20)
    tuned = [each for each in course.seeds if each[0] < tuning.FRESH]
    fresh = course.seeds[len(tuned) :]
    assert all(each[0] >= tuning.TUNING and len(each) == 20 for each in tuned)
    assert [(each[0] - tuning.FRESH, len(each)) for each in fresh] == [
        (0, 50),
        (50, 50),
        (100, 50),
    ] * 2
    assert len(set(tuned)) == 3 and all(
        a[-1] < b[0] for a, b in pairwise(sorted(set(tuned), key=min))
    )
    images = result["images"]
    assert images == {"budget": 1010, "used": sum(map(len, tuned)), "fresh": 300}
    assert images["used"] == 20 * sum(len(each["scores"]) for each in result["candidates"]) <= 1010
    best = result["candidates"][0]
    assert u_shape(**best["values"]) < 0.4 and len(best["scores"]) == 3
    assert result["fresh"]["winner"][0] == pytest.approx(
        u_shape(**best["values"]) + 0.01 * math.sin(tuning.FRESH)
    )
    overlay = yaml.safe_load((course.folder / "tune/cfg/winner.yaml").read_text())
    assert overlay["model"]["guidance"]["init_args"] == best["values"]
    with Image.open(course.folder / "tune/cfg/figure.png") as figure:
        assert figure.width > 400
    printed = capsys.readouterr().out
    count = len(result["candidates"])
    assert f"{count} candidates on {images['used']:,} of 1,010 images of tuning seeds" in printed


@pytest.mark.slow
def test_a_killed_tuning_goes_on(course: Course):
    """To the same result, and generates nothing twice."""
    whole = course(images=600, set_images=20)
    seeds, course.seeds = course.seeds, []
    for left in (1, 5, 12, 3, math.inf):
        course.left = left
        try:
            again = course("again", images=600, set_images=20)
        except KeyboardInterrupt:
            continue
    assert course.seeds == seeds and again | {"name": "cfg"} == whole
    count = len(course.seeds)
    assert course("again", images=600, set_images=20) == again and len(course.seeds) == count


@pytest.mark.slow
def test_minutes_become_images(course: Course):
    """The first candidate took 2 s for 20 images: a minute has 600; also where it goes on."""
    course.left = 4
    with pytest.raises(KeyboardInterrupt):
        course(minutes=1.0, set_images=20)
    course.left = math.inf
    images = course(minutes=1.0, set_images=20)["images"]
    assert images["budget"] == 600 and 500 < images["used"] <= 600


@pytest.mark.slow
def test_another_search_has_another_name(course: Course):
    course(images=600, set_images=20)
    for change in (dict(images=800, set_images=20), dict(images=600, set_images=25)):
        key = "images" if change["set_images"] == 20 else "set_images"
        with pytest.raises(UserError, match=f"^{key}=.*: must be .*another --name"):
            course(**change)
    space = Space.of("cfg", ["scale=1:2"])
    with pytest.raises(UserError, match=r'search=\["scale=1:2"\]: must be \["scale=1:4", "low'):
        course(images=600, set_images=20, space=space)
    assert course("other", images=600, set_images=20, space=space)["name"] == "other"


def test_without_optuna(course: Course, monkeypatch: pytest.MonkeyPatch):
    """One line, before any work; with another version, another search."""
    with monkeypatch.context() as patch, pytest.raises(UserError) as missing:
        patch.setitem(sys.modules, "optuna", None)
        course(images=60, set_images=20)
    assert re.fullmatch("tune: needs optuna, .*; pip install optuna", str(missing.value))
    assert not list(course.folder.iterdir())
    course(images=60, set_images=20)
    monkeypatch.setattr("optuna.__version__", "4.0.0")
    with pytest.raises(UserError, match="^optuna=4.0.0: must be .*another --name"):
        course(images=60, set_images=20)


def test_bad_budgets(course: Course):
    cases = {
        "images=59: must be enough for one candidate on 3 sets of 20, 60 images": dict(images=59),
        "minutes=0.05: must be enough .* 60 images; here it is 30": dict(minutes=0.05),
        "minutes=1.0: must come without images=60": dict(images=60, minutes=1.0),
        "images=0: must be in": dict(images=0),
        "minutes=-1: must be": dict(minutes=-1),
        "sets=2: must be": dict(images=60, sets=2),
    }
    for message, budget in cases.items():
        with pytest.raises(UserError, match=f"^{message}"):
            course(**{"set_images": 20} | budget)
    with pytest.raises(UserError, match="name=a/b: must be the name of a folder"):
        course("a/b", images=60)


@pytest.mark.parametrize("images, features, size", [(40_000, 64, 1000), (40_000, 2048, 2049)])
def test_the_size_of_a_set(images: int, features: int, size: int):
    """A fortieth, more than there are features, and no more than the run scores."""
    assert tuning.Budget(images).size_of_a_set(features, 50_000) == size
    assert tuning.Budget(images).size_of_a_set(features, 300) == 300


def test_a_broken_ledger(tmp_path: Path):
    path = tmp_path / "state.jsonl"
    Ledger(path, {"a": 1}, writes=True).add({"x": 1}, range(3), Scored("fd", 0.5, 1.0))
    assert Ledger(path, {"a": 1}, writes=True).find({"x": 1}, range(3))["value"] == 0.5
    assert Ledger(path, {"a": 1}, writes=True).find(None, range(3)) is None
    path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match="must be a tuning's; remove it"):
        Ledger(path, {"a": 1}, writes=True)


@pytest.mark.slow
def test_compare_says_who_was_tuned(arms, compare, course: Course, tmp_path: Path):
    """One run of four: its line has candidates and images, those of the others say so."""
    compare(*arms)
    assert "Guidance, tuned" not in (tmp_path / "out" / "comparison.html").read_text()
    course.folder = arms[2]
    result = course(images=600, set_images=20)
    found, _ = compare(*arms)
    [line] = [each for each in found["tuned"] if each["run"].endswith("branch-0")]
    assert (line["candidates"], line["images"]) == (len(result["candidates"]), 580)
    assert line["fresh"] == pytest.approx(sum(result["fresh"]["winner"]) / 3)
    others = [each for each in found["tuned"] if each is not line]
    assert len(others) == 3 and {each["candidates"] for each in others} == {None}
    [note] = [each for each in found["notes"] if each.startswith("tuning:")]
    assert "not tuned equally hard; not tuned: none" in note
    for name in ("comparison.html", "comparison.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "Guidance, tuned" in text and text.count("not tuned") >= 3 and "580" in text
    (arms[2] / "tune/cfg/result.json").write_text("{}")
    assert any("result.json: cannot be read" in note for note in compare(*arms)[0]["notes"])


@pytest.mark.slow
def test_a_tuned_guidance_is_that_of_its_arm(arms, compare, course: Course, tmp_path: Path):
    """Of three arms of a run and two of another: the one with the winner's guidance."""
    course.folder = arms[2]
    result = course(images=600, set_images=20)
    course("weaker", images=100, set_images=20, space=Space.of("cfg", ["scale=3:4"]))
    for folder in arms:
        scores = json.loads((folder / "scores.json").read_text())
        for how in (result["guidance"], "cfg(1.25, [0, 1])")[: 2 if folder in arms[2:] else 1]:
            protocol = scores[2]["protocol"] | {"guidance": how}
            scores.append(scores[2] | {"guidance": how, "protocol": protocol})
        (folder / "scores.json").write_text(json.dumps(scores))
    found, _ = compare(*arms, "--settings")
    assert len(found["arms"]) == 5
    lines = {(each["arm"], each["run"][-1]): each for each in found["tuned"]}
    assert len(lines) == len(found["tuned"]) == 6  # none of unguided arms
    for (arm, seed), line in lines.items():
        tuned = (arm, seed) == (f"branch: {result['guidance']}", "0")
        assert line["candidates"] == (len(result["candidates"]) if tuned else None), arm
        assert line["guidance"] == arm.partition(": ")[2]
    assert any("not tuned equally hard" in note for note in found["notes"])
    found, _ = compare(arms[2], "--settings")  # its unguided arm counts for nothing here
    assert [each["candidates"] for each in found["tuned"]].count(None) == 1
    (arms[2] / "scores.json").write_text(json.dumps(scores[:-1]))
    found, _ = compare(arms[2], "--settings")
    assert len(found["tuned"]) == 1 and not any("tuning:" in note for note in found["notes"])


# ---- the command -----------------------------------------------------------------------------

FEW = ["--guidance=cfg", "--images=540", "--search", "scale=1:3", "--search=low=0:0.5"]


@pytest.fixture
def run(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)
    return tiny_run


def tune(run: Path, *options: str) -> dict:
    """The result of a tuning, less the name; of images there are as many as its scores tell."""
    main(["tune", str(run), *FEW, *options])
    name = next((o.partition("=")[2] for o in options if o.startswith("--name")), "cfg")
    return json.loads((run / "tune" / name / "result.json").read_text()) | {"name": ""}


@pytest.mark.slow
def test_the_winner_scores_the_same_as_an_overlay(run: Path, monkeypatch):
    """And the run's own scoring seeds are not among those that were generated."""
    seeds = set[int]()
    take = FID.take
    monkeypatch.setattr(
        FID, "take", lambda *args: seeds.update(args[3]["seed"].tolist()) or take(*args)
    )
    result = tune(run)
    assert min(seeds) == tuning.TUNING and len(seeds) == 3 * 65 + 3 * 90
    assert [p.partition("=")[0] for p in result["about"]["search"]] == ["scale", "low"]
    before = len(read_scores(run))
    options = [f"--data.first_seed={tuning.FRESH}", "--data.sampling_seeds=3"]
    config = ["-c", f"{run}/config.yaml", f"--ckpt_path={run}/checkpoints/last.ckpt"]
    winner = ["-c", f"{run}/tune/cfg/winner.yaml"]
    main(["validate", *config, *winner, f"--trainer.default_root_dir={run}", *options])
    main(["validate", *config, f"--trainer.default_root_dir={run}", *options])
    scores = read_scores(run)[before:]
    assert [each.guidance for each in scores] == [result["guidance"]] * 3 + ["none"] * 3
    assert [each.value for each in scores[:3]] == result["fresh"]["winner"]
    assert [each.value for each in scores[3:]] == result["fresh"]["unguided"]
    assert [list(each.protocol.seeds) for each in scores[:3]] == result["seeds"]["fresh"]


@pytest.mark.slow
def test_two_processes_find_the_same(run: Path):
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork", "--name=two"]
    assert tune(run, *two) == tune(run)


@pytest.mark.slow
@pytest.mark.parametrize("wish, status", [("preempted", PREEMPTED), ("interrupted", INTERRUPTED)])
def test_a_stopped_command_goes_on(run: Path, monkeypatch, wish: str, status: int):
    """After the batch at hand, with the status of the house; nothing of half a score is kept."""
    calls, take = [], FID.take

    def asked(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 8:  # the second batch of the third score
            setattr(REQUESTS, wish, True)
        take(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(FID, "take", asked)
        tune(run, "--name=stopped")
    REQUESTS.reset()
    assert stop.value.code == status and len(calls) == 8
    state = run / "tune/stopped/state.jsonl"
    assert len(state.read_text().splitlines()) == 3  # what is searched, and two scores
    assert tune(run, "--name=stopped") == tune(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        (["--guidance=cgf"], "guidance=cgf: must be one of"),
        (["--search=sacle=1:2"], "search=sacle: sacle must be one of scale, low, high"),
        (["--search=high=1:0"], "search=high=1:0: must be NAME=LOW:HIGH"),
        (["--images=100"], "images=100: must be enough for one candidate on 3 sets of 65, 195"),
        (["--trainer.callbacks=[]"], "trainer.callbacks: must hold a FID"),
        (["--imagse=100"], "imagse"),
    ],
)
def test_bad_input(run: Path, options: list[str], message: str):
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stop:
        tune(run, *options)
    assert "\n" not in str(stop.value.code)
    assert not list(run.glob("tune/*/state.jsonl"))

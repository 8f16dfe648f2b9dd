"""The studies: how they are run, and that their tables come from their runs' scores."""

import functools
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from refusals import parsed
from run_folders import ENTRY
from scipy import stats

from w2s_train.command import list_keys
from w2s_train.errors import UserError
from w2s_train.guidance import ClassifierFree
from w2s_train.models import DiT, DiTOutput
from w2s_train.sampler import Euler

sys.path.insert(0, str(ROOT / "experiments"))
import finals
import guideability
import remake
import run
from prompted.guidance import SkipLayer

STUDIES = sorted(path.parent.name for path in (ROOT / "experiments").glob("*/study.yaml"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)")
RUNS = sorted((ROOT / "experiments").glob("*/runs/*/scores.json"))
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast
RENAMED = yaml.safe_load((ROOT / "experiments" / "renamed.yaml").read_text())


@pytest.mark.slow
def test_every_table_and_page_is_what_the_stored_scores_say():
    done = subprocess.run(
        [sys.executable, "experiments/remake.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.slow
def test_the_check_sees_another_number_and_no_other_picture(tmp_path, monkeypatch, capsys):
    study = tmp_path / "experiments/mnist_unconditional"
    shutil.copytree(ROOT / "experiments/mnist_unconditional", study)
    for module in (remake, run):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)  # where it goes itself, and stays
    monkeypatch.setattr(sys, "argv", ["remake.py", "--check", "mnist_unconditional"])

    def differing() -> list[str]:
        with pytest.raises(SystemExit) as caught:
            remake.main()
        lines = capsys.readouterr().out.splitlines()
        assert bool(caught.value.code) == bool(lines)
        return [line.partition("comparison/")[2] for line in lines]

    (study / "comparison/comparison.html").write_text("another picture")
    assert differing() == []
    for name in ("comparison.json", "comparison.md"):
        path = study / "comparison" / name
        path.write_text(re.sub(r"(\d\.\d+)(\D)", r"\g<1>1\2", path.read_text(), count=1))
        assert differing() == [name]
        path.write_text((ROOT / path.relative_to(tmp_path)).read_text())


def test_links_lead_somewhere():
    pages = [
        path for pattern in (*remake.PAGES, "data/*.md", "*.md") for path in ROOT.glob(pattern)
    ]
    links = [(page, link) for page in pages for link in LINK.findall(page.read_text())]
    assert len(links) > 50
    lost = [(page.name, link) for page, link in links if not (page.parent / link).exists()]
    assert not lost


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_commands_name_files_that_are_there_and_folders_that_are_not_shared(study):
    found = run.jobs(study)
    assert len({job.folder for job in found}) == len(found) > 0
    assert set(run.load(study).get("figure", [])) <= {job.arm for job in found}
    for job in found:
        words = job.command
        assert (ROOT / "runs" / study) in job.folder.parents
        assert all((ROOT / path).is_file() for path in overlays(words)) and overlays(words)
        assert words[words.index("--seed_everything") + 1] == str(job.seed)
        assert words[words.index("--trainer.default_root_dir") + 1] == f"runs/{study}/{job.name}"
        assert run.jobs(study, [job.arm], [job.seed], "again")[0].folder != job.folder


def overlays(words: list[str]) -> list[str]:
    """The files of a command."""
    return [words[i + 1] for i, word in enumerate(words) if word == "-c"]


def merged(below: object, above: object) -> object:
    """Two configs as the command reads them: objects key by key, everything else replaced; another
    class has none of the arguments of the one before.
    """
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and above["class_path"] != below.get("class_path"):
        return above
    return below | {key: merged(below.get(key), value) for key, value in above.items()}


def holds(found: object, expected: object) -> bool:
    """``found`` has everything that ``expected`` says."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(holds(found.get(k), v) for k, v in expected.items())
    if isinstance(expected, list):
        if not isinstance(found, list) or len(found) != len(expected):
            return False
        return all(holds(had, wanted) for had, wanted in zip(found, expected, strict=True))
    return found == expected


@functools.cache
def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(), LOADER)


@functools.cache
def jobs(study: str) -> list[run.Job]:
    """All runs of a study."""
    return run.jobs(study)


def described(study: str, name: str) -> list[str]:
    """The command of a recorded run: as its study says; of a retired arm, as it did."""
    arm, _, seed = name.rpartition("-")
    retired = RENAMED["retired"].get(arm)
    if retired and study in retired["studies"]:
        common = run.load(study)["command"]
        return run.command(common, retired["added"], int(seed), Path("runs", study, name))
    (job,) = [job for job in jobs(study) if job.name == name]
    return job.command


@pytest.mark.parametrize("scores", RUNS, ids=lambda path: f"{path.parts[-4]}/{path.parts[-2]}")
def test_a_record_is_of_the_run_that_the_study_describes(scores):
    """The stored config says what the files and options of the study's command say today."""
    study, name = scores.parts[-4], scores.parts[-2]
    command = described(study, name)
    entries = json.loads(scores.read_text())
    assert all(len(entry["protocol"]["git_commit"]) == 40 for entry in entries)  # and not dirty
    if command[1] == "validate":
        option = "--model.guidance"
        wanted = json.loads(command[command.index(option) + 1]) if option in command else [None]
        names, metrics = ({entry[key] for entry in entries} for key in ("guidance", "metric"))
        assert len(names) == len(wanted) and len(entries) == len(wanted) * len(metrics)
        assert option in command or names == {"none"}
        return
    expected: object = {}
    for path in overlays(command):
        expected = merged(expected, plain(read_yaml(ROOT / path)))
    command, inside = list_keys.split(command)
    pairs = [*itertools.pairwise(command)]
    pairs += [
        option.split("=", 1) for option in list_keys.options(expected, inside, yaml.safe_load)
    ]
    for key, value in pairs:
        if key.startswith(("--model.", "--trainer.", "--data.")):
            for part in reversed(key.removeprefix("--").split(".")):
                value = {part: yaml.safe_load(value) if isinstance(value, str) else value}
            expected = merged(expected, plain(value))
    stored = read_yaml(scores.parent / "config.yaml")
    for part in ("model", "trainer", "data"):
        if isinstance(expected[part], dict):  # else the path of a config
            assert holds(plain(stored)[part], expected[part]), part
    assert f"{name.rpartition('-')[0]}-{stored['seed_everything']}" == name


def arm_and_seed(folder: str) -> tuple[str, str]:
    """Of runs/STUDY/ARM-SEED."""
    arm, _, seed = Path(folder).name.rpartition("-")
    return arm, seed


def test_renamed_yaml_says_what_every_recorded_run_was_called():
    """Its own folder has the arm of today, or what the table makes it; the table has no more."""
    used = set()
    for scores in RUNS:
        config = scores.parent / "config.yaml"
        if not config.is_file():
            continue  # guidance at sampling: the study alone names the arm
        study = scores.parts[-4]
        today, seed = arm_and_seed(str(scores.parent))
        then, its_seed = arm_and_seed(read_yaml(config)["trainer"]["default_root_dir"])
        names = RENAMED["recorded"].get(study, {}).get(then, then)
        assert seed == its_seed
        assert today in (names if isinstance(names, list) else [names]), scores
        used.add((study, then, today))
    for study, names in RENAMED["recorded"].items():
        for then, today in names.items():
            for name in today if isinstance(today, list) else [today]:
                assert (study, then, name) in used, f"{study}: no record of {then}, now {name}"


def test_old_names_are_gone_and_new_ones_are_there():
    arms = {arm for study in STUDIES for arm in run.load(study)["arms"]}
    assert not set(RENAMED["arms"]) & arms and set(RENAMED["arms"].values()) <= arms
    assert not set(RENAMED["retired"]) & arms
    for old, new in RENAMED["files"].items():
        assert not (ROOT / old).exists() and (ROOT / new).is_file()
    used = {path for study in STUDIES for job in jobs(study) for path in overlays(job.command)}
    assert not set(RENAMED["files"]) & used


NAMED = ("configs/**/*.yaml", "configs/*.md", "docs/*.md", "experiments/*.md", "experiments/*/*.md")
NAMED += ("experiments/*/study.yaml", "experiments/*/step_time.json", "benchmarks/*.json")
NAMED += ("experiments/*/comparison/*", "experiments/*.py", "data/*.md", "README.md")
ALONE = re.compile(r"(?<![\w./])sgg(?![\w])")


def test_no_recipe_is_called_sgg_alone():
    """It has meant three. Commands are history; the study in the plane has its own arms."""
    found = []
    for path in (path for pattern in NAMED for path in sorted(ROOT.glob(pattern))):
        if path.name == "migration.md" or "leaves" in path.parts:
            continue
        for line in path.read_text().splitlines():
            if "benchmarks/step.py --" not in line and ALONE.search(line):
                found.append((str(path.relative_to(ROOT)), line[:100]))
    assert not found


def plain(config: object) -> object:
    """Without ``init_args``, as overlays and options may leave them out; callbacks as they are."""
    if isinstance(config, list):
        return [plain(item) for item in config]
    if not isinstance(config, dict):
        return config
    inner = plain(config["init_args"]) if config.get("init_args") else {}
    assert isinstance(inner, dict)
    skipped = ("init_args", "callbacks", "default_root_dir")
    return {key: plain(value) for key, value in config.items() if key not in skipped} | inner


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nothing"], "error: study=nothing: must be one of "),
        (["mnist", "--arms", "gss"], "error: arms=gss: must be one of none, sgg_reversed, "),
        (["mnist", "--cpu"], "error: cpu=mnist: must be a study whose study.yaml has `cpu`"),
        (["mnist", "--seeds", "9"], "error: seeds=9: must be one of 10, 11, 12"),
        (
            ["tiny_imagenet", "--arms", "mg", "--seeds", "11", "12"],
            "error: seeds=11, 12: must be of these arms: mg has 10",
        ),
        (["mnist", "--jobs", "0"], "error: jobs=0: must be at least 1"),
        (["mnist", "--limit", "nan"], "error: limit=nan: must be seconds above 0"),
    ],
)
def test_mistakes_are_one_line(options, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert str(caught.value.code).startswith(said) and "\n" not in str(caught.value.code)


@pytest.mark.slow
def test_a_study_may_set_keys_inside_lists():
    """In both forms of an arm; what the command makes of the words."""
    arms = ({"--model.objective.segments.0.scale": 0.25}, "--model.objective.segments.0.scale 0.25")
    for added in arms:
        words = run.command("lightning fit -c configs/digits_w2s.yaml", added, 3, Path("runs/a-3"))
        config = parsed(*words[2:])
        assert config.model.objective.init_args.segments[0].init_args.scale == 0.25
        assert config.seed_everything == 3


def test_a_run_that_is_named_twice_is_made_once():
    (job,) = run.jobs("mnist", ["none", "none"], [10, 10])
    assert job.name == "none-10"


@pytest.mark.parametrize(
    ("kind", "kept"), [("fit", {"step-000009.png"}), ("validate", {"step-000009-ema-cfg-2.png"})]
)
def test_grids_that_are_kept(kind, kept, tmp_path, monkeypatch):
    """Of a training the last one, else those of guidances; of the first seed alone."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    study = {"command": f"lightning {kind}", "seeds": [1, 2], "arms": {"none": ""}}
    write(tmp_path / "experiments/s/study.yaml", yaml.safe_dump(study))
    drawn = ["step-000004.png", "step-000009.png"]
    drawn += [] if kind == "fit" else ["step-000009-ema-cfg-2.png"]
    for job in run.jobs("s"):
        for name in (*run.KEPT, "scores.json", *(f"grids/{each}" for each in drawn)):
            write(job.folder / name, name)
        run.keep(job)
        found = {path.name for path in (job.record / "grids").glob("*")}
        assert found == (kept if job.seed == 1 else set())


def test_options_are_words_or_json():
    assert run.options_of("-c a.yaml --x '{a: 1} b'", 3) == ["-c", "a.yaml", "--x", "{a: 1} b"]
    words = run.options_of({"--list": [{"low": 0.5}], "--path": "p-{seed}"}, 3)
    assert words == ["--list", '[{"low": 0.5}]', "--path", "p-3"]
    assert shlex.split(shlex.join(words)) == words


def test_the_interval_is_that_of_students_t():
    values = [3.0, 4.5, 4.2]
    low, high = stats.t.interval(0.95, 2, statistics.fmean(values), stats.sem(values))
    found = remake.interval(statistics.fmean(values), statistics.stdev(values), 3)
    assert found == f"3.90 ({low:.2f} to {high:.2f})"


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.2, 0.8), (0.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("steps", [7, 25])
def test_evaluations_are_those_that_the_sampler_makes(bounds, steps):
    calls = []

    class Counting(DiT):
        def forward(self, x_t: torch.Tensor, *rest: object, **more: object) -> DiTOutput:
            calls.append(len(x_t))
            return super().forward(x_t, *rest, **more)  # type: ignore[arg-type]

    network = Counting(
        input_size=4,
        patch_size=2,
        in_channels=1,
        hidden_size=8,
        depth=1,
        num_heads=1,
        num_classes=2,
    ).eval()
    guidance, sampler = ClassifierFree(2.0, *bounds), Euler(steps)
    field = guidance.field(network, torch.zeros(1, dtype=torch.long), sampler.times())
    with torch.no_grad():
        sampler(field, torch.randn(1, 1, 4, 4), draw=torch.randn)
    assert remake.evaluations(guidance.describe(), steps) == sum(calls)


def test_a_run_made_again_is_set_against_those_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    study = {"command": "lightning fit", "seeds": [1, 2, 3], "arms": {"none": ""}}
    write(tmp_path / "experiments/s/study.yaml", yaml.safe_dump(study))
    (job,) = run.jobs("s", seeds=[1], kind="again")
    beside = ENTRY | {"metric": "recall_digits", "value": 0.01}  # newer runs have more metrics
    write(job.folder / "scores.json", json.dumps([ENTRY | {"value": 4.0}, beside]))
    assert run.against_record(job) == "4; recorded: nothing"
    for seed, value in ((1, 3.0), (2, 4.5), (3, 4.2)):
        scores = json.dumps([ENTRY, ENTRY | {"value": value}])
        write(tmp_path / f"experiments/s/runs/none-{seed}/scores.json", scores)
    recorded = "recorded: 3 (seed 1), 4.5 (seed 2), 4.2 (seed 3)"
    low, high = stats.t.interval(0.95, 2, 3.9, stats.sem([3.0, 4.5, 4.2]))
    interval = f"{low:.6g} to {high:.6g}"
    assert run.against_record(job) == f"4; {recorded}; inside their mean's interval, {interval}"
    write(job.folder / "scores.json", json.dumps([ENTRY | {"value": 6.0}]))
    assert "outside of their mean's interval" in run.against_record(job)


def test_scores_at_the_end_by_every_metric(tmp_path, monkeypatch):
    """Of runs there are so far; the verdict against the first row on the same training seeds."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(finals, "ROOT", tmp_path)
    seeds = {"none": [1, 2, 3], "head": [1, 2, 3], "head_guided": [3], "one": [2], "later": [1]}
    study = {"command": "lightning validate", "seeds": seeds, "arms": dict.fromkeys(seeds, "")}
    study["same_runs"] = {"head_guided": "head"}
    write(tmp_path / "experiments/s/study.yaml", yaml.safe_dump(study, sort_keys=False))
    cfg = ClassifierFree(2.0, 0.2, 0.8).describe()

    def scored(arm: str, seed: int, guidance: str, distance: float, recall: float) -> None:
        path = tmp_path / f"experiments/s/runs/{arm}-{seed}/scores.json"
        there = json.loads(path.read_text()) if path.is_file() else []
        for metric, value in (("fd_digits", distance), ("recall_digits", recall)):
            protocol = ENTRY["protocol"] | {"guidance": guidance}
            there.append(ENTRY | {"metric": metric, "value": value, "guidance": guidance})
            there[-1]["protocol"] = protocol
        write(path, json.dumps(there))

    for seed, distance in ((1, 10.0), (2, 10.2), (3, 9.9)):
        scored("none", seed, "none", distance, 0.5)
        scored("none", seed, cfg, 0.99 * distance, 0.25)
        scored("head", seed, "none", 0.5 * distance, 0.75)
    scored("one", 2, "none", 5.1, 0.125)
    lines = finals.table("s").splitlines()
    head = "| trained, sampled | fd | fd, guided at sampling | recall | evaluations | verdict |"
    assert lines[0] == head
    guided = re.fullmatch(
        r".*, unguided \| 10\.03 \(.*\) \| (.*) \| 0.500 .* baseline \|", lines[2]
    )
    assert guided and guided[1].startswith("9.93 (")
    assert lines[3].startswith(f"| `none`, `{cfg}` | {guided[1]} | – |")
    assert lines[3].endswith(f"| {remake.evaluations(cfg, 25)} | inconclusive |")
    assert lines[4].startswith("| `head`, unguided | 5.02 (") and lines[4].endswith("| better |")
    assert "| 0.750 (0.750 to 0.750) | 25 |" in lines[4]
    assert lines[5] == "| `one`, unguided | 5.10 | – | 0.125 | 25 | inconclusive, one seed |"
    assert lines[6] == "" and "over training seeds 1, 2, 3; of `one` 2, or" in lines[7]
    scored("head_guided", 3, cfg, 4.9, 0.5)
    lines = finals.table("s").splitlines()
    assert re.search(r"`head`, unguided \| 5.02 \(.*\) \| 4.90, 1 of 3 runs \| 0.750", lines[4])
    assert lines[5].startswith(f"| `head`, `{cfg}` | 4.90 | – | 0.500 |")
    assert "1, 2, 3; of `head`, guided 3; of `one` 2, or" in lines[-1]
    summary = finals.column("s")
    assert summary["head", "none"] == ("**5** (5 to 5)", 25)
    assert summary["one", "none"] == ("5", 25)

    scored("later", 1, "none", 4.0, 0.5)  # sampled twice: one value, the mean
    scored("later", 1, "none", 6.0, 0.5)
    assert "| `later`, unguided | 5.00 | – | 0.500 |" in finals.table("s")
    path = tmp_path / "experiments/s/runs/later-1/scores.json"
    path.write_text(path.read_text().replace('"step": ', '"step": 1'))
    with pytest.raises(SystemExit, match="error: s: step must be the same in all scores"):
        finals.table("s")
    shutil.rmtree(tmp_path / "experiments/s/runs")
    scored("head", 1, "none", 4.0, 0.5)
    with pytest.raises(SystemExit, match="error: s: must have scores of none, unguided"):
        finals.table("s")


def test_the_table_of_guideability_is_of_the_last_entries(tmp_path, monkeypatch):
    """Means of the last five of six, and the root of the sum of their squared errors over five."""
    keys = [
        f"held_out/{s}/{r}guideability" for s in guideability.SOURCES for r in guideability.RANGES
    ]
    lines = [",".join(["step", *keys, *(f"{key}_error" for key in keys)])]
    for step, value in enumerate((9.0, 0.1, 0.2, 0.3, 0.4, 0.5)):
        lines.append(",".join(map(str, [step, *[value] * len(keys), *[0.1] * len(keys)])))
        lines.append(f"{step}{',' * 2 * len(keys)}")  # of another logger
    write(tmp_path / "none-1/metrics.csv", "\n".join(lines))
    write(tmp_path / "experiments/s/study.yaml", "")
    monkeypatch.setattr(guideability, "ROOT", tmp_path)
    words = ["guideability.py", str(tmp_path / "none-1"), "--keep", "s"]
    monkeypatch.setattr(sys, "argv", words)
    guideability.main()
    rows = guideability.table("s").splitlines()
    assert rows[2] == "| all | +0.300 ± 0.045 | +0.300 ± 0.045 | +0.300 ± 0.045 |"
    assert rows[12].startswith("| 0.9 to 1.0 | +0.300 ± 0.045 |") and len(rows) == 15


def test_times_of_an_arm_may_be_those_of_another_or_of_its_own_options(tmp_path, monkeypatch):
    for module in (remake, run):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    remake.measured_steps.cache_clear()
    same = {"none": "-c plain.yaml", "b": "a"}
    about = {"command": "lightning fit", "seeds": [1], "arms": {"none": "", "a": "", "b": ""}}
    write(tmp_path / "experiments/s/study.yaml", yaml.safe_dump(about | {"timed_as": same}))
    steps = [{"recipe": "none", "seconds": 2.0, "ratio": 1.0}, {"recipe": "a", "ratio": 1.5}]
    write(tmp_path / "experiments/s/step_time.json", json.dumps(steps))
    assert remake.step_times("s") == {"none": 2.0, "a": 3.0, "b": 3.0}
    remake.measured_steps.cache_clear()


def write(path: Path, text: str) -> None:
    """A file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


TINY = """
command: >-
  lightning fit -c {root}/configs/digits_baseline.yaml --trainer.max_steps 400
  --trainer.val_check_interval 200 --data.num_generated 64 --checkpoint.every_n_train_steps 50
cpu: --data.num_generated 32
seeds: [3, 4]
arms: {{none: "", wrong: --data.batch_size -1}}
"""


@pytest.mark.slow
@pytest.mark.long
def test_a_study_stops_with_a_checkpoint_goes_on_and_says_which_run_failed(digits, tmp_path):
    (tmp_path / "experiments/tiny").mkdir(parents=True)
    (tmp_path / "data").symlink_to(ROOT / "data")
    (tmp_path / "launch").mkdir()
    for name in ("experiments/run.py", "experiments/gpu.sh", "launch/gpu.sh"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / "experiments/tiny/study.yaml").write_text(TINY.format(root=ROOT))
    command = [sys.executable, str(tmp_path / "experiments/run.py"), "tiny", "--cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    record = tmp_path / "runs/cpu/tiny/records/none-3/scores.json"

    checkpoints = tmp_path / "runs/cpu/tiny/none-3/checkpoints"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not list(checkpoints.glob("step-*.ckpt")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=90)
    assert process.returncode == 75, said
    assert "0 of 2 runs are done" in said and "tiny none-3: status 75" in said
    assert "runs are left, for a call with the time to start them" in said
    assert not record.exists()

    # Back from a machine and to another one.
    shell = {**environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def gpu(**more: str) -> "subprocess.CompletedProcess[str]":
        script = ["bash", str(tmp_path / "experiments/gpu.sh"), "tiny", "digits", "1", "--cpu"]
        return subprocess.run(script, env=shell | more, capture_output=True, text=True, check=False)

    done = gpu(LIMIT="1", OUT=str(tmp_path / "first"))
    assert done.returncode == 75, done.stdout + done.stderr
    assert sorted(p.name for p in (tmp_path / "first").iterdir()) == [
        "logs.tar.gz",
        "unfinished.aa",
    ]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "gpu").mkdir()
    whole = (tmp_path / "first/unfinished.aa").read_bytes()  # as if it had two parts
    for name, part in (("aa", whole[:5000]), ("ab", whole[5000:])):
        (tmp_path / f"gpu/unfinished.{name}").write_bytes(part)
    done = gpu(OUT=str(tmp_path / "second"))
    assert done.returncode == 1 and "tiny wrong-3: status 1, see wrong-3.log" in done.stdout
    scores = json.loads(record.read_text())
    assert [(score["step"], score["protocol"]["n"]) for score in scores] == [(200, 32), (400, 32)]
    assert not (tmp_path / "experiments/tiny/runs").exists()  # nothing that was tried is recorded
    environments = json.loads((record.parent / "environment.json").read_text())
    assert len(environments) == 2  # it was started twice, and went on
    with tarfile.open(tmp_path / "second/records.tar") as packed:
        stored = packed.extractfile(str(record.relative_to(tmp_path)))
        assert stored is not None and stored.read() == record.read_bytes()
    assert "data.batch_size=-1" in (tmp_path / "runs/cpu/tiny/wrong-3.log").read_text()

    again = subprocess.run(
        [*command, "--arms", "none"], env=environment, capture_output=True, text=True, check=False
    )
    assert (again.returncode, again.stdout) == (0, "tiny: 1 of 1 runs are done\n")


def test_skip_layer_guidance_is_its_formula_and_costs_what_it_uses():
    """Of experiments/prompted: as diffusers adds the two up, evaluated where a scale acts alone."""
    torch.manual_seed(0)
    sizes = dict(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=3, num_heads=1)
    network = DiT(**sizes, num_classes=2).eval()
    for parameter in network.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, y, t = torch.randn(2, 1, 4, 4), torch.tensor([0, 1]), torch.full((2,), 0.5)
    null = torch.full_like(y, network.null_class)
    v, v_null = network(x, t, y).velocity, network(x, t, null).velocity
    v_skipped = network(x, t, y, skip_blocks=[1]).velocity
    calls = list[int]()
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    for scale, skip_scale, start, expected, evaluated in (
        (2.0, 0.5, 0.5, v_null + 2 * (v - v_null) + 0.5 * (v - v_skipped), 3 + 3 + 1),
        (2.0, 0.5, 0.8, v_null + 2 * (v - v_null), 3 + 3),
        (2.0, 0.0, 0.5, v_null + 2 * (v - v_null), 3 + 3),
        (1.0, 0.5, 0.5, v + 0.5 * (v - v_skipped), 3 + 1),
        (1.0, 0.5, 0.8, v, 3),
    ):
        guidance = SkipLayer(scale, skip_scale, [1], 0.3, 0.7)
        guidance.bind(network, None)
        calls.clear()
        with torch.no_grad():
            made = guidance.field(network, y, [1.0, 0.0])(x, 0.5, start)
        assert torch.allclose(made, expected, atol=1e-6)
        assert len(calls) == evaluated
    with pytest.raises(UserError, match="skip_scale=-1.0: must be"):
        SkipLayer(1.0, -1.0, [1], 0.3, 0.7)

"""`launch/submit` before it submits: what it prints, refuses and copies."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, quick

SITE = """\
account=me
gpus_per_node=4
tasks_per_node=4
cpus_per_task=8
memory=100G
time_limit=2:00:00
warning=90
options=(--qos=long)
"""
CONFIGS = ("-c", "configs/base.yaml", "-c", "configs/weak/one.yaml")
SBATCH = """\
#!/bin/bash
printf '%s\\n' "$@" >sbatch.txt
echo 17
"""


def git(folder: Path, *words: str) -> None:
    command = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@test"]
    subprocess.run([*command, *words], check=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small edited checkout with the real `launch/`, and an sbatch that notes its arguments."""
    folder = tmp_path / "project"
    files = {f"launch/{path.name}": path.read_text() for path in (ROOT / "launch").iterdir()}
    files["w2s_train/secrets.py"] = (ROOT / "w2s_train" / "secrets.py").read_text()
    files |= {f"configs/{name}.yaml": "" for name in ("base", "weak/one", "weak/two", "ignored")}
    files |= {"code.py": "old\n", ".env": "password\n", ".gitignore": "/runs/\nignored*\n"}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "launch" / "submit").chmod(0o755)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "all")
    edits = {"code.py": "new\n", ".env": "other\n", "untracked.py": "", "certs/a.PEM": ""}
    for name, text in {**edits, "credentials.json": "", "ignored.bin": ""}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (tmp_path / "site.sh").write_text(SITE)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    return folder


@pytest.fixture
def submit(project: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run it in the checkout."""
    place = project.parent

    def run(*options: str, **environment: str) -> subprocess.CompletedProcess:
        path = f"{place}/bin{os.pathsep}{os.environ['PATH']}"
        given = {"PATH": path, "W2S_SITE": str(place / "site.sh"), **environment}
        return subprocess.run(
            [sys.executable, "launch/submit", *options],
            cwd=project,
            env=os.environ | given,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_dry_run_says_everything_and_writes_nothing(project: Path, submit):
    before = everything(project.parent)
    options = ("--nodes", "2", "--seeds", "0", "1", "--dry-run", "--", "--model.ema_decay", "0.9")
    done = submit("-c", "configs/base.yaml", "-c", *CONFIGS[3:], "configs/weak/two.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert everything(project.parent) == before
    for stem in ("base+one", "base+two"):
        for seed in (0, 1):
            assert f"{project}/runs/{stem}-seed{seed} (new)" in done.stdout
    commands = [line for line in done.stdout.splitlines() if " lightning fit -c " in line]
    assert len(commands) == 4 and "--seed_everything=1 --model.ema_decay 0.9 " in commands[3]
    for words in (
        "nodes    2 for each run; processes on each: 4, GPUs on each: 4",
        "time     2:00:00; 90 s before",
        "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 --mem=100G",
        "--time=2:00:00 --signal=USR1@90 --account=me --qos=long",
        "--array=0-3 ",
    ):
        assert words in done.stdout, words


def test_the_working_tree_is_copied_without_secrets(project: Path, submit):
    """Tracked and untracked files as they are; nothing that is ignored or looks secret."""
    done = submit(*CONFIGS)
    assert done.stdout.endswith("submitted 17\n"), done.stderr
    run = project / "runs" / "base+one"
    (code,) = (run / "code").iterdir()
    copied = {str(path.relative_to(code)) for path in everything(code) if path.is_file()}
    assert {"code.py", "untracked.py", "configs/base.yaml", "launch/train.sbatch"} <= copied
    assert not {".env", "credentials.json", "certs/a.PEM", "ignored.bin"} & copied
    assert (code / "code.py").read_text() == "new\n"
    assert (code / "launch" / "site.sh").read_text() == SITE
    assert (code / "COMMIT").read_text().endswith("-dirty\n")
    diff = (code / "uncommitted.diff").read_text()
    assert "-old\n+new" in diff and "password" not in diff
    said = (project / "sbatch.txt").read_text().splitlines()
    options = f"-c {code}/configs/base.yaml -c {code}/configs/weak/one.yaml"
    script = [f"{code}/launch/train.sbatch", str(project), code.name]
    assert said[-4:] == [*script, f"{run} {options} --trainer.default_root_dir={run}"]


def test_later_submissions_leave_earlier_copies_alone(project: Path, submit):
    """The same state is one copy, another state another one; a run that exists goes on."""
    for _ in range(2):
        submit(*CONFIGS)
        (project / "sbatch.txt").unlink()
    run = project / "runs" / "base+one"
    (first,) = (run / "code").iterdir()
    (project / "code.py").write_text("newer\n")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    assert f"{run} (exists: goes on from its last checkpoint)" in submit(*CONFIGS).stdout
    assert len(list((run / "code").iterdir())) == 2
    assert (first / "code.py").read_text() == "new\n"


def test_each_seed_has_a_folder_of_its_own(submit):
    """Also where it is submitted alone: another seed is another run and must not go on with it."""
    for seed in ("0", "1"):
        assert f"/runs/base+one-seed{seed} (new)" in submit(*CONFIGS, "--seeds", seed).stdout
    assert "/runs/base+one (new)" in submit(*CONFIGS).stdout


def test_evaluation_belongs_to_the_run_of_its_checkpoint(project: Path, submit):
    path = project / "runs" / "base+one" / "checkpoints" / "step-000003.ckpt"
    path.parent.mkdir(parents=True)
    path.touch()
    guided = ("-c", "configs/weak/one.yaml", "configs/weak/two.yaml", "--evaluate", str(path))
    done = submit("-c", "configs/base.yaml", *guided, "--dry-run")
    commands = [line for line in done.stdout.splitlines() if " lightning validate " in line]
    assert len(commands) == 2
    for command in commands:
        assert f"--trainer.default_root_dir={path.parent.parent} --ckpt_path={path} " in command
        assert "--ckpt_path=last" not in command
    assert "--job-name=evaluate-base " in done.stdout


JOB = """\
SLURM_JOB_ID=7
source launch/job.sh
begin() { sleep 0.01 && touch environment.json; }
start() { # STATUS [begin]
    before=$(begun .)
    ${2:-:}
    rc=$1
    limit_unbegun .
    echo "$rc"
}
mkdir -p logs
"""
STARTS = {
    "never begins": ("start 137; start 76; start 138", "137 76 78"),
    "begins each time": ("for _ in 1 2 3 4; do start 137 begin; done", "137 137 137 137"),
    "begins in between": (
        "start 76; start 76; start 76 begin; start 76; start 76; start 76",
        "76 76 76 76 76 78",
    ),
    "is preempted": ("start 137; start 137; start 75 begin; start 137", "137 137 75 137"),
}


@pytest.mark.parametrize("case", STARTS)
def test_a_job_that_never_begins_is_not_requeued_for_ever(case: str, project: Path):
    """Faults row 7, where the command itself cannot count: before it trains."""
    script, expected = STARTS[case]
    said = subprocess.check_output(["bash", "-c", JOB + script], cwd=project, text=True)
    assert " ".join(word for word in said.split() if word.isdecimal()) == expected


WRONG = {
    "config=configs/none.yaml: no such file": ["-c", "configs/none.yaml"],
    "config=configs/ignored.yaml: must be in": ["-c", "configs/ignored.yaml"],
    "config=/dev/null: no such file": ["-c", "/dev/null"],
    "config: two combinations have one folder": ["-c", "configs/base.yaml", "configs/base.yaml"],
    "nodes=0: must be at least 1": [*CONFIGS, "--nodes", "0"],
    "tasks_per_node=5: must be in [1, 4]": [*CONFIGS, "--tasks-per-node", "5"],
    "seeds=[1, 1]: must be different": [*CONFIGS, "--seeds", "1", "1"],
    "seeds=[-1]: must be different numbers, at least 0": [*CONFIGS, "--seeds", "-1"],
    "argument --seeds: invalid int value: 'x'": [*CONFIGS, "--seeds", "x"],
    "unrecognized arguments: --node 2": [*CONFIGS, "--node", "2"],
    "the following arguments are required: -c": [],
    "--trainer.devices: is set by": [*CONFIGS, "--", "--trainer.devices=2"],
    "-c: is set by": [*CONFIGS, "--", "-cother.yaml"],
    "evaluate=/none.ckpt: must be an existing file": [*CONFIGS, "--evaluate", "/none.ckpt"],
    "sweep=model.x=: must be KEY=A,B,": [*CONFIGS, "--sweep", "model.x="],
    "sweep=model.x=1,1: must be KEY=A,B,... with different": [*CONFIGS, "--sweep", "model.x=1,1"],
    "sweep=seed_everything=1,2: seed_everything is set elsewhere": [
        *CONFIGS,
        "--sweep",
        "seed_everything=1,2",
    ],
    "array=2: must be %N": [*CONFIGS, "--array", "2"],
    "array=%2: must come with several runs": [*CONFIGS, "--array", "%2"],
    "time: is of SLURM, and has no --local": [*CONFIGS, "--local", "--time", "1:00:00"],
    "nodes: is of SLURM, and has no --local": [*CONFIGS, "--local", "--nodes", "2"],
    "launcher=a 'b: must be words for a shell": [*CONFIGS, "--launcher", "a 'b"],
    "evaluate=last: there is no checkpoint in": [*CONFIGS, "--evaluate", "last"],
}


@pytest.mark.parametrize("message", quick(WRONG, *list(WRONG)[::3]))
def test_nonsense_is_refused_before_anything_happens(project: Path, submit, message: str):
    before = everything(project.parent)
    done = submit(*WRONG[message])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert everything(project.parent) == before


def test_the_site_is_checked(project: Path, submit):
    site = project.parent / "site.sh"
    assert "error: sbatch: not found" in submit(*CONFIGS, PATH=sys.executable).stderr
    assert f"error: site={site}x: cannot be read" in submit(*CONFIGS, W2S_SITE=f"{site}x").stderr
    site.write_text(SITE.replace("warning=90", "warning=3m"))
    assert f"error: warning=3m: must be a whole number (in {site})" in submit(*CONFIGS).stderr


def test_what_is_no_code_is_not_copied(project: Path, submit):
    """Studies, tests and stray outputs, but for the config that lies there, and those beside it."""
    names = ["samples.png", "images/0.png", "mine/own.py", "experiments/a/one.yaml"]
    names += ["experiments/a/nested.yaml", "experiments/a/runs/config.yaml", "experiments/b.yaml"]
    for name in [*names, "tests/test_a.py", "docs/page.md", "experiments/a/grid.png"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("")
    git(project, "add", "experiments", "docs")
    submit(*CONFIGS[:2], "-c", "experiments/a/one.yaml")
    (code,) = (project / "runs" / "base+one" / "code").iterdir()
    copied = {str(path.relative_to(code)) for path in everything(code) if path.is_file()}
    assert {"mine/own.py", "experiments/a/one.yaml", "experiments/a/nested.yaml"} <= copied
    assert not [n for n in copied if n.startswith(("tests", "docs", "images", "samples"))]
    assert len([n for n in copied if n.startswith("experiments")]) == 2


def test_what_is_large_is_refused(project: Path, submit):
    """Data that someone has given to git."""
    with open(project / "data.bin", "wb") as file:
        file.truncate(300_000_000)
    git(project, "add", "-N", "data.bin")
    assert "error: code: 300 MB, such as data.bin; git must ignore" in submit(*CONFIGS).stderr
    assert not (project / "runs").exists()


def test_gpus_of_a_type_come_alone(project: Path, submit):
    """Of the command line or of the site; one process has one of them."""
    done = submit(*CONFIGS, "--gres", "gpu:a100:4", "--dry-run")
    assert "--gres=gpu:a100:4" in done.stdout and "--gpus-per-node" not in done.stdout
    assert "GPUs on each: 4" in done.stdout
    (project.parent / "site.sh").write_text(SITE.replace("--qos=long", "--gres=gpu:h100:2"))
    done = submit(*CONFIGS, "--tasks-per-node", "2", "--dry-run")
    assert "--gres=gpu:h100:2" in done.stdout and "--gpus-per-node" not in done.stdout
    done = submit(*CONFIGS, "--dry-run")
    assert done.stderr == "error: tasks_per_node=4: must be in [1, 2]; one process has one GPU\n"


def test_a_launcher_stands_before_python(project: Path, submit):
    """Of the site, or of the command line, which the copy of the site's file says then."""
    image = project / "a b.sif"
    words = ["--launcher", "apptainer exec --nv 'a b.sif'", "--srun-args", "--mpi=none"]
    missing = submit(*CONFIGS, *words)
    assert (
        missing.stderr.startswith("error: launcher=apptainer") and f"{image} must" in missing.stderr
    )
    image.touch()
    done = submit(*CONFIGS, *words)
    line = "srun --mpi=none bash RUN/code/.../rank.sh apptainer exec --nv 'a b.sif' python -m "
    assert line in done.stdout, done.stderr
    (code,) = (project / "runs" / "base+one" / "code").iterdir()
    script = 'source launch/site.sh; printf "%s|" "${launcher[@]}" "${srun_options[@]}"'
    said = subprocess.check_output(["bash", "-c", script], cwd=code, text=True)
    assert said == "apptainer|exec|--nv|a b.sif|--mpi=none|"
    (project.parent / "site.sh").write_text(f"{SITE}launcher=(nice -n 5)\n")
    assert "rank.sh nice -n 5 python -m w2s_train fit" in submit(*CONFIGS, "--dry-run").stdout


# ---- a sweep ------------------------------------------------------------------------------------

FAKE = """
import json, signal, sys, time
def main(words):
    value = dict(w[2:].split("=", 1) for w in words if "=" in w)
    if value.get("model.x") == "wrong":
        sys.exit("error: model.x=wrong: must be a number")
    if __name__ == "__main__":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("ran", json.dumps(words), flush=True)
        time.sleep(60 if value.get("model.x") == "wait" else 0)
        sys.exit(int(value.get("model.x", "0") == "7") and 77)
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture
def package(project: Path) -> Path:
    """In place of ours: a command that refuses, fails or waits, as its values say."""
    (project / "w2s_train" / "command").mkdir()
    (project / "w2s_train" / "command" / "run.py").write_text("class Command: pass\n")
    (project / "w2s_train" / "__init__.py").touch()
    for name in ("cli", "__main__"):
        (project / "w2s_train" / f"{name}.py").write_text(FAKE)
    return project


def test_a_sweep_is_an_array_that_names_its_folders(package: Path, submit):
    """Each value with each; as much of a key as tells it from others; nothing odd in a name."""
    sweep = ["--sweep", "model.segments.0.init_args.scale=0.2,0.4", "--sweep"]
    sweep += ["model.segments.1.scale=[1,2],w2s_train.weak.EMA", "--seeds", "3", "--array", "%2"]
    done = submit("-c", "configs/base.yaml", *sweep, "--dry-run")
    assert done.returncode == 0, done.stderr
    for name in (
        f"base+0.scale={first}+1.scale={second}-seed3 (new)"
        for first in ("0.2", "0.4")
        for second in ("1_2", "w2s_train.weak.EMA")
    ):
        assert f"/runs/{name}" in done.stdout
    assert "--model.segments.0.init_args.scale=0.2 '--model.segments.1.scale=[1,2]'" in done.stdout
    assert "values   each of the 4 commands was parsed" in done.stdout
    assert "--array=0-3%2 " in done.stdout
    submit("-c", "configs/base.yaml", "--sweep", "model.x=1,2")
    last = (package / "sbatch.txt").read_text().splitlines()[-1]
    assert last.startswith(f"{package}/runs/base+x=2 -c ") and last.endswith(" --model.x=2")
    # Where the package cannot be imported, that is said.
    (package / "w2s_train" / "command" / "run.py").write_text("import no_such_package\n")
    said = submit("-c", "configs/base.yaml", "--sweep", "model.x=1,2", "--dry-run").stdout
    assert "values   not checked: ModuleNotFoundError: No module named 'no_such_package'" in said


def test_a_sweep_runs_here_one_after_another(package: Path, submit):
    """What fails is said, the others run; the status is that of the first that failed."""
    done = submit(
        "-c", "configs/base.yaml", "--local", "--sweep", "model.x=1,7,2", "--", "--a", "b"
    )
    assert done.returncode == 77, done.stderr
    ran = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ran ")]
    assert ran == [
        ["fit", "-c", "configs/base.yaml", f"--trainer.default_root_dir={package}/runs/base+x={x}"]
        + [f"--model.x={x}", "--a", "b", "--ckpt_path=last"]
        for x in (1, 7, 2)
    ]
    assert "2 of 3 finished\nnot finished: run 1 (77); the same command goes on" in done.stdout
    wrong = submit("-c", "configs/base.yaml", "--local", "--sweep", "model.x=1,wrong")
    assert wrong.stderr == "error: base+x=wrong: model.x=wrong: must be a number\n"
    assert wrong.stdout == "" and wrong.returncode == 1


def test_a_sweep_that_is_told_to_stop_lets_its_run_save(package: Path):
    """The run at hand ends with 75, and the others are not started."""
    words = ["-c", "configs/base.yaml", "--local", "--sweep", "model.x=wait,1"]
    process = subprocess.Popen(
        [sys.executable, "launch/submit", *words], cwd=package, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = ""
    while "ran " not in said:
        said = process.stdout.readline()
        assert said, "ended before it ran"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "run 0: ended with status 75\n0 of 2 finished; 1 not started" in out


@pytest.mark.parametrize("where", ["option", "config"])
def test_secrets_are_not_copied(project: Path, submit: Callable, where: str):
    """Jobs show their options, and run folders hold the configs."""
    url = "https://user:hunter22@example.org/train-0.tar"
    arguments = ["-c", "configs/base.yaml", "--dry-run"]
    if where == "option":
        arguments += ["--", f"--data.train_urls={url}"]
    else:
        (project / "configs/base.yaml").write_text(f"data: {{train_urls: '{url}'}}\n")
    done = submit(*arguments)
    assert done.returncode == 1 and "must hold no password" in done.stderr
    assert "hunter22" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.long  # the README's own is run as it is printed
@pytest.mark.parametrize("times", [1, 2])
def test_a_sweep_over_a_key_inside_a_list(times: int, digits: None, tmp_path: Path):
    """What a constructor refuses fails alone; run again, what is finished stays as it is."""
    words = ["-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml", "--local", "--runs"]
    words += [str(tmp_path), "--sweep", "model.objective.segments.0.scale=0.95,0.4"]
    command = [
        sys.executable,
        str(ROOT / "launch" / "submit"),
        *words,
        "--",
        "--data.num_workers=0",
    ]
    records = []
    for _ in range(times):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert "scale=0.95: must be in [0, 0.9) for IntermediateHead" in done.stderr
        assert "1 of 2 finished\nnot finished: run 0 (1)" in done.stdout
        run = tmp_path / "digits_w2s+tiny+scale=0.4"
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [run]
        records.append((run / "environment.json").read_bytes())
        config = yaml.safe_load((run / "config.yaml").read_text())
        segments = config["model"]["objective"]["init_args"]["segments"]
        assert [each["init_args"]["scale"] for each in segments] == [0.4, 0.1]
    assert records == [records[0]] * times

"""`launch/` on a real SLURM: faults rows 1 and 6, and jobs that run the code they were given."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from slurm_cluster import Cluster, require_slurm, slurm_cluster, wait_until
from test_resume import assert_same, checkpoint

pytestmark = pytest.mark.slow
SITE = """\
gpus_per_node=0 tasks_per_node=1 cpus_per_task=1 memory=0 time_limit=10 warning=60
master_addr=127.0.0.1 # n1 and n2 are no names of machines
options=()
setup() {{
    export PATH={here}:{python}:$PATH OMP_NUM_THREADS=1
}}
"""
CONFIGS = ("-c", "configs/digits_w2s.yaml", "-c", "tests/tiny.yaml")
STEPS = 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def project(digits: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of this working tree, which tests may edit, with the digits' shards."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    for name in subprocess.check_output(command, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git = ["git", "-C", str(folder), "-c", "user.name=test", "-c", "user.email=test@test"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    shutil.copytree(ROOT / "data" / "digits", folder / "data" / "digits")
    return folder


@pytest.fixture
def submit(cluster: Cluster, project: Path, tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """Run `launch/submit`; gives the number of the job, and the command of each run."""
    site = tmp_path / "site.sh"
    site.write_text(SITE.format(here=tmp_path, python=Path(sys.executable).parent))

    def run(*options: str) -> tuple[str, list[str]]:
        done = subprocess.run(
            ["launch/submit", *CONFIGS, *options],
            cwd=project,
            env=cluster.environment | {"W2S_SITE": str(site)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        print(done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines()]
        commands = [line for line in lines if line.startswith("lightning ")]
        return lines[-1].removeprefix("submitted "), commands

    return run


def steps(run: Path) -> int:
    """The last step that metrics.csv has."""
    path = run / "metrics.csv"
    lines = path.read_text().splitlines() if path.is_file() else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0


def starts(run: Path) -> list[dict]:
    return json.loads((run / "environment.json").read_text())


def test_preempted_twice_equals_uninterrupted(command, cluster, project: Path, submit):
    """Two nodes: a signal, a requeue while running, edits of the checkout; the same bits."""
    options = [f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={STEPS}"]
    options += [f"--checkpoint.every_n_train_steps={STEPS}", "--data.num_workers=1"]
    run = project / "runs" / "digits_w2s+tiny"
    job, commands = submit("--nodes", "2", "--", *options)
    # Whoever imports the checkout from now on fails, and so does who reads its config.
    (project / "w2s_train" / "__init__.py").write_text("raise SystemExit('not the copy')\n")
    (project / "tests" / "tiny.yaml").write_text("no: config\n")

    wait_until(lambda: steps(run) > 20, 300, "step 20")
    cluster.run("scancel", "-s", "USR1", job)
    cluster.wait_for(job, "PENDING", 120)
    stopped = steps(run)
    assert checkpoint(run)["global_step"] == stopped < STEPS
    wait_until(lambda: steps(run) > stopped + 20, 300, f"step {stopped + 20}")
    assert cluster.job(job)["JobState"] == "RUNNING"
    cluster.run("scontrol", "requeue", job)
    record = cluster.wait_for(job, "COMPLETED", 400)
    subprocess.run(["git", "-C", str(project), "checkout", "-q", "."], check=True)

    assert (record["Restarts"], record["ExitCode"], record["NumNodes"]) == ("2", "0:0", "2")
    assert checkpoint(run)["global_step"] == STEPS
    log = (project / "runs" / ".slurm" / f"digits_w2s+tiny-{job}.log").read_text()
    assert "ended with status 75\nstatus 75: back into the queue" in log
    assert "ended with status 0" in log
    print(log)
    logs = [(run / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert len(list((run / "logs").iterdir())) == 2
    assert logs[0].count("going on from") == 2 and "stopped at step" in logs[0]
    said = [start["command"][1:] for start in starts(run)]
    assert said == 3 * [shlex.split(commands[0])[1:]]
    assert [start["processes"] for start in starts(run)] == [2, 2, 2]
    (code,) = (run / "code").iterdir()
    assert starts(run)[0]["command"][0] == str(code / "w2s_train" / "__main__.py")
    commit = (code / "COMMIT").read_text().strip()
    assert {start["git_commit"] for start in starts(run)} == {commit} and "dirty" not in commit
    assert not run.with_name(f"{run.name}.1").exists()  # no run is moved aside

    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    assert_same(checkpoint(command("fit", *options, *two)), checkpoint(run))


@pytest.mark.long
def test_an_array_of_seeds(cluster, project: Path, submit):
    """One task per value and seed, each in a folder of its own; their checkpoints are scored."""
    sweep = ["--sweep", "model.objective.segments.0.scale=0.25", "--seeds", "0", "1"]
    job, commands = submit(*sweep, "--array", "%1", "--", "--data.num_generated=64")
    runs = [project / "runs" / f"digits_w2s+tiny+scale=0.25-seed{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        cluster.wait_for(f"{job}_{seed}", "COMPLETED", 400)
        assert [start["command"][1:] for start in starts(run)] == [shlex.split(commands[seed])[1:]]
        assert checkpoint(run)["global_step"] == 6
    one, other = (checkpoint(run)["state_dict"] for run in runs)
    assert any(not other[name].equal(value) for name, value in one.items())

    settings = torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)
    segments = settings["hyper_parameters"]["objective"]["init_args"]["segments"]
    assert [each["init_args"]["scale"] for each in segments] == [0.25, 0.1]

    job, _ = submit("--evaluate", "last", *sweep, "--", "--data.num_generated=64")
    for seed, run in enumerate(runs):
        cluster.wait_for(f"{job}_{seed}", "COMPLETED", 400)
        scores = json.loads((run / "scores.json").read_text())
        assert [score["step"] for score in scores] == [3, 6, 6]
        assert scores[1]["value"] == scores[2]["value"]
        assert (run / "logs" / "evaluate-rank-0.log").is_file()


def test_the_first_failure_decides(cluster, project: Path, submit, tmp_path: Path):
    """One process ends with 77 and srun ends the other, which has 143: the job ends with 77.

    And it ends so for good: what diverged, or is a mistake, is not put back into the queue.
    """
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\n[ $SLURM_PROCID = 1 ] && exit 77\nsleep 60\n")
    python.chmod(0o755)
    launcher = tmp_path / "launcher"
    launcher.write_text(
        f'#!/bin/bash\necho "$@" >{tmp_path}/launched-$SLURM_PROCID\nexec "${{@:2}}"\n'
    )
    launcher.chmod(0o755)
    options = ["--launcher", f"{launcher} --nv", "--srun-args", "--export=ALL"]
    options += ["--runs", str(tmp_path / "runs"), "--", "--trainer.max_steps=1"]
    job, _ = submit("--nodes", "2", *options)
    record = cluster.wait_for(job, "FAILED", 120)
    assert (record["ExitCode"], record["Restarts"]) == ("77:0", "0")
    for rank in (0, 1):
        launched = (tmp_path / f"launched-{rank}").read_text()
        assert launched.startswith("--nv python -m w2s_train fit -c ")

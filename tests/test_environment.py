"""What a machine may lack, or have left in the environment: each ends in one line, or does not
matter.
"""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from refusals import refusal
from shard_files import write_latents

from w2s_train.command.processes import check_processes, cluster_environments
from w2s_train.errors import UserError
from w2s_train.features.base import fetched
from w2s_train.files import NO_LOCKS, expanded, locked
from w2s_train.prepare import engine
from w2s_train.running.record import Record
from w2s_train.scores import append_scores
from w2s_train.shards import Storage
from w2s_train.shards.index import find_shards

LAUNCHERS = (
    "SLURM_",
    "TORCHELASTIC_",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "RANK",
    "WORLD_SIZE",
    "NODE_",
)


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch):
    """Set variables of the environment, beside none of a launcher."""
    for name in os.environ:
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)

    def change(**values: object) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return change


def check(devices: int, nodes: int = 1) -> list[str]:
    """The environments that the trainer is given, by the names of their classes."""
    trainer: Any = SimpleNamespace(num_devices=devices, num_nodes=nodes)
    found = cluster_environments()
    check_processes(trainer)
    return [type(each).__name__ for each in found]


# ---- launchers -------------------------------------------------------------------------------


def test_nobody_has_started_it(variables):
    assert check(1) == check(2) == check(2, 2) == []


def slurm(tasks: int, **changes: object) -> dict[str, object]:
    return {"SLURM_JOB_ID": 7, "SLURM_NTASKS": tasks, "SLURM_NNODES": 1} | changes


STEP: dict[str, object] = dict.fromkeys(
    ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), 0
)


def test_a_shell_of_several_tasks(variables):
    """`salloc -n 4`, and `lightning fit` without srun."""
    variables(**slurm(4, SLURM_JOB_NAME="mine"))
    with pytest.raises(UserError, match="SLURM_NTASKS=4: must be started by srun.*env -u"):
        check(1)
    variables(SLURM_PROCID=0)  # a script has it, too
    with pytest.raises(UserError, match="SLURM_NTASKS=4: must be started by srun"):
        check(4)
    variables(**STEP | {"SLURM_STEP_NUM_TASKS": 1})  # so has a shell that is a step of its own
    with pytest.raises(UserError, match="SLURM_NTASKS=4: must be started by srun"):
        check(4)


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_that_lightning_knows(variables, name: str):
    variables(**slurm(4, SLURM_JOB_NAME=name))
    assert check(1) == check(2) == []
    variables(**STEP | {"SLURM_PROCID": 1})
    with pytest.raises(UserError, match=f"SLURM_JOB_NAME={name}: .* process 1 .* before srun"):
        check(2)


def test_tasks_in_a_shell(variables):
    """`salloc -n 2 --ntasks-per-node=2`, and `srun lightning fit` in it."""
    variables(**slurm(2, SLURM_JOB_NAME="interactive", SLURM_NTASKS_PER_NODE=2))
    assert check(1) == []
    variables(**STEP | {"SLURM_STEP_NUM_TASKS": 2})
    assert check(2) == ["SLURMEnvironment"]
    with pytest.raises(UserError, match="trainer.devices=1: must be 2, as many as SLURM"):
        check(1)


def test_a_shell_of_one_task(variables):
    """Works as a plain run, also without the variables of a step."""
    variables(**slurm(1))
    assert check(1) == ["LightningEnvironment"]
    with pytest.raises(UserError, match="trainer.devices=2: must be 1"):
        check(2)


def test_tasks_of_a_node_are_not_devices(variables):
    variables(**slurm(1, SLURM_NTASKS_PER_NODE=1) | STEP)
    assert check(1) == ["LightningEnvironment"]
    with pytest.raises(UserError, match=r"devices=2: must be 1.* \(--ntasks-per-node=1\)"):
        check(2)
    variables(SLURM_NTASKS=4, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=2)
    assert check(2, 2) == ["SLURMEnvironment"]
    with pytest.raises(UserError, match="trainer.num_nodes=1: must be 2.* --trainer.num_nodes 2"):
        check(2)
    with pytest.raises(UserError, match="trainer.devices=4: must be 2"):
        check(4)


def test_tasks_that_are_not_given_per_node(variables):
    variables(**slurm(2) | STEP)
    with pytest.raises(UserError, match="SLURM_NTASKS=2: must be given per node"):
        check(2)


def test_a_first_machine_that_nobody_knows(variables):
    """Processes would wait for each other for ten minutes."""
    variables(**slurm(2, SLURM_NTASKS_PER_NODE=2, SLURM_NODELIST="n[1-2].invalid") | STEP)
    with pytest.raises(UserError, match="MASTER_ADDR=n1.*: must be a name or an address of the"):
        check(2)
    variables(MASTER_ADDR="127.0.0.1")
    assert check(2) == ["SLURMEnvironment"]


def torchrun(processes: int, here: int) -> dict[str, object]:
    known = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": here}
    return known | {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0}


def test_processes_of_torchrun(variables):
    variables(**torchrun(2, 2), SLURM_NTASKS=4)
    assert check(2) == []
    with pytest.raises(UserError, match=r"devices=1: must be 2.*torchrun.*LOCAL_WORLD_SIZE=2"):
        check(1)
    with pytest.raises(UserError, match="trainer.num_nodes=2: must be 1"):
        check(2, 2)
    variables(**torchrun(1, 1))
    with pytest.raises(UserError, match="trainer.devices=2: must be 1.*have 2 started"):
        check(2)
    variables(**torchrun(4, 2))
    assert check(2, 2) == []
    with pytest.raises(UserError, match=r"num_nodes=1: must be 2.* \(WORLD_SIZE=4\)"):
        check(2)


def test_processes_that_somebody_has_started(variables):
    variables(LOCAL_RANK=0, WORLD_SIZE=2)
    assert check(2) == []
    with pytest.raises(UserError, match="WORLD_SIZE=2: must be trainer.devices=1 times"):
        check(1)


@pytest.mark.parametrize(
    "name, value, rule",
    [
        ("SLURM_NTASKS", "4(x2)", "must be a whole number"),
        ("MASTER_PORT", "port", "must be a whole number"),
        ("MASTER_PORT", "70000", "must be in"),
        ("MASTER_ADDR", "192.0.2.1", "must be an address of this machine.*unset MASTER_ADDR"),
    ],
)
def test_what_a_shell_has_left(variables, name: str, value: str, rule: str):
    """192.0.2.1 is of documentation, and nobody's."""
    variables(**{name: value})
    with pytest.raises(UserError, match=f"{name}=.*: {rule}"):
        check(2)
    if name.startswith("MASTER"):
        assert check(1) == []


def test_an_own_address(variables):
    variables(MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    assert check(2) == []


@pytest.mark.slow
def test_the_command_refuses(digits: None, tmp_path: Path, variables):
    """Before anything is written."""
    variables(**slurm(4, SLURM_JOB_NAME="mine"))
    assert "SLURM_NTASKS=4: must be started by srun" in refusal(tmp_path / "run")
    variables(**slurm(1, SLURM_NTASKS_PER_NODE=1) | STEP)
    line = refusal(tmp_path / "run", "--trainer.devices=2", "--trainer.strategy=ddp")
    assert line.startswith("error: trainer.devices=2: must be 1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.long
def test_torchrun_and_devices(digits: None, tmp_path: Path):
    """Two processes, each of which takes itself for the only one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "w2s_train", "fit", "-c", "tests/minimal.yaml", "--trainer.devices=1"]
    done = run_as(command, tmp_path / "run")
    assert done.returncode == 1
    line = "error: trainer.devices=1: must be 2, as many as torchrun has started processes on this"
    assert line in done.stderr and "another fit" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


# ---- locks -----------------------------------------------------------------------------------


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """A file system that cannot lock."""

    def flock(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_a_lock_that_cannot_be_taken(no_locks: int, tmp_path: Path):
    """One warning for a folder, and on it goes; nothing is left that a kill would leave behind."""
    with pytest.warns(UserWarning, match=f"{tmp_path}: .*cannot lock.* no lock was taken") as told:
        for _ in range(3):
            with locked(tmp_path / "a.lock", seconds=0) as alone:
                assert not alone
    assert os.strerror(no_locks) in str(told[0].message) and no_locks in NO_LOCKS
    assert (tmp_path / "a.lock").read_bytes() == b""


def test_a_lock_that_is_taken(tmp_path: Path):
    with locked(tmp_path / "a.lock") as alone:
        assert alone
        with pytest.raises(TimeoutError), locked(tmp_path / "a.lock", seconds=0):
            pass
    with locked(tmp_path / "a.lock", seconds=0) as alone:
        assert alone


def test_everything_goes_on_without_locks(no_locks: int, tmp_path: Path):
    """Run folder, scores, cache, fetched weights and preparation; others' files stay."""
    urls = write_latents(tmp_path / "data", [3], (1, 2, 2), flip=False)
    for name in ("index.json", *(p.name for p in (tmp_path / "data").glob("*.npz"))):
        (tmp_path / "data" / name).unlink()
    left = tmp_path / "out" / "shard.tar.99.partial"
    left.parent.mkdir()
    left.touch()
    with pytest.warns(UserWarning, match="no lock was taken"):
        record = Record(tmp_path / "run")
        record.claim()
        record.release()
        append_scores(tmp_path / "run", [])
        found = find_shards([urls.replace("*", "000000")], Storage(tmp_path / "cache"))
        assert [shard.samples for shard in found] == [3]
        fetched(tmp_path / "w" / "a.bin", lambda folder: (folder / "a.bin").touch())
        with engine.Task(0, left.with_name("shard.tar"), shared=True).claimed():
            assert left.exists()  # another run may be writing it


# ---- folders ---------------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom neither the environment nor the system gives a home."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("W2S_CACHE", raising=False)

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_a_user_without_a_home(homeless: None, tmp_path: Path, monkeypatch):
    """What needs no cache asks for none."""
    write_latents(tmp_path, [3], (1, 2, 2))
    url = str(tmp_path / "train-000000.tar")
    assert find_shards([url], Storage())[0].samples == 3
    (tmp_path / "index.json").unlink()
    (tmp_path / "train-000000.npz").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"cache=None: .*data.cache or \$W2S_CACHE.*no home"):
        find_shards([url], Storage())
    with pytest.raises(UserError, match="folder=~/weights: must do without ~"):
        expanded("folder", "~/weights")
    monkeypatch.setenv("W2S_CACHE", str(tmp_path / "cache"))
    assert find_shards([url], Storage())[0].samples == 3


@pytest.mark.parametrize("kind", ["file", "below a file", "not ours"])
def test_a_cache_that_cannot_be(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "cache"
    if kind == "not ours":
        monkeypatch.setattr("w2s_train.shards.storage.os.access", lambda *_: False)
    else:
        place.touch()
    folder = place / "more" if kind == "below a file" else place
    with pytest.raises(UserError, match=rf"cache={folder}: .* data.cache or \$W2S_CACHE names"):
        Storage(folder).folder("files")


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Said before a library needs one, as some do when they are imported."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    line = refusal(tmp_path / "run")
    assert line.startswith("error: TMPDIR=") and "must be a folder that can be written" in line


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_a_run_folder_that_cannot_be(tmp_path: Path, kind: str):
    (tmp_path / "run").touch()
    folder = tmp_path / "run" / "more" if kind == "below a file" else tmp_path / "run"
    with pytest.raises(UserError, match=f"trainer.default_root_dir={folder}: must "):
        Record(folder).claim()


def run_as(
    command: list[str], folder: Path, *prefix: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout, with a folder for its run."""
    return subprocess.run(
        [*prefix, *command, f"--trainer.default_root_dir={folder}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.long
def test_a_fit_of_a_user_without_a_home(digits: None, tmp_path: Path):
    """And without a name: who may read everything, and write the folder of the run."""
    user = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"]
    user += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    user += ["env", *(f"--unset={name}" for name in ("HOME", "W2S_CACHE", "USER", "LOGNAME"))]
    if not shutil.which("setpriv") or subprocess.run([*user, "true"], check=False).returncode:
        pytest.skip("this user cannot become another one")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o777)
    command = [sys.executable, "-m", "w2s_train", "fit", "-c", "configs/digits_w2s.yaml"]
    command += ["-c", "tests/tiny.yaml"]
    done = run_as(command, tmp_path / "runs" / "run", *user)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "runs/run/checkpoints/last.ckpt").exists()
    done = run_as(command, tmp_path / "none" / "run", *user)
    line = f"error: trainer.default_root_dir={tmp_path}/none/run: must lie in a folder that can be"
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(line)

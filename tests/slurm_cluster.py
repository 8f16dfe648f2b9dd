"""A SLURM of two nodes, n1 and n2, on this machine, for the tests of launches."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("n1", "n2")
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/controller
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=tests Nodes=n1,n2 Default=YES State=UP
"""


def require_slurm() -> None:
    """Install what is missing; only who is not root skips the tests."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons need root here")
    # Debian keeps the daemons where not every user's PATH looks.
    os.environ["PATH"] += f"{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    if all(map(shutil.which, PROGRAMS)):
        return
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    for command in (["apt-get", "update", "-qq"], install):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def wait_until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something; a failed assertion says what did not come."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class Cluster:
    """The commands of a cluster that runs.

    Args:
        folder: Its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.config = str(folder / "slurm.conf")

    @property
    def environment(self) -> dict[str, str]:
        """Of commands that are to find this cluster."""
        return os.environ | {"SLURM_CONF": self.config}

    def run(self, *command: str) -> str:
        """Output of a command, which must succeed."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says about a job, such as JobState and Restarts."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, state: str, seconds: float) -> dict[str, str]:
        """Wait until a job is in a state."""
        wait_until(lambda: self.job(number)["JobState"] == state, seconds, f"{number} {state}")
        return self.job(number)


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Two nodes with two CPUs each, all of whose files lie in a folder."""
    host = socket.gethostname().partition(".")[0]
    for name in ("controller", *NODES):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=free_ports(3)))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    munged = ["munged", "--foreground", "--force", f"--key-file={key}"]
    for name in ("socket", "pid-file", "seed-file"):
        munged.append(f"--{name}={folder}/munge.{name.removesuffix('-file')}")
    cluster = Cluster(folder)
    with contextlib.ExitStack() as stack:

        def start(name: str, *command: str) -> None:
            log = stack.enter_context(open(folder / f"{name}.log", "w"))
            process = subprocess.Popen(
                command, env=cluster.environment, stdout=log, stderr=log, start_new_session=True
            )
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)

        start("munged", *munged)
        wait_until((folder / "munge.socket").exists, 10, "munged")
        start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            start(node, "slurmd", "-D", "-N", node)
        idle = ["sinfo", "-h", "-o", "%T %D"]
        wait_until(lambda: cluster.run(*idle) == "idle 2\n", 30, "two idle nodes")
        try:
            yield cluster
        finally:  # while there are daemons that can end what runs
            cluster.run("scancel", "--user=root")
            wait_until(lambda: not cluster.run("squeue", "-h"), 60, "no more jobs")

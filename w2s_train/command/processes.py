"""Who started this process, and whether as many were started as the config means.

Lightning believes what a launcher's environment says of a process, and what the config says of the
run, also where the two contradict each other: processes then take each other for strangers, or wait
for some that nobody has started.
"""

import errno
import os
import socket

from lightning import Trainer
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from w2s_train.errors import UserError

PLAIN = "`env -u SLURM_NTASKS` before the command makes it a plain run"


def cluster_environments() -> list[ClusterEnvironment]:
    """The one that the trainer is to use, where its own choice would be wrong.

    Raises:
        UserError: SLURM has several tasks, and this process is none of them.
    """
    if TorchElasticEnvironment.detect():
        return []
    if not _of_slurm():
        if number := _number("SLURM_PROCID", "0"):  # others would do the same work beside it
            raise UserError(
                f"SLURM_JOB_NAME={os.environ.get('SLURM_JOB_NAME')}: is that of a shell, and this "
                f"is process {number} of several; `export SLURM_JOB_NAME=train` before srun"
            )
        return []
    tasks = _number("SLURM_NTASKS")
    if tasks == 1:
        return [LightningEnvironment()]  # whether it is a task, a script or a shell
    if not _by_srun():
        raise UserError(
            f"SLURM_NTASKS={tasks}: must be started by srun, which makes a process of each task, "
            f"as in `srun lightning ...`; {PLAIN}"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"SLURM_NTASKS={tasks}: must be given per node, as in `srun --ntasks-per-node={tasks} "
            "--nodes=1 lightning ...`"
        )
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        _number(name)
    # Lightning would save inside the signal handler, on each process at another step.
    return [SLURMEnvironment(auto_requeue=False)]


def _of_slurm() -> bool:
    """As Lightning sees it, which takes jobs of two names for shells.

    One of them is what salloc calls a job, in which srun may have started several tasks.
    """
    name, several = os.environ.get("SLURM_JOB_NAME"), _number("SLURM_STEP_NUM_TASKS", "1") > 1
    shell = name == "bash" or (name == "interactive" and not several)
    return "SLURM_NTASKS" in os.environ and not shell


def _by_srun() -> bool:
    """Whether this is one of the tasks: a script is none, nor is a shell, a step of one task."""
    tasks = os.environ["SLURM_NTASKS"]
    step = "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", tasks) == tasks
    return step or _number("SLURM_PROCID", "0") > 0


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    shares = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    if not text.isdecimal() or (name in shares and int(text) == 0):
        raise UserError(f"{name}={text}: must be a whole number; a launcher sets it, or nobody")
    return int(text)


def check_processes(trainer: Trainer) -> None:
    """Refuse a run of another number of processes than were started, before any waits for another.

    Raises:
        UserError: It is another; says what to set.
    """
    if TorchElasticEnvironment.detect():
        here = _number("LOCAL_WORLD_SIZE", str(_number("WORLD_SIZE")))
        names = (f"LOCAL_WORLD_SIZE={here}", f"WORLD_SIZE={_number('WORLD_SIZE')}")
        _compare(trainer, here, _number("WORLD_SIZE") // here, "torchrun", names)
    elif _of_slurm():
        _check_slurm(trainer)
    elif "LOCAL_RANK" not in os.environ:
        _check_alone(trainer)
    elif (number := _number("WORLD_SIZE", "0")) not in (0, trainer.num_devices * trainer.num_nodes):
        raise UserError(
            f"WORLD_SIZE={number}: must be trainer.devices={trainer.num_devices} times "
            f"trainer.num_nodes={trainer.num_nodes}, as LOCAL_RANK says that somebody has started "
            "the processes; `unset LOCAL_RANK WORLD_SIZE` leaves that to the command"
        )


def _check_slurm(trainer: Trainer) -> None:
    tasks = _number("SLURM_NTASKS")
    here = _number("SLURM_NTASKS_PER_NODE", str(tasks))
    nodes = _number("SLURM_NNODES", str(max(1, tasks // here)))
    if not _by_srun():
        nodes = 1  # this process is alone, on its node of perhaps several
    names = (f"--ntasks-per-node={here}", f"--nodes={nodes}")
    _compare(trainer, here, nodes, "SLURM", names)
    if tasks > 1:
        machines = os.environ.get("SLURM_NODELIST", "127.0.0.1")
        first = SLURMEnvironment.resolve_root_node_address(machines)
        address = os.environ.get("MASTER_ADDR", first)
        try:
            socket.getaddrinfo(address, 0)
        except socket.gaierror as error:
            raise UserError(
                f"MASTER_ADDR={address}: must be a name or an address of the first machine, {first}"
                f", for all processes ({error.strerror})"
            ) from error


def _compare(trainer: Trainer, here: int, nodes: int, who: str, names: tuple[str, str]) -> None:
    """Devices with processes of a machine, and machines with machines."""
    ways = f"; or {PLAIN}" if who == "SLURM" else ""
    if trainer.num_devices != here:
        raise UserError(
            f"trainer.devices={trainer.num_devices}: must be {here}, as many as {who} has started "
            f"processes on this machine ({names[0]}); --trainer.devices {here}, or have "
            f"{trainer.num_devices} started{ways}"
        )
    if trainer.num_nodes != nodes:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: must be {nodes}, as many machines as {who} "
            f"has ({names[1]}); --trainer.num_nodes {nodes}{ways}"
        )


def _check_alone(trainer: Trainer) -> None:
    """A process that starts the others itself: what is left in its shell may be another run's."""
    if trainer.num_devices * trainer.num_nodes == 1:
        return
    if "MASTER_PORT" in os.environ and not 0 < _number("MASTER_PORT") < 2**16:
        raise UserError(f"MASTER_PORT={_number('MASTER_PORT')}: must be in [1, 65535]")
    address = os.environ.get("MASTER_ADDR", "")
    if address and trainer.num_nodes == 1 and (reason := _elsewhere(address)):
        raise UserError(
            f"MASTER_ADDR={address}: must be an address of this machine, whose processes are alone "
            f"({reason}); `unset MASTER_ADDR` leaves it to the command"
        )


def _elsewhere(address: str) -> str:
    """Why an address is none of this machine; empty if it is one."""
    try:
        kind, *_, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as mine:
            mine.bind(place)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            return error.strerror or str(error)
    return ""

"""Optimizer, schedule and averages: fit for the length of a run, and as the config says now."""

import warnings
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

from w2s_train.errors import UserError
from w2s_train.loading import check_optimizer, optimizer_over

IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
SCHEDULED = ("lr", "betas", "momentum")  # what schedulers change
MOSTLY_INITIAL = 0.1  # share of the initial weights in an average, beyond which it says little


def check_schedule(module: Any, max_steps: int) -> None:
    """Refuse a scheduler that does not last, and warn of a cosine that rises again.

    Args:
        module: With ``optimizer`` and ``scheduler``, which are called on a parameter of their own.
        max_steps: Optimizer steps of the run; -1 is no end.

    Raises:
        UserError: It ends before the run does, or waits for a score.
    """
    if module.scheduler is None:
        return
    scheduler = module.scheduler(check_optimizer(module.optimizer))
    name = type(scheduler).__name__
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            f"model.scheduler={name}: must depend on the step alone, such as "
            "torch.optim.lr_scheduler.CosineAnnealingLR; lower model.optimizer.init_args.lr with "
            "--ckpt_path last instead"
        )
    if max_steps < 1:
        return
    try:
        _replay(scheduler, 1, begin=max_steps - 1)
    except ValueError as error:
        raise UserError(
            f"model.scheduler={name}: must last trainer.max_steps={max_steps} steps; "
            f"{' '.join(str(error).split())}"
        ) from error
    if isinstance(scheduler, CosineAnnealingLR) and scheduler.T_max < max_steps:
        warnings.warn(
            f"model.scheduler.init_args.T_max={scheduler.T_max}: is below "
            f"trainer.max_steps={max_steps}; the rate rises again after it",
            stacklevel=2,
        )


def check_averages(module: Any, max_steps: int) -> None:
    """Warn of averages that are mostly the initial weights when the run ends.

    An average with decay d holds the share d**steps of the weights that it began with.
    """
    for average in (module.ema, *module.more_ema):
        share = average.decay**max_steps if max_steps > 0 else 0.0
        if share > MOSTLY_INITIAL:
            fitting = MOSTLY_INITIAL ** (3 / max_steps)
            warnings.warn(
                f"model.ema_decay={average.decay:g}: {share:.0%} of the average is still the "
                f"initial weights after {max_steps} steps; {fitting:.4g} leaves 0.1 %, and "
                "--model.scored_weights=[raw] scores the weights themselves",
                stacklevel=2,
            )


def check_switches(module: Any, device: torch.device) -> None:
    """Refuse implementations of an optimizer that take no step.

    Raises:
        UserError: It is for gradients through the step, or for graphs of another device.
    """
    given = _arguments(module.hparams.get("optimizer"))
    cpu = device.type == "cpu" and not given.get("fused")
    for name, refused in (("differentiable", True), ("capturable", cpu)):
        if given.get(name) and refused:
            where = " on the CPU" if name == "capturable" else ""
            raise UserError(f"model.optimizer.init_args.{name}=true: must be false{where}")


class Settings:
    """Lets optimizer and scheduler of a run that goes on be those of the config.

    Lightning restores their settings with their states. Where the config's differ from those that
    the checkpoint was made with, the config's apply: moments and counters stay, and the schedule is
    made anew and replayed to the step at hand. Where they do not, all is restored, bit for bit.
    """

    def __init__(self) -> None:
        self.arguments: list[str] = []  # of the optimizer, that differ
        self.rescheduled = False

    def load(self, checkpoint: dict[str, Any], module: Any) -> None:
        """Compare; the state of another schedule is taken out of the checkpoint."""
        before, now = checkpoint.get("hyper_parameters") or {}, module.hparams
        theirs, ours = (_arguments(config.get("optimizer")) for config in (before, now))
        self.arguments = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
        _check_state(checkpoint, module)
        for name, (stored, wanted) in _in_effect(checkpoint, module).items():
            if name not in self.arguments:  # the config of a start that did not apply it
                self.arguments.append(name)
                rank_zero_info(f"model.optimizer: {name} is {wanted}, was {stored} in effect")
        self.rescheduled = before.get("scheduler") != now.get("scheduler") or (
            not set(self.arguments).isdisjoint(SCHEDULED)
        )
        if self.rescheduled:
            checkpoint["lr_schedulers"] = []

    def apply(self, trainer: Trainer, module: Any) -> None:
        """After everything was restored."""
        if not self.arguments and not self.rescheduled:
            return
        optimizer = trainer.optimizers[0]
        fresh = optimizer_over(module)
        names = {*self.arguments, *(SCHEDULED if self.rescheduled else ())}
        for group, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            group.update({name: new[name] for name in names if name in new})
            if self.rescheduled:  # what schedulers note there
                for name in group.keys() - new.keys():
                    del group[name]
        if self.rescheduled and module.scheduler is not None:
            scheduler = module.scheduler(optimizer)
            _replay(scheduler, trainer.global_step)
            trainer.lr_scheduler_configs[0].scheduler = scheduler
        self.arguments, self.rescheduled = [], False


def _replay(scheduler: LRScheduler, steps: int, begin: int = 0) -> None:
    scheduler.last_epoch += begin
    with warnings.catch_warnings():  # it asks for steps of the optimizer, which were taken before
        warnings.filterwarnings("ignore", ".*lr_scheduler.step()")
        for _ in range(steps):
            scheduler.step()


def _check_state(checkpoint: dict[str, Any], module: Any) -> None:
    """Refuse a state that lacks what a setting that was switched on reads, such as a momentum.

    States are compared of two steps with a parameter of their own: the checkpoint's parameters have
    other shapes, which some optimizers' states depend on.
    """
    now, before = (check_optimizer(module.optimizer) for _ in range(2))
    theirs = checkpoint["optimizer_states"][0]["param_groups"][0]
    switched = {
        name: theirs[name]
        for name, value in now.param_groups[0].items()
        if name in now.defaults and name in theirs and bool(theirs[name]) != bool(value)
    }
    if isinstance(now, torch.optim.SGD) or switched.keys() <= {*IMPLEMENTATION}:
        return  # it makes what it lacks; or nothing was switched on
    before.param_groups[0].update(switched)
    if missing := sorted(_state(now).keys() - _state(before).keys()):
        raise UserError(
            f"model.optimizer: must find {', '.join(missing)} in the state of the checkpoint, "
            "which another optimizer, or another kind of it, has written"
        )


def _state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """That of a trial's parameter after a step."""
    (group,) = optimizer.param_groups
    group.update({name: False for name in IMPLEMENTATION if name in group})
    (parameter,) = group["params"]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step(lambda: 0.0)
    return optimizer.state[parameter]


def _in_effect(checkpoint: dict[str, Any], module: Any) -> dict[str, tuple[Any, Any]]:
    """Settings of an optimizer's state that are not those of the config: theirs, and ours."""
    optimizer = check_optimizer(module.optimizer)
    if module.scheduler is not None:
        module.scheduler(optimizer)
    ours, theirs = optimizer.param_groups[0], checkpoint["optimizer_states"][0]["param_groups"][0]
    found = {}
    for name in optimizer.defaults:
        key = name
        if module.scheduler is not None and name in SCHEDULED:
            key = f"initial_{name}"  # what it begins with: the other changes by itself
        if key in ours and key in theirs and name not in IMPLEMENTATION:
            stored, wanted = (
                tuple(x) if isinstance(x, list) else x for x in (theirs[key], ours[key])
            )
            if stored != wanted:
                found[name] = (stored, wanted)
    return found


def _arguments(config: Any) -> dict[str, Any]:
    return (config or {}).get("init_args") or {}

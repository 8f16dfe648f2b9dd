"""DDP whose processes watch each other, and do not outlive each other."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch import Tensor

from w2s_train.errors import PEER_LOST, Stopped, one_line
from w2s_train.running.watch import GRACE, Watch, say

MEET = 600.0  # seconds that processes have to meet, with all that they import before
PARENT = "W2S_PARENT"  # the process that started this one


class WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine.

    Lightning's own has a thread that kills everything as soon as one process ends with a status
    other than 0. Here a process that loses another says which, and one that saves is not disturbed.
    """

    def launch(
        self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Start them, where nobody else does, and call ``function``."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self.parent = int(os.environ.pop(PARENT, "0"))
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Until all processes have met, one that ends before would be waited for."""
        met = threading.Event()
        threading.Thread(target=self._guard, args=(met,), daemon=True).start()
        try:
            yield
        finally:
            met.set()

    def _guard(self, met: threading.Event) -> None:
        """End with the process that started this one, and before the meeting with any of them."""
        while self.parent or not met.wait(0.5):
            if not met.is_set():
                for child in self.procs:
                    if child.poll() is not None:
                        self._end(child)
            if self.parent and os.getppid() != self.parent:
                time.sleep(GRACE if met.is_set() else 0)  # the watch says more, or all is done
                say("the first process has ended, so does this one")
                os._exit(PEER_LOST)
            time.sleep(0.5)

    def _end(self, child: subprocess.Popen) -> None:
        status = child.returncode
        say(f"process {child.pid} ended with status {status} before the processes met")
        for each in self.procs:
            each.kill()
        os._exit(status if status > 0 else PEER_LOST)


class WatchedDDP(DDPStrategy):
    """DDP whose processes watch each other from the moment when they have met.

    Gradients are views of the buckets that are sent. The graph of the loss is the same at every
    step: which gradients come is not looked up.

    Args:
        watch: Of this process.
        start_method: How processes start where nobody else starts them.
        find_unused_parameters: Look for them at every step, in a graph that changes.
    """

    def __init__(
        self, watch: Watch, start_method: Any = "popen", find_unused_parameters: bool = False
    ) -> None:
        # The watch comes first: it says who it was, and it knows of work that takes long.
        super().__init__(
            timeout=timedelta(seconds=max(2 * watch.timeout, MEET)),
            start_method=start_method,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
        )
        self.find_unused_parameters = find_unused_parameters
        self.watch = watch

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        launcher = self._launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            self._launcher = WatchedLauncher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )

    def setup_environment(self) -> None:
        """Meet, and watch from here on: preparing the data comes next."""
        launcher = self._launcher
        local = launcher.meeting() if isinstance(launcher, WatchedLauncher) else None
        try:
            with local or contextlib.nullcontext():
                super().setup_environment()
        except torch.distributed.DistError as error:
            raise Stopped(f"not all processes came; {one_line(error)}", PEER_LOST) from error
        self.watch.start(self.global_rank, os.environ["MASTER_ADDR"], self._exchange)

    def _setup_model(self, model: torch.nn.Module) -> Any:
        """Take the graph for static where every batch is a step.

        Where the first backward pass only accumulates, torch 2.15 ends the run ("expect_autograd_
        hooks_ INTERNAL ASSERT FAILED"); kept from sending then, it was seen to send in the first
        step only. To send all parts of the first step is right but for rounding, with which a run
        that goes on would no longer be the uninterrupted one bit for bit.
        """
        assert self.lightning_module is not None
        accumulates = self.lightning_module.trainer.accumulate_grad_batches > 1
        self._ddp_kwargs["static_graph"] = not (self.find_unused_parameters or accumulates)
        return super()._setup_model(model)

    def _exchange(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everyone, value)
        return everyone

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Count it: who waits here is ahead of who is not here yet."""
        self.watch.meet()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self.watch.meet()
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        self.watch.meet()
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        self.watch.meet()
        return super().all_gather(tensor, group, sync_grads)

    def on_exception(self, exception: BaseException) -> None:
        """After all callbacks: tell the others, or end with them."""
        super().on_exception(exception)
        self.watch.end(exception)

    def teardown(self) -> None:
        """Nothing is waited for any more."""
        self.watch.finish()
        super().teardown()


def watched_strategies(watch: Watch) -> None:
    """Every name of Lightning's DDP means the watched one from now on."""
    for name, entry in list(StrategyRegistry.items()):
        if entry["strategy"] in (DDPStrategy, WatchedDDP):
            about = {"description": entry["description"], **entry["init_params"], "watch": watch}
            StrategyRegistry.register(name, WatchedDDP, override=True, **about)

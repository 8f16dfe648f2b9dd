"""A trace of a few steps, and the operations that take longest in them."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from w2s_train.errors import UserError
from w2s_train.files import atomic_write

SKIPPED, WARM, RECORDED = 10, 3, 5  # optimizer steps, one after the other
NEEDED = SKIPPED + WARM + RECORDED
ROWS = 10


class Profile(Callback):
    """Writes ``profile/trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``table.txt``.

    The first process records 5 steps after 13 others; then the run goes on as if nothing had been.
    The table has the ten operations with the longest own time: of kernels on a GPU, else on the
    host.
    """

    profiler: torch.profiler.profile | None = None  # while it is at work

    @staticmethod
    def check(max_steps: int) -> None:
        """Refuse a run that is too short, before any work."""
        if 0 <= max_steps < NEEDED:
            raise UserError(f"trainer.max_steps={max_steps}: must be at least {NEEDED} to profile")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if 0 <= trainer.max_steps < trainer.global_step + NEEDED:
            rank_zero_info(f"fewer than {NEEDED} steps are left: nothing is profiled")
            return
        self.folder = Path(trainer.default_root_dir) / "profile"
        self.on_gpu = pl_module.device.type == "cuda"
        on_gpu = [ProfilerActivity.CUDA] if self.on_gpu else []
        n = trainer.accumulate_grad_batches
        self.profiler = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=torch.profiler.schedule(
                wait=SKIPPED * n, warmup=WARM * n, active=RECORDED * n, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self.batches = NEEDED * n
        self.profiler.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.profiler is None:
            return
        self.batches -= 1
        self.profiler.step()
        if self.batches == 0:
            self._stop()
            rank_zero_info(f"profile of {RECORDED} steps: {self.folder}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that ends earlier has no profile."""
        if self.profiler is not None:
            self.profiler.on_trace_ready = None
            self._stop()
            rank_zero_info("the run ended before it was profiled")

    def _stop(self) -> None:
        assert self.profiler is not None
        self.profiler.stop()
        self.profiler = None

    def _write(self, profiler: torch.profiler.profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json"
        partial = trace.with_name("partial.json")
        profiler.export_chrome_trace(str(partial))
        partial.replace(trace)
        with atomic_write(self.folder / "table.txt") as file:
            file.write(table(profiler, on_gpu=self.on_gpu).encode())


def table(profiler: torch.profiler.profile, *, on_gpu: bool) -> str:
    """The heaviest operations, one a line below the heading: milliseconds and calls per step.

    Args:
        profiler: Has recorded `RECORDED` steps.
        on_gpu: Kernels of the GPU, by their time there.
    """
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    times = [
        ((e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000, e.count, e.key)
        for e in profiler.key_averages()
        if e.device_type == kind and not e.is_user_annotation
    ]
    whole = sum(ms for ms, _, _ in times)
    lines = ["ms/step   share   calls/step   operation"]
    for ms, count, name in sorted(times, reverse=True)[:ROWS]:
        share = f"{ms / whole:.1%}"
        lines.append(f"{ms / RECORDED:7.3f}  {share:>6}  {count / RECORDED:11.1f}   {name}")
    return "\n".join(lines) + "\n"

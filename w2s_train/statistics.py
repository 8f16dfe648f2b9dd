"""Training statistics that stay on the device between two log entries."""

from collections.abc import Callable

import torch
from torch import Tensor

from w2s_train.segment import Statistic


class RunningStatistics:
    """Sums and maxima of `Statistic`s over the steps since the last log entry.

    Nothing is read back to the host before `compute`.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> (sum, count)
        self.maxima: dict[str, Tensor] = {}
        self.roots: set[str] = set()

    @torch.no_grad()
    def add(self, statistics: dict[str, Statistic]) -> None:
        """Take in one evaluation of the objective."""
        for name, statistic in statistics.items():
            values = statistic.values.float() * statistic.mask
            if statistic.reduce == "max":
                largest = values.max()
                known = self.maxima.get(name, largest)
                self.maxima[name] = torch.maximum(known, largest)
                continue
            if statistic.reduce == "rms":
                self.roots.add(name)
            pair = torch.stack([values.sum(), statistic.mask.sum().float()])
            self.sums[name] = self.sums.get(name, torch.zeros_like(pair)) + pair

    def compute(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The numbers over all processes, by name; then start anew.

        Args:
            reduce: Reduces a tensor over processes, given "sum" or "max".
        """
        result = {}
        if self.sums:
            totals = reduce(torch.stack(list(self.sums.values())), "sum").tolist()
            for name, (total, count) in zip(self.sums, totals, strict=True):
                if count:  # no row fell into the range since the last entry
                    result[name] = (total / count) ** (0.5 if name in self.roots else 1)
        if self.maxima:
            largest = reduce(torch.stack(list(self.maxima.values())), "max").tolist()
            result |= dict(zip(self.maxima, largest, strict=True))
        self._clear()
        return result

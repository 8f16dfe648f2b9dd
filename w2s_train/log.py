"""Training statistics that stay on the device between two log entries."""

import itertools
from collections.abc import Callable, Sequence

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
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names (K) -> (2, K): sums and counts
        self.maxima: dict[tuple[str, ...], Tensor] = {}  # names (K) -> (K,)
        self.roots: set[str] = set()

    @torch.no_grad()
    def add(self, statistics: Sequence[Statistic], good: bool | Tensor = True) -> None:
        """Take in one evaluation of the objective.

        Args:
            statistics: Of it.
            good: Whether it counts; a tensor () where the host does not know yet.
        """
        if good is False:
            return
        for each in statistics:
            mask = each.mask & good
            values = torch.where(mask, each.values.float(), 0.0)
            if each.reduce == "max":
                largest = values.amax(1)
                known = self.maxima.get(each.names)
                self.maxima[each.names] = (
                    largest if known is None else torch.maximum(known, largest)
                )
                continue
            if each.reduce == "rms":
                self.roots.update(each.names)
            sums = torch.stack([values.sum(1), mask.sum(1).expand(len(values)).float()])
            known = self.sums.get(each.names)
            self.sums[each.names] = sums if known is None else known + sums

    def compute(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The numbers over all processes, by name; then start anew.

        Args:
            reduce: Reduces a tensor over processes, given "sum" or "max".
        """
        result = {}
        if self.sums:
            totals = reduce(torch.cat(list(self.sums.values()), 1), "sum").tolist()
            names = itertools.chain(*self.sums)
            for name, total, count in zip(names, *totals, strict=True):
                if count:  # no row fell into the range since the last entry
                    result[name] = (total / count) ** (0.5 if name in self.roots else 1)
        if self.maxima:
            largest = reduce(torch.cat(list(self.maxima.values())), "max").tolist()
            result |= dict(zip(itertools.chain(*self.maxima), largest, strict=True))
        self._clear()
        return result

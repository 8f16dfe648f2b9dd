"""Training numbers that stay on the device between two log entries."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


class Log:
    """Sums and maxima over rows and steps since the last log entry.

    How a number is reduced is the end of its name: ``_max`` is the largest of values that are at
    least 0, ``_sum`` their sum, ``_rms`` the root of the mean of values, which then are squares,
    and anything else their mean. Nothing is read back to the host before `read`.
    """

    def __init__(self) -> None:
        # Of the optimizer step under way: what `add` was given.
        self.step: list[tuple[tuple[str, ...], Tensor, Tensor]] = []
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names (K) -> (2, K): sums and counts
        self.maxima: dict[tuple[str, ...], Tensor] = {}  # names (K) -> (K,)

    def add(self, names: tuple[str, ...], values: Tensor, mask: Tensor | None = None) -> None:
        """Note K numbers, all of one kind, for each of n rows, of the step under way.

        Args:
            names: K.
            values: (K, n), or (1, n) for all.
            mask: (K, n) bool, or (1, n) for all: the rows that count; None is every row.
        """
        if values.shape[1]:
            every = torch.ones_like(values[:1], dtype=torch.bool)
            self.step.append((names, values.detach(), every if mask is None else mask))

    @torch.no_grad()
    def commit(self, good: bool | Tensor = True) -> None:
        """End the step.

        Args:
            good: Whether it counts; a tensor () bool where the host does not know yet.
        """
        entries, self.step = self.step, []
        for names, values, rows in entries if good is not False else ():
            mask = rows & good
            values = torch.where(mask, values.float(), 0.0)
            if names[0].endswith("_max"):
                largest, known = values.amax(1), self.maxima.get(names)
                self.maxima[names] = largest if known is None else torch.maximum(known, largest)
                continue
            sums = torch.stack([values.sum(1), mask.sum(1).expand(len(values)).float()])
            known = self.sums.get(names)
            self.sums[names] = sums if known is None else known + sums

    def read(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The numbers over all processes, by name; then start anew.

        Args:
            reduce: Reduces a tensor over processes, given "sum" or "max".
        """
        result = {}
        if self.sums:
            totals = reduce(torch.cat(list(self.sums.values()), 1), "sum").tolist()
            names = itertools.chain(*self.sums)
            for name, total, count in zip(names, *totals, strict=True):
                if name.endswith("_sum"):
                    result[name] = total
                elif count:  # no row fell into the range since the last entry
                    result[name] = (total / count) ** (0.5 if name.endswith("_rms") else 1)
        if self.maxima:
            largest = reduce(torch.cat(list(self.maxima.values())), "max").tolist()
            result |= dict(zip(itertools.chain(*self.maxima), largest, strict=True))
        self._clear()
        return result

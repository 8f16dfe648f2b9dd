"""The guideability of a weak prediction.

With d = strong - weak at noisy samples and v the data's velocity,

    gamma = sum <d, v - strong> / sum |d|^2,        over rows, steps and processes,

is the a that minimizes E|strong + a d - v|^2: what part of the remaining error lies along d. At the
fixed point of a target with one source and scale w it is -w; with omega, (1 - kappa) / omega - 1.
Its standard error is sqrt(sum (n - gamma q)^2) / sum q, with n and q the terms of a row. (Sums, not
a mean of ratios, whose deviation is several times larger.) The progress is

    -sum <d, v - strong> / sum w |d|^2,        1 at the fixed point, whatever scales were drawn.

Where several sources act on a row their differences are correlated; then the joint regression of
v - strong on all d_k is solved, and for the progress that on all w_k d_k. With the joint gamma_k of
a fixed point, -w_k, the guidance reached by each is 1 + w_k / (1 - W), W their sum. Its standard
errors are those of White (1980): with G and b the sums over rows and e = b - G gamma of a row, the
roots of the diagonal of G^-1 (sum e e') G^-1. Differences that are alike but for one part in
``ALIKE`` say nothing about each: then there is no number.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from w2s_train.log import Log

PARTS = ["", *(f"tenth_{k / 10:g}-{(k + 1) / 10:g}/" for k in range(10))]  # of time
MARK = "|"  # in names of sums that become numbers here
ALIKE = 1000  # condition of their correlations


class Difference(NamedTuple):
    """What one segment found at some rows (n) of a batch of B."""

    name: str
    rows: slice | Tensor  # a range, or an index (n,)
    difference: Tensor  # strong - weak, (n, C, H, W)
    residual: Tensor  # v - strong, (n, C, H, W)
    inside: Tensor  # (n,) bool, the rows that it acted on
    goal: Tensor | None  # (n,), minus the guideability of the fixed point; None where it has none
    drawn: bool = False  # whether others may act on the same rows


def note(found: Sequence[Difference], t: Tensor, log: Log) -> None:
    """Log the sums that `finish` makes guideabilities of.

    Args:
        found: By the segments, at one pass of the network.
        t: Timesteps (B,).
        log: Takes the sums.
    """
    for each in found:
        d, r = each.difference.flatten(1), each.residual.flatten(1)
        n, q = (d * r).mean(1), d.square().mean(1)
        goal = n.new_zeros(len(n)) if each.goal is None else each.goal
        sums = dict(n=n, q=q, nn=n * n, nq=n * q, qq=q * q, wq=goal * q)
        _add(log, each.name, sums, each.inside, t[each.rows])
    shared = [each for each in found if each.drawn]
    if len(shared) > 1:
        _note_joint(shared, t, log)


def _note_joint(found: Sequence[Difference], t: Tensor, log: Log) -> None:
    """Sums of the joint regressions, on rows where all act, and of all with their scales."""
    inside = torch.zeros(len(found), len(t), dtype=torch.bool, device=t.device)
    goals, size = t.new_zeros(len(found), len(t)), found[0].residual[:1].numel()
    d, r = t.new_zeros(len(found), len(t), size), t.new_zeros(len(t), size)
    for k, each in enumerate(found):
        inside[k, each.rows] = each.inside
        d[k, each.rows] = each.difference.flatten(1) * each.inside.unsqueeze(1)
        r[each.rows] = each.residual.flatten(1)
        if each.goal is not None:
            goals[k, each.rows] = each.goal * each.inside
    gram = torch.einsum("kbd,lbd->klb", d, d) / size
    along = torch.einsum("kbd,bd->kb", d, r) / size
    name = "+".join(each.name for each in found)
    pairs = list(itertools.product(range(len(found)), repeat=2))
    terms = torch.cat([along, gram.flatten(0, 1)])
    sums = {f"g{k},{j}": gram[k, j] for k, j in pairs}
    sums |= {f"b{k}": b for k, b in enumerate(along)}
    sums |= {f"m{i},{j}": terms[i] * terms[j] for i, j in _squares(len(terms))}
    _add(log, name, sums, inside.all(0), t)
    if all(each.goal is not None for each in found):
        sums = {f"h{k},{j}": goals[k] * goals[j] * gram[k, j] for k, j in pairs}
        sums |= {f"c{k}": goals[k] * b for k, b in enumerate(along)}
        _add(log, name, sums, inside.any(0), t)


def _squares(terms: int) -> list[tuple[int, int]]:
    return [*itertools.combinations_with_replacement(range(terms), 2)]


def _add(log: Log, name: str, sums: dict[str, Tensor], rows: Tensor, t: Tensor) -> None:
    tenths = (t * 10).long().clamp(0, 9)
    masks = torch.stack([rows, *(rows & (tenths == k) for k in range(10))])
    names = [f"{MARK}{name}{MARK}{part}{MARK}{s}_sum" for s in sums for part in PARTS]
    values = torch.stack([*sums.values()]).repeat_interleave(len(PARTS), 0)
    log.add(tuple(names), values, masks.repeat(len(sums), 1))


def finish(numbers: dict[str, float]) -> dict[str, float]:
    """The numbers of a `Log` with guideabilities in the place of their sums; none without d."""
    result, parts = dict[str, float](), dict[tuple[str, str], dict[str, float]]()
    for key, value in numbers.items():
        if not key.startswith(MARK):
            result[key] = value
            continue
        _, name, part, which = key.split(MARK)
        parts.setdefault((name, part), {})[which.removesuffix("_sum")] = value
    single = [key for key in parts if "n" in parts[key]]
    for name, part in single:
        result |= _ratio(f"{name}/{part}", **parts[name, part])
    for name, part in parts.keys() - {*single}:
        names, sums = name.split("+"), parts[name, part]
        for kind, mark in (("progress", "h0,0"), ("scale_reached", "g0,0")):
            for each in names if mark in sums else ():  # what takes one for all does not hold
                result.pop(f"{each}/{part}{kind}", None)
        result |= _joint(names, part, sums)
    return result


def _ratio(
    name: str, n: float, q: float, nn: float, nq: float, qq: float, wq: float
) -> dict[str, float]:
    if q <= 0:
        return {}
    gamma = n / q
    error = max(nn - 2 * gamma * nq + gamma**2 * qq, 0.0) ** 0.5 / q
    result = {f"{name}guideability": gamma, f"{name}guideability_error": error}
    if gamma > -1:
        result[f"{name}scale_reached"] = 1 / (1 + gamma)
    if wq > 0:
        result[f"{name}progress"] = -n / wq
    return result


def _joint(names: list[str], part: str, sums: dict[str, float]) -> dict[str, float]:
    result = dict[str, float]()
    for kind, gram, along, sign in (
        ("guideability_joint", "g", "b", 1),
        ("progress", "h", "c", -1),
    ):
        several = [k for k in range(len(names)) if sums.get(f"{gram}{k},{k}", 0.0) > 0]
        if not several:
            continue
        rows = [[sums[f"{gram}{k},{j}"] for j in several] for k in several]
        matrix = torch.tensor(rows, dtype=torch.float64)
        right = torch.tensor([sums[f"{along}{k}"] for k in several], dtype=torch.float64)
        size = matrix.diagonal().sqrt()
        if torch.linalg.cond(matrix / size.outer(size)) > ALIKE:
            continue
        keys = [f"{names[k]}/{part}" for k in several]
        values = sign * torch.linalg.solve(matrix, right)
        result |= {f"{key}{kind}": x for key, x in zip(keys, values.tolist(), strict=True)}
        if sign > 0:
            errors = _joint_errors(sums, len(names), several, values, matrix)
            result |= {f"{key}{kind}_error": x for key, x in zip(keys, errors, strict=True)}
        if sign > 0 and (left := 1 + values.sum().item()) > 0:
            reached = (1 - values / left).tolist()
            result |= {f"{key}scale_reached": x for key, x in zip(keys, reached, strict=True)}
    return result


def _joint_errors(
    sums: dict[str, float], number: int, several: list[int], values: Tensor, matrix: Tensor
) -> list[float]:
    """Standard errors of the joint ``values`` (n) of the sources in ``several``."""
    terms = number + number**2
    moments = torch.zeros(terms, terms, dtype=torch.float64)
    for i, j in _squares(terms):
        moments[i, j] = moments[j, i] = sums[f"m{i},{j}"]
    of_row = torch.zeros(len(several), terms, dtype=torch.float64)  # e is this times the terms
    for place, k in enumerate(several):
        of_row[place, k] = 1
        of_row[place, [number + number * k + j for j in several]] = -values
    inverse = torch.linalg.inv(matrix)
    spread = inverse @ of_row @ moments @ of_row.T @ inverse
    return spread.diagonal().clamp(min=0).sqrt().tolist()

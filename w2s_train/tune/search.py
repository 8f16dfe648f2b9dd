"""The search: candidates on one set of seeds, finalists on all; all candidates see the same seeds.

Candidates come from a tree-structured Parzen estimator (Bergstra et al., 2011) in the unit cube:
after `FIRST` even ones, each is the one of `DRAWN` draws x with the largest good(x) / other(x), the
densities of the best tenth of the places so far and of the rest. A density is a mixture of
truncated normal kernels of width 0.2 n^(-1 / (d + 4)) at n places in d dimensions, and of a wide
one in the middle. The best sixth of all candidates is scored on the other sets, too, and the
smallest mean over the sets wins.
"""

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from w2s_train.errors import UserError
from w2s_train.tune.space import Space, Values

FIRST = 6  # candidates that fill the space evenly, its centre first
GOOD = 0.1  # share of the candidates so far that count as good
DRAWN = 24
WIDTH = 0.2
FINALISTS = 6  # one of so many candidates is one
TRIES = 1000  # to draw a candidate that is allowed and new

Place = list[float]  # in the unit cube
Score = Callable[[Values, int], float]  # of a candidate on one of the sets; smaller is better
Refusal = Callable[[Values], str | None]  # why a candidate cannot be; None if it can


@dataclass(frozen=True)
class Trial:
    """A candidate and its scores, one a set, beginning with the first."""

    values: Values
    place: Place
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Over the sets that it was scored on."""
        return statistics.fmean(self.scores)


class Density:
    """A mixture of kernels at some places, and one over the whole cube."""

    def __init__(self, places: Sequence[Place], dimensions: int) -> None:
        width = WIDTH * max(len(places), 1) ** (-1 / (dimensions + 4))
        self.centres = np.array([*places, [0.5] * dimensions])
        self.widths = np.array([width] * len(places) + [1.0])
        normal = np.vectorize(NormalDist().cdf)
        ends = [normal((end - self.centres) / self.widths[:, None]) for end in (0, 1)]
        self.below, self.inside = ends[0], ends[1] - ends[0]
        self.constants = -np.log(self.widths[:, None] * self.inside).sum(1)

    def draw(self, generator: random.Random) -> Place:
        """A place in the cube."""
        k, normal = generator.randrange(len(self.centres)), NormalDist()
        kernel = zip(self.centres[k], self.below[k], self.inside[k], strict=True)
        drawn = [
            c + self.widths[k] * normal.inv_cdf(a + b * generator.random()) for c, a, b in kernel
        ]
        return [min(max(float(x), 0.0), 1.0) for x in drawn]

    def log(self, place: Place) -> float:
        """The logarithm of the density there, but for a constant of the number of dimensions."""
        squares = ((np.array(place) - self.centres) / self.widths[:, None]) ** 2
        logs = self.constants - squares.sum(1) / 2
        return float(np.logaddexp.reduce(logs) - math.log(len(logs)))


def plan(evaluations: int, sets: int) -> tuple[int, int]:
    """Numbers of candidates and of finalists that take at most so many evaluations.

    Args:
        evaluations: Of one candidate on one set each, at least ``sets``.
        sets: Of seeds.
    """
    n = evaluations
    while n + max(1, n // FINALISTS) * (sets - 1) > evaluations:
        n -= 1
    return n, max(1, n // FINALISTS)


class Proposals:
    """Candidates that are allowed, each of them new.

    Args:
        space: What is searched.
        refusal: Says why one is not allowed.
        seed: Of all draws.
    """

    def __init__(self, space: Space, refusal: Refusal, seed: int = 0) -> None:
        self.space, self.refusal, self.random = space, refusal, random.Random(seed)
        self.seen = set[str]()
        self.dimensions = len(space.parameters)
        self.even = [self.random.sample(range(FIRST), FIRST) for _ in range(self.dimensions)]

    def next(self, trials: Sequence[Trial]) -> Trial | None:
        """One more; None if there seems to be no other one.

        Raises:
            UserError: None was ever allowed.
        """
        reason: str | None = None
        for place in itertools.islice(self._places(trials), TRIES):
            values = self.space.values(place)
            if repr(values) in self.seen:
                continue
            self.seen.add(repr(values))
            reason = self.refusal(values)
            if reason is None:
                return Trial(values, place)
        if not trials:
            raise UserError(f"search: must leave a candidate that is allowed; {reason}")
        return None

    def _places(self, trials: Sequence[Trial]) -> Iterator[Place]:
        """The next one, and others in case that it is not allowed; endlessly."""
        number, draw = len(trials), self.random.random
        if number == 0:
            yield [0.5] * self.dimensions
        elif number < FIRST:
            yield [(column[number] + draw()) / FIRST for column in self.even]
        else:
            ranked = [each.place for each in sorted(trials, key=lambda t: t.scores[0])]
            split = math.ceil(GOOD * number)
            good, other = (Density(p, self.dimensions) for p in (ranked[:split], ranked[split:]))
            for _ in range(TRIES // (2 * DRAWN)):
                drawn = [good.draw(self.random) for _ in range(DRAWN)]
                yield from sorted(drawn, key=lambda place: other.log(place) - good.log(place))
        while True:
            yield [draw() for _ in range(self.dimensions)]


def search(proposals: Proposals, number: int, sets: int, score: Score) -> list[Trial]:
    """Candidates with their scores; the finalists first, the winner before all.

    Args:
        proposals: Where candidates come from.
        number: How many there are to be.
        sets: Number of sets.
        score: Called once for each candidate, and for each finalist and further set.
    """
    trials = list[Trial]()
    while len(trials) < number and (trial := proposals.next(trials)):
        trial.scores.append(score(trial.values, 0))
        trials.append(trial)
    ranked = sorted(trials, key=lambda t: t.scores[0])
    last = max(1, len(trials) // FINALISTS)
    for k in range(1, sets):
        for trial in ranked[:last]:
            trial.scores.append(score(trial.values, k))
    return sorted(ranked[:last], key=lambda t: t.mean) + ranked[last:]

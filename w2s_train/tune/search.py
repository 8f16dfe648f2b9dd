"""The search: candidates on one set of seeds, finalists on all; all candidates see the same seeds.

Candidates come from a tree-structured Parzen estimator (Bergstra et al., 2011) in the unit cube:
after `FIRST` even ones, each is the one of `DRAWN` draws x with the largest good(x) / other(x), the
densities of the best tenth of the places so far and of the rest. A density is a mixture of
truncated normal kernels of width 0.2 n^(-1 / (d + 4)) at n places in d dimensions, and of a wide
one in the middle. The best sixth of all candidates is scored on the other sets, too, and the
smallest mean over the sets wins.
"""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

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
        self.kernels = [(place, NormalDist(0, width)) for place in places]
        self.kernels.append(([0.5] * dimensions, NormalDist(0, 1)))

    def draw(self, generator: random.Random) -> Place:
        """A place in the cube."""
        centre, kernel = generator.choice(self.kernels)
        ends = [(kernel.cdf(-c), kernel.cdf(1 - c)) for c in centre]
        inside = [generator.uniform(low, high) for low, high in ends]
        pairs = zip(centre, inside, strict=True)
        return [min(max(c + kernel.inv_cdf(u), 0.0), 1.0) for c, u in pairs]

    def log(self, place: Place) -> float:
        """The logarithm of the density there."""
        terms = []
        for centre, kernel in self.kernels:
            parts = (
                kernel.pdf(x - c) / (kernel.cdf(1 - c) - kernel.cdf(-c))
                for x, c in zip(place, centre, strict=True)
            )
            terms.append(math.prod(parts))
        return math.log(statistics.fmean(terms))


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
        self.seen, self.refused = set[str](), 0
        self.dimensions = len(space.parameters)
        self.even = [self.random.sample(range(FIRST), FIRST) for _ in range(self.dimensions)]

    def next(self, trials: Sequence[Trial]) -> Trial | None:
        """One more; None if there seems to be no other one.

        Raises:
            UserError: None was ever allowed.
        """
        reason: str | None = None
        for attempt in range(TRIES):
            place = self._place(trials, attempt)
            values = self.space.values(place)
            if repr(values) in self.seen:
                continue
            self.seen.add(repr(values))
            reason = self.refusal(values)
            if reason is None:
                return Trial(values, place)
            self.refused += 1
        if not trials:
            raise UserError(f"search: must leave a candidate that is allowed; {reason}")
        return None

    def _place(self, trials: Sequence[Trial], attempt: int) -> Place:
        number = len(trials)
        if number == attempt == 0:
            return [0.5] * self.dimensions
        if number < FIRST and attempt == 0:
            return [(column[number] + self.random.random()) / FIRST for column in self.even]
        if number < FIRST or attempt > TRIES // 2:  # few are left, and far from the best
            return [self.random.random() for _ in range(self.dimensions)]
        places = [each.place for each in sorted(trials, key=lambda t: t.scores[0])]
        good = Density(places[: math.ceil(GOOD * number)], self.dimensions)
        other = Density(places[math.ceil(GOOD * number) :], self.dimensions)
        drawn = [good.draw(self.random) for _ in range(DRAWN)]
        return max(drawn, key=lambda place: good.log(place) - other.log(place))


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

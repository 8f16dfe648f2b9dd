"""The search: candidates on one set of seeds, finalists on all; all candidates see the same seeds.

Candidates come from Optuna's tree-structured Parzen estimator (Bergstra et al., 2011), which models
all parameters together. The best sixth is scored on the other sets, too, and the smallest mean over
the sets wins.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from w2s_train.errors import UserError
from w2s_train.tune.space import Space, Values

FIRST = 6  # candidates that are drawn evenly before there is a model
DRAWN = 24  # places of which the model takes the best
BEST, GOOD, EVEN = 10, 90, 300  # tries for one that is allowed and new: so, by one good place each,
# and evenly; refused ones often lie where the model believes the best ones to be
FINALISTS = 6  # one of so many candidates is one

Score = Callable[[Values, int], float]  # of a candidate on one of the sets; smaller is better
Refusal = Callable[[Values], str | None]  # why a candidate cannot be; None if it can


@dataclass(frozen=True)
class Trial:
    """A candidate and its scores, one a set, beginning with the first."""

    values: Values
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Over the sets that it was scored on."""
        return statistics.fmean(self.scores)


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
    """Candidates that are allowed, each of them new; they depend on the seed and the scores alone.

    Args:
        space: What is searched.
        refusal: Says why one is not allowed.
        seed: Of all draws.
    """

    def __init__(self, space: Space, refusal: Refusal, seed: int = 0) -> None:
        import optuna  # late: no other command needs it

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study, self.failed = optuna.create_study(), optuna.trial.TrialState.FAIL
        best, any_good = (
            optuna.samplers.TPESampler(
                n_startup_trials=FIRST, n_ei_candidates=drawn, multivariate=True, seed=seed + drawn
            )
            for drawn in (DRAWN, 1)
        )
        even = optuna.samplers.RandomSampler(seed)
        self.samplers = [best] * BEST + [any_good] * GOOD + [even] * EVEN
        self.space, self.refusal = space, refusal
        kinds = optuna.distributions
        self.places: dict[str, Any] = {
            each.name: kinds.CategoricalDistribution(each.middles)
            if each.choices
            else kinds.FloatDistribution(0, 1)
            for each in space.parameters
        }
        self.seen, self.told = set[str](), 0

    def next(self) -> Values | None:
        """One more; None if there seems to be no other one.

        Raises:
            UserError: None was ever allowed.
        """
        reason: str | None = None
        for sampler in self.samplers:
            self.study.sampler = sampler
            self.asked = self.study.ask(self.places)
            values = self.space.values([self.asked.params[name] for name in self.places])
            if repr(values) not in self.seen:
                self.seen.add(repr(values))
                reason = self.refusal(values)
                if reason is None:
                    return values
            self.study.tell(self.asked, state=self.failed)
        if not self.told:
            raise UserError(f"search: must leave a candidate that is allowed; {reason}")
        return None

    def tell(self, score: float) -> None:
        """That of the last one."""
        self.study.tell(self.asked, score)
        self.told += 1


def search(proposals: Proposals, number: int, sets: int, score: Score) -> list[Trial]:
    """Candidates with their scores; the finalists first, the winner before all.

    Args:
        proposals: Where candidates come from.
        number: How many there are to be.
        sets: Number of sets.
        score: Called once for each candidate, and for each finalist and further set.
    """
    trials = list[Trial]()
    while len(trials) < number and (values := proposals.next()):
        trials.append(Trial(values, [score(values, 0)]))
        proposals.tell(trials[-1].mean)
    ranked = sorted(trials, key=lambda t: t.scores[0])
    last = max(1, len(trials) // FINALISTS)
    for k in range(1, sets):
        for trial in ranked[:last]:
            trial.scores.append(score(trial.values, k))
    return sorted(ranked[:last], key=lambda t: t.mean) + ranked[last:]

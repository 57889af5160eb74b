"""Is a difference between two methods more than the noise of the seeds?

Runs of two methods with the same seed share data split, start and batches, so their scores are compared as pairs:

    d_s = score of one - score of the other under seed s
    interval: mean(d) -+ t(n - 1) std(d) / sqrt(n)          (Student's t, both sides)

Where several methods stand in one table, every pair of them is tested. The p-values are corrected together after Holm
(Scandinavian Journal of Statistics 6, 1979), so that the chance of even one false claim in the table stays below
`ALPHA`. All pairs count for the correction, not only those with the best method, since the same numbers say which
method is best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

ALPHA = 0.05
"""Chance of a false claim that a table accepts; intervals are at the level 1 - ALPHA."""

FEW = 5
"""With fewer seeds than this, a table warns that it can tell large differences only."""

Scores = Mapping[int, float]
"""Seed -> score."""


@dataclass(frozen=True)
class Difference:
    """The paired difference of two methods over the seeds that both have.

    Attributes:
        seeds: number of seeds that both have.
        mean: of the differences.
        low, high: ends of the confidence interval of the mean; None with fewer than two seeds.
        p: two-sided p-value of "no difference"; None with fewer than two seeds.
    """

    seeds: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def is_noise(self) -> bool:
        """Whether the difference may be chance."""
        return self.p is None or not self.p < ALPHA


def paired(ours: Scores, theirs: Scores) -> Difference | None:
    """The difference `ours - theirs` over common seeds whose scores are both finite; None if there are none."""
    seeds = [s for s in ours if s in theirs and math.isfinite(ours[s]) and math.isfinite(theirs[s])]
    if not seeds:
        return None
    differences = [ours[s] - theirs[s] for s in seeds]
    mean = math.fsum(differences) / len(seeds)
    if len(seeds) == 1:
        return Difference(1, mean)
    largest = max(map(abs, differences))
    # Without spread, or with rounding as the only spread, Student's t would be 0 / 0 or infinite.
    if max(differences) - min(differences) <= 1e-12 * largest:
        return Difference(len(seeds), mean, mean, mean, 1.0 if mean == 0 else 0.0)
    from scipy import stats

    result = stats.ttest_1samp([d / largest for d in differences], 0.0)  # scaled: tiny squares would underflow
    low, high = (largest * float(end) for end in result.confidence_interval(1 - ALPHA))
    return Difference(len(seeds), mean, low, high, float(result.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for being tested together, in the given order (Holm's step-down method)."""
    order = sorted(range(len(p_values)), key=lambda k: p_values[k])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, k in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[k]))
        corrected[k] = largest
    return corrected


def all_pairs(scores: Mapping[str, Scores]) -> dict[tuple[str, str], Difference]:
    """(one, other) -> the difference `one - other`; each pair once, in the order of `scores`.

    The p-values are corrected over all pairs (`holm`).
    """
    pairs = {
        (one, other): difference
        for one, other in itertools.combinations(scores, 2)
        if (difference := paired(scores[one], scores[other])) is not None
    }
    tested = [names for names, difference in pairs.items() if difference.p is not None]
    corrected = holm([p for names in tested if (p := pairs[names].p) is not None])
    return pairs | {names: replace(pairs[names], p=p) for names, p in zip(tested, corrected, strict=True)}


@dataclass(frozen=True)
class Best:
    """Which method leads a table, and which others it cannot be told from."""

    name: str
    """The method with the best mean."""
    within_noise: tuple[str, ...]
    """Other methods whose difference to the best may be chance."""
    differences: dict[str, Difference]
    """Other method -> its difference to the best, `other - best`."""
    warning: str | None
    """Why the table can claim little; None if it has seeds enough."""

    @property
    def is_alone(self) -> bool:
        """Whether the best method differs from every other one by more than noise."""
        return bool(self.differences) and not self.within_noise


def best(scores: Mapping[str, Scores], lower_is_better: bool = False) -> Best | None:
    """The leading method of a table.

    Args:
        scores: method -> seed -> score.
        lower_is_better: whether the smallest mean leads, as for a loss.

    Returns:
        The leader and its differences to all others; None if no method has a finite score.
    """
    means = {
        name: math.fsum(finite) / len(finite)
        for name, of in scores.items()
        if (finite := [s for s in of.values() if math.isfinite(s)])
    }
    if not means:
        return None
    leader = (min if lower_is_better else max)(means, key=lambda name: means[name])
    differences = {}
    for (one, other), d in all_pairs(scores).items():
        if other == leader:
            differences[one] = d
        elif one == leader:
            low, high = (None if d.high is None else -d.high), (None if d.low is None else -d.low)
            differences[other] = replace(d, mean=-d.mean, low=low, high=high)
    noise = tuple(name for name in means if name in differences and differences[name].is_noise)
    return Best(leader, noise, differences, _warning([d.seeds for d in differences.values()]))


def _warning(seeds: Sequence[int]) -> str | None:
    """The warning about too few seeds; None if there are enough. seeds: how many each difference has."""
    if not seeds or min(seeds) >= FEW:
        return None
    fewest = min(seeds)
    if fewest == 1:
        return "One seed: no difference can be told from noise; run at least 3 seeds, better 5."
    return f"{fewest} seeds: only large differences can be told from noise; run at least {FEW} seeds."

"""Which trials go on, and which new ones are worth a try? Successive halving, as a pure function of the scores so far.

All trials train to the first rung, a number of rounds; the best third goes on to the second rung, three times as far,
and so on (Jamieson & Talwalkar, AISTATS 2016, arXiv 1502.07943). Afterwards, where the best value of an axis is the
lowest or the highest that was tried, the axis is extended: a trial beyond it races against the best one, and is given
up at the first rung where it is behind.

Nothing here trains or reads a file. Whoever gives the same scores gets the same answer, so that a search that was
stopped goes on by giving the scores that it has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

Point = Mapping[str, Any]
"""Field of the configuration -> its value in a trial."""
Merit = tuple[float, float]
"""How good a trial is: its score, and what decides between equal scores. Higher is better."""
LOST: Merit = (-math.inf, -math.inf)
"""The merit of a trial that has diverged."""
Scores = Mapping[tuple[int, int], Merit]
"""(number of a trial, number of a rung) -> how good the trial is there."""


@dataclass(frozen=True)
class Plan:
    """What is searched, and how thoroughly.

    Attributes:
        axes: field -> its first values; the trials are their product.
        rungs: the round of each rung, ascending.
        keep: one of so many trials goes on at a rung.
        extensions: how many values may be added to an axis.
    """

    axes: Mapping[str, tuple[Any, ...]]
    rungs: tuple[int, ...]
    keep: int = 3
    extensions: int = 3


@dataclass(frozen=True)
class Standing:
    """Where a search stands.

    Attributes:
        points: the trials so far; those after the product of the axes extend it.
        wanted: (trial, rung) pairs to train next; () at the end.
        best: the best trial; None before the end, and if all trials have diverged.
    """

    points: tuple[Point, ...]
    wanted: tuple[tuple[int, int], ...]
    best: int | None = None


def rungs(rounds: int, trials: int, keep: int = 3, count: int | None = None, share: float = 1.0) -> tuple[int, ...]:
    """The rounds at which trials are compared, ascending. The first divides all others but the run's last round.

    Args:
        rounds: of the whole run.
        trials: number of trials.
        keep: one of so many trials goes on at a rung.
        count: number of rungs; None: as many as leave one trial in the last. 1 trains every trial to the end.
        share: of the rounds that the last rung may take.
    """
    if count is None:
        count = 1 + next(k for k in itertools.count() if keep ** (k + 1) > trials)
    last = max(1, math.floor(round(rounds * share, 6)))
    first = max(1, last // keep ** (count - 1))
    found = [first * keep**k for k in range(count) if first * keep**k <= last]
    if last == rounds:
        found = [*[round_ for round_ in found[: count - 1] if round_ < rounds], rounds]
    return tuple(found)


def standing(plan: Plan, scores: Scores, valid: Callable[[Point], bool] = lambda point: True) -> Standing:
    """Where the search stands once these scores are known.

    Args:
        plan: what is searched.
        scores: of trials at rungs, at least of those that former answers wanted.
        valid: whether a trial that would extend an axis is possible.
    """
    points: list[Point] = [
        dict(zip(plan.axes, values, strict=True)) for values in itertools.product(*plan.axes.values())
    ]
    alive = list(range(len(points)))
    for rung in range(len(plan.rungs)):
        if wanted := [(trial, rung) for trial in alive if (trial, rung) not in scores]:
            return Standing(tuple(points), tuple(wanted))
        most = math.ceil(len(alive) / plan.keep)
        left = [trial for trial in alive if scores[trial, rung] != LOST]
        alive = sorted(left, key=lambda trial: scores[trial, rung], reverse=True)[:most]
        if not alive:
            return Standing(tuple(points), ())
    best = alive[0]
    while more := [point for point in beyond(plan, points, best) if valid(point)]:
        racing = list(range(len(points), len(points) + len(more)))
        points += more
        for rung in range(len(plan.rungs)):
            if wanted := [(trial, rung) for trial in racing if (trial, rung) not in scores]:
                return Standing(tuple(points), tuple(wanted))
            racing = [trial for trial in racing if scores[trial, rung] >= scores[best, rung]]
        best = max([best, *racing], key=lambda trial: scores[trial, len(plan.rungs) - 1])  # of equals the first
    return Standing(tuple(points), (), best)


def beyond(plan: Plan, points: list[Point], best: int) -> list[Point]:
    """The trials that extend the axes of which the best trial has the lowest or the highest value.

    The new value is as many times the best one as the best one is its neighbour. Axes of other values than numbers
    above 0 are not extended.
    """
    found: list[Point] = []
    for field, first in plan.axes.items():
        tried = sorted({point[field] for point in points}) if _grows(first) else []
        if len(tried) < 2 or len(tried) - len(set(first)) >= plan.extensions:
            continue
        value = points[best][field]
        ends = {tried[0]: tried[1], tried[-1]: tried[-2]}
        if value not in ends:
            continue
        new = _rounded(value * value / ends[value], value)
        if new > 0 and not tried[0] <= new <= tried[-1]:
            found.append({**points[best], field: new})
    return found


def open_ends(plan: Plan, standing: Standing, valid: Callable[[Point], bool] = lambda point: True) -> list[str]:
    """The axes that a search has left with the best value at an end, although possible values lie beyond it."""
    if standing.best is None:
        return []
    more = beyond(replace(plan, extensions=len(standing.points) + 1), list(standing.points), standing.best)
    best = standing.points[standing.best]
    return [field for point in more if valid(point) for field in plan.axes if point[field] != best[field]]


def _grows(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in values)


def _rounded(new: float, like: float) -> float:
    return round(new) if isinstance(like, int) else float(f"{new:.3g}")

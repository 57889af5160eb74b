"""Which method leads a comparison, and is its lead more than the noise of the seeds?

Methods of one graph and partition are compared in pairs over common seeds (`statistics`). Training on pooled data is
never the best: it sees what the others may not. A method of which a run has no score, for instance because it
diverged, takes no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from decaf_lora.records.summary import BASELINES, SummaryRow
from decaf_lora.statistics import Best, best

RANKED = {"mean_score": "mean score", "worst_score": "worst agent", "averaged_score": "averaged model"}
"""Scores that methods are ranked by -> what tables call them."""
DIFFERENCES = (
    *("score", "graph", "partition", "algorithm", "against", "seeds"),
    *("difference", "95 % from", "95 % to", "p (Holm)", "verdict"),
)
"""Columns of `differences`."""

Setting = tuple[str, str]
"""Graph and partition."""


def standing(rows: Iterable[SummaryRow], metric: str = "mean_score") -> Best | None:
    """The leader of `rows`, which are all of one graph and partition; None without two methods to compare.

    Args:
        rows: one for each method and seed.
        metric: a key of `RANKED`.
    """
    scores: dict[str, dict[int, float | None]] = {}
    lower_is_better = False
    for row in rows:
        if row.algorithm != BASELINES["pooled"]:
            scores.setdefault(row.algorithm, {})[row.seed] = getattr(row, metric)
            lower_is_better = row.lower_is_better
    whole = {
        name: known
        for name, of in scores.items()
        if len(known := {seed: value for seed, value in of.items() if value is not None}) == len(of)
    }
    return best(whole, lower_is_better) if len(whole) > 1 else None


def standings(rows: Iterable[SummaryRow], metric: str = "mean_score") -> dict[Setting, Best]:
    """Setting -> its leader, for settings with at least two methods to compare."""
    groups: dict[Setting, list[SummaryRow]] = {}
    for row in rows:
        groups.setdefault((row.graph, row.partition), []).append(row)
    found = {setting: standing(members, metric) for setting, members in groups.items()}
    return {setting: leader for setting, leader in found.items() if leader is not None}


def winners(rows: Sequence[SummaryRow]) -> set[tuple[str, str, str, str]]:
    """(algorithm, graph, partition, metric) of every score that is better than all others by more than noise."""
    return {
        (leader.name, *setting, metric)
        for metric in RANKED
        for setting, leader in standings(rows, metric).items()
        if leader.is_alone
    }


def differences(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """The difference of every method to the leader as text for people, one line each, in the columns `DIFFERENCES`."""
    found = []
    for metric, title in RANKED.items():
        for setting, leader in standings(rows, metric).items():
            for name, d in leader.differences.items():
                numbers = ["–" if end is None else f"{end:+.3f}" for end in (d.low, d.high)]
                p = "–" if d.p is None else "< 0.001" if d.p < 0.001 else f"{d.p:.3f}"
                verdict = "within noise" if d.is_noise else "differs"
                start = [title, *setting, name, leader.name, str(d.seeds)]
                found.append([*start, f"{d.mean:+.3f}", *numbers, p, verdict])
    return found


def verdicts(rows: Sequence[SummaryRow]) -> list[str]:
    """Which method has the best mean score in each setting, in words, and a warning where the seeds are too few."""
    found = standings(rows)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (graph, partition), leader in found.items():
        alike.setdefault((leader.name, leader.within_noise), []).append(f"{graph}, {partition}")
    lines = []
    for (name, near), settings in alike.items():
        where = f" ({'; '.join(settings)})"
        if near:
            lines.append(f"no single best mean score{where}: {name} leads, within noise of it: {', '.join(near)}.")
        else:
            lines.append(f"best mean score{where}: {name}, by more than the noise of the seeds.")
    return [*lines, *dict.fromkeys(leader.warning for leader in found.values() if leader.warning)]

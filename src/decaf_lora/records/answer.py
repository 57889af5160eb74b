"""Did training together help? Each agent's final score against what it would have reached alone.

An agent gains if its score after training together is better than after training alone with as many steps from the
same start. Over several seeds every agent of every seed counts, since a seed also draws who holds what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from decaf_lora.records.summary import BASELINES, SummaryRow
from decaf_lora.statistics import Difference, paired


@dataclass(frozen=True)
class Answer:
    """What the agents of one algorithm, graph and partition gained, over all seeds that have both scores."""

    algorithm: str
    graph: str
    partition: str
    score_name: str
    lower_is_better: bool
    together: tuple[float, ...]
    """Final score of each agent of each seed."""
    alone: tuple[float, ...]
    """The same agents' scores after training alone."""
    difference: Difference
    """Of the means over agents, together - alone, paired over seeds."""
    start: float | None = None
    majority: float | None = None
    pooled: float | None = None

    @property
    def gains(self) -> tuple[float, ...]:
        """By how much each agent is better off together; negative where it is worse off."""
        sign = -1 if self.lower_is_better else 1
        return tuple(sign * (ours - own) for ours, own in zip(self.together, self.alone, strict=True))

    @property
    def better(self) -> int:
        """How many agents are better off together."""
        return sum(gain > 0 for gain in self.gains)

    @property
    def worse(self) -> int:
        """How many agents are worse off together."""
        return sum(gain < 0 for gain in self.gains)

    @property
    def helped(self) -> bool | None:
        """Whether the mean over agents is better together; None where the difference may be noise of the seeds.

        With one seed the means alone decide.
        """
        if self.difference.seeds > 1 and self.difference.is_noise:
            return None
        return fmean(self.gains) > 0

    def sentence(self) -> str:
        """The answer in one sentence with its numbers."""
        worst = max if self.lower_is_better else min
        others = {"start": self.start, "majority class": self.majority, "pooled data": self.pooled}
        known = ", ".join(f"{name} {value:.3f}" for name, value in others.items() if value is not None)
        agents = f"{self.better} of {len(self.gains)} agents"
        if self.difference.seeds > 1:
            agents += f" over {self.difference.seeds} seeds"
        verb = "is" if len(self.gains) == 1 else "are"
        equal = len(self.gains) - self.better - self.worse
        rest = [f"{self.worse} worse off" if self.worse else "", f"{equal} as well off" if equal else ""]
        return (
            f"{self.algorithm}: {self.score_name} {fmean(self.together):.3f} together, {fmean(self.alone):.3f} alone"
            + (f" ({known})" if known else "")
            + self._certainty()
            + f"; {agents} {verb} better off than alone"
            + "".join(f", {part}" for part in rest if part)
            + f", and the worst has {worst(self.together):.3f} together, {worst(self.alone):.3f} alone."
        )

    def _certainty(self) -> str:
        """What the seeds say about the difference; "" with one seed."""
        found = self.difference
        if found.low is None or found.high is None:
            return ""
        noise = ", which may be noise" if found.is_noise else ""
        return f", a difference of {found.mean:+.3f} (95 % interval {found.low:+.3f} to {found.high:+.3f}{noise})"


def answers(rows: Iterable[SummaryRow]) -> list[Answer]:
    """The answer for each algorithm, graph and partition whose rows know what agents reach alone.

    The baselines themselves have none.
    """
    groups: dict[tuple[str, str, str], dict[int, SummaryRow]] = {}
    for row in rows:
        if row.algorithm not in BASELINES.values() and _both(row):
            groups.setdefault((row.algorithm, row.graph, row.partition), {})[row.seed] = row
    return [_answer(list(seeds.values())) for seeds in groups.values()]


def _answer(rows: Sequence[SummaryRow]) -> Answer:
    first = rows[0]
    pairs = [_both(row) for row in rows]
    together, alone = (tuple(score for pair in pairs for score in pair[side]) for side in (0, 1))
    ours, own = ({row.seed: fmean(pair[side]) for row, pair in zip(rows, pairs, strict=True)} for side in (0, 1))
    difference = paired(ours, own)
    assert difference is not None
    return Answer(
        first.algorithm,
        first.graph,
        first.partition,
        first.score_name,
        first.lower_is_better,
        together,
        alone,
        difference,
        start=_mean(row.start_score for row in rows),
        majority=_mean(row.majority_score for row in rows),
        pooled=_mean(row.pooled_score for row in rows),
    )


def _both(row: SummaryRow) -> tuple[list[float], list[float]] | tuple[()]:
    """Scores of all agents together and alone; () if one is not known, or agents do not correspond."""
    together, alone = (
        [s for s in scores or () if s is not None and math.isfinite(s)] for scores in (row.scores, row.alone_scores)
    )
    whole = len(together) == len(row.scores or ()) == len(alone) == len(row.alone_scores or ()) > 0
    return (together, alone) if whole and row.diverged is None else ()


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

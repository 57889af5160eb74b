"""How does a value change over the rounds? A curve with its band for each algorithm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from decaf_lora.records import Record
from decaf_lora.report.reading import Groups, RunRecords
from decaf_lora.report.style import called, line_style, log_axis, looks

Values = Sequence[float | None] | None


@dataclass(frozen=True)
class Curve:
    """A value over rounds, each (rounds,): the mean, and the ends of the band around it (the mean if there is none)."""

    rounds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def one(value: float | None) -> Values:
    return None if value is None else [value]


def curve(runs: Sequence[RunRecords], value: Callable[[Record], Values], agents: bool) -> Curve | None:
    """The curve of a value: mean over agents and seeds, at the rounds that every run has.

    The band is the mean and the standard deviation to both sides, as in the table: over seeds (n - 1) or, with a
    single seed and `agents`, over agents (n).

    Args:
        runs: runs of one algorithm, one a seed.
        value: record -> the value of every agent (or one value); None where the round has none.
        agents: whether the band of a single seed is over agents; otherwise it has no band.

    Returns:
        The curve; None if there is no round that every run has.
    """
    tables = [
        {
            record.round: [np.nan if number is None else number for number in values]
            for record in run.records
            if (values := record.counted(value(record)))
        }
        for run in runs
    ]
    tables = [table for table in tables if table]
    rounds = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    if not rounds:
        return None
    means = np.array([[np.mean(table[number]) for number in rounds] for table in tables])  # (seeds, rounds)
    mean = means.mean(axis=0)
    if len(tables) > 1:
        std = means.std(axis=0, ddof=1)
    else:
        std = np.array([np.std(tables[0][number]) for number in rounds]) if agents else np.zeros(len(rounds))
    return Curve(np.array(rounds), mean, mean - std, mean + std)


def draw_curves(axes: Axes, groups: Groups, value: Callable[[Record], Values], log: bool = False) -> list[str]:
    """Draws a curve for each algorithm; returns the algorithms whose curve is zero everywhere, so not on a log axis."""
    unseen = []
    for algorithm, (colour, marker) in looks(groups).items():
        found = curve(groups[algorithm], value, agents=len(groups) == 1)
        if found is None:
            continue
        mean, low, high = (
            np.where(line > 0, line, np.nan) if log else line for line in (found.mean, found.low, found.high)
        )
        if log and np.isnan(mean).all():
            unseen.append(called(algorithm))
            continue
        axes.plot(found.rounds, mean, label=called(algorithm), **line_style(algorithm, colour, marker, len(mean)))
        if (found.high > found.low).any():
            axes.fill_between(found.rounds, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.margins(x=0.02)
    if log and axes.lines:
        log_axis(axes)
    return unseen


def band(groups: Groups) -> str:
    """A sentence for the caption that says what the shaded band is; "" without a band."""
    if num_seeds(groups) > 1:
        return " Bands: ± standard deviation over seeds, as in the table."
    return (
        " Band: ± standard deviation over agents, as in the table."
        if len(groups) == 1 and num_agents(groups) > 1
        else ""
    )


def num_seeds(groups: Groups) -> int:
    return max(len(runs) for runs in groups.values())


def num_agents(groups: Groups) -> int:
    everything = (record for runs in groups.values() for run in runs for record in run.records)
    return max((len(record.scores or ()) for record in everything), default=0)

"""Who gained? Every agent's score after training together beside its score after training alone."""

import numpy as np

from decaf_lora.records import BASELINES
from decaf_lora.report.figures import Plot
from decaf_lora.report.reading import Groups, RunRecords
from decaf_lora.report.style import INK, called, legend, looks, name_rows, new_figure

MOST = 60
"""Agents that the figure shows; more would not be legible."""


def gains(groups: Groups) -> Plot | None:
    """The figure of one algorithm and its baseline; None where there is no baseline, or several algorithms."""
    names = [name for name in groups if name not in BASELINES.values()]
    if len(names) != 1 or BASELINES["alone"] not in groups:
        return None
    [name] = names
    ours, alone = (_last(groups[one]) for one in (name, BASELINES["alone"]))
    if ours is None or alone is None or ours.shape != alone.shape or not 2 <= len(ours) <= MOST:
        return None
    facts = groups[name][0].facts
    agents = facts.get("names") or []
    order = range(len(ours))
    figure = new_figure(height=max(3.2, 1.3 + 0.24 * len(ours)))
    axes = figure.add_subplot()
    (colour, marker), (grey, cross) = looks(groups)[name], looks(groups)[BASELINES["alone"]]
    for agent in order:
        axes.plot([alone[agent], ours[agent]], [agent, agent], color=INK, linewidth=1, label="_")
    axes.plot(alone, order, cross, color=grey, label="alone", markersize=6)
    axes.plot(ours, order, marker, color=colour, label=f"together ({called(name)})", markersize=6)
    name_rows(axes, agents if len(agents) == len(ours) else [f"agent {agent}" for agent in order])
    axes.set_xlabel(str(facts.get("score_name") or "score"))
    legend(figure)
    sign = -1 if facts.get("lower_is_better") else 1
    better = int((sign * (ours - alone) > 0).sum())
    seeds = ", mean over seeds" if len(groups[name]) > 1 else ""
    caption = f"Every agent's model at the last evaluation{seeds}. Alone: as many steps on its own data, same start."
    alt = (
        f"Dot plot by agent: {better} of {len(ours)} agents are better off together. Together "
        f"{ours.min():.3g} to {ours.max():.3g}, alone {alone.min():.3g} to {alone.max():.3g}."
    )
    return Plot("Together and alone", caption, alt, figure)


def _last(runs: list[RunRecords]) -> np.ndarray | None:
    """(agents,) the last scores, mean over seeds; None if one is missing, or numbers of agents differ."""
    lasts = [next((record.scores for record in reversed(run.records) if record.scores), None) for run in runs]
    if any(last is None or None in last for last in lasts) or len({len(last or ()) for last in lasts}) != 1:
        return None
    return np.mean(np.array(lasts, dtype=float), axis=0)

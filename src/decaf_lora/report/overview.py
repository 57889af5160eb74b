"""What shows all settings at once? One figure of scores across graphs and partitions, and the graphs side by side."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from decaf_lora import records
from decaf_lora.report.figures import Plot, draw_graph
from decaf_lora.report.reading import RunRecords, by_algorithm, peer
from decaf_lora.report.style import WHOLE, called, legend, looks, name_rows, new_figure

Sections = Mapping[tuple[str, str], Sequence[RunRecords]]
"""Graph and partition -> the runs to compare with each other."""


def make_overview(sections: Sections) -> list[Plot]:
    """The figures over all settings; none where there is only one."""
    return [plot for maker in (_across, _graphs) if len(sections) > 1 and (plot := maker(sections))]


def _across(sections: Sections) -> Plot | None:
    everything = dict.fromkeys(run.algorithm for runs in sections.values() for run in runs)
    settings = [f"{graph} · {partition}" for graph, partition in sections]
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for row, runs in enumerate(sections.values()):
        for algorithm, of in by_algorithm(runs).items():
            scores = [records.summary_row(run.facts, run.records).mean_score for run in of]
            known = [score for score in scores if score is not None]
            if len(known) == len(scores):
                found[algorithm, row] = (fmean(known), stdev(known) if len(known) > 1 else 0.0)
    if not found:
        return None
    height = 0.3 + 0.13 * len(everything)
    figure = new_figure(WHOLE, 1.5 + height * len(sections))
    axes = figure.add_subplot()
    for place, (algorithm, (colour, marker)) in enumerate(looks(everything).items()):
        rows = [row for row in range(len(settings)) if (algorithm, row) in found]
        shift = 0.7 * ((place + 0.5) / len(everything) - 0.5)
        axes.errorbar(
            [found[algorithm, row][0] for row in rows],
            [row + shift for row in rows],
            xerr=[found[algorithm, row][1] for row in rows],
            color=colour,
            fmt=marker or "|",
            markersize=6 if marker else 9,
            linestyle="",
            elinewidth=1.1,
            label=called(algorithm),
        )
    name_rows(axes, settings)
    for row in range(1, len(settings)):
        axes.axhline(row - 0.5, color=axes.spines["left"].get_edgecolor(), linewidth=0.6)
    facts = next(run.facts for runs in sections.values() for run in runs)
    axes.set_xlabel(str(facts.get("score_name") or "score"))
    legend(figure)
    best = min if facts.get("lower_is_better") else max
    told = []
    for row, setting in enumerate(settings):
        scores_of = {name: mean for (name, at), (mean, _) in found.items() if at == row and name != "centralized"}
        if scores_of:
            leader = best(scores_of, key=lambda name: scores_of[name])
            told.append(f"{setting}: {called(leader)} leads with {scores_of[leader]:.3g}")
    caption = "Mean score over agents at the last evaluation, ± standard deviation over seeds, as in the table."
    return Plot("Score across settings", caption, f"Dot plot by setting. {'. '.join(told)}.", figure)


def _graphs(sections: Sections) -> Plot | None:
    peers = [peer(by_algorithm(runs)) for runs in sections.values()]
    runs = list({run.graph: run for run in peers if len(run.facts["graph"].get("weights") or ()) > 1}.values())
    if len(runs) < 2:
        return None
    columns = min(len(runs), 4)
    rows = -(-len(runs) // columns)
    figure = new_figure(WHOLE, 0.3 + rows * (WHOLE / columns + 0.3))
    told = []
    for place, run in enumerate(runs):
        axes = figure.add_subplot(rows, columns, place + 1)
        links = draw_graph(run, axes)
        sigma = run.facts["graph"].get("sigma_2")
        gap = "" if sigma is None else f"σ₂ = {sigma:.3f}, "
        axes.set_title(f"{run.graph}\n{gap}{links} links", fontsize=10.5)
        told.append(f"{run.graph}: {gap}{links} links")
    caption = (
        "Who exchanges with whom. σ₂: the share of disagreement that one exchange leaves at most (0: none, 1: all)."
    )
    return Plot("The graphs", caption, f"Drawings of graphs. {'. '.join(told)}.", figure)

"""Which figures does a report have? Each is made from the runs of a section; figures without data are left out."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from decaf_lora.graphs import Graph, draw
from decaf_lora.records import Record
from decaf_lora.report.curves import Values, band, curve, draw_curves, num_agents, num_seeds, one
from decaf_lora.report.reading import Groups, RunRecords, peer
from decaf_lora.report.style import (
    HALF,
    HEAT,
    INK,
    PHASE_COLOURS,
    WHOLE,
    called,
    label_ends,
    legend,
    line_style,
    looks,
    name_rows,
    new_figure,
)


@dataclass(frozen=True)
class Plot:
    """A figure for the page; `alt` is the text for a screen reader."""

    title: str
    caption: str
    alt: str
    figure: Figure

    @property
    def wide(self) -> bool:
        return self.figure.get_figwidth() > HALF


def make_plots(groups: Groups, with_graph: bool = True) -> list[Plot]:
    """The figures of a section; figures without data are left out, and the graph where it is drawn elsewhere."""
    makers = (
        _scores,
        _scores_by_bytes,
        _losses,
        _consensus,
        _truncation,
        _final_scores,
        _sites,
        _labels,
        _graph,
        _seconds,
    )
    return [plot for maker in makers if (with_graph or maker is not _graph) and (plot := maker(groups))]


def _told(values: Mapping[str, float], lower_is_better: bool = False) -> str:
    """The values of algorithms in words, the best first: `FedAvg 0.85, DeCAF 0.72`."""
    order = sorted(values, key=lambda name: values[name], reverse=not lower_is_better)
    return ", ".join(f"{called(name)} {values[name]:.3g}" for name in order)


def _ends(groups: Groups, value: Callable[[Record], Values]) -> dict[str, float]:
    """Algorithm -> the last value of its curve."""
    curves = {name: curve(runs, value, agents=False) for name, runs in groups.items()}
    return {name: float(c.mean[-1]) for name, c in curves.items() if c is not None and np.isfinite(c.mean[-1])}


def _lower_is_better(groups: Groups) -> bool:
    return any(bool(run.facts.get("lower_is_better")) for runs in groups.values() for run in runs)


def _score_name(groups: Groups) -> str:
    return next((str(run.facts.get("score_name") or "score") for runs in groups.values() for run in runs), "score")


def _scores(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    draw_curves(axes, groups, lambda record: record.scores)
    caption = "Each agent's own model on the test data, mean over agents." + band(groups)
    extra = []
    if len(groups) == 1 and num_agents(groups) > 1:
        [runs] = groups.values()
        averaged = curve(runs, lambda record: one(record.averaged_score), agents=False)
        if averaged is not None and axes.lines:
            axes.lines[0].set_label("agents' mean")
            axes.plot(averaged.rounds, averaged.mean, ":", color=INK, label="averaged model")
            caption += " Dotted: the model that averages all agents' adapters."
    if not axes.lines:
        return None
    chance = [run.facts.get("majority_score") for runs in groups.values() for run in runs]
    known = [float(value) for value in chance if value is not None]
    if known:
        axes.axhline(float(np.mean(known)), color=INK, linestyle=(0, (1, 3)), linewidth=1, label="_")
        extra.append((float(np.mean(known)), "majority class", INK))
        caption += " Dots: always giving the majority class, the chance level."
    axes.set_ylabel(_score_name(groups))
    label_ends(axes, extra)
    told = _told(_ends(groups, lambda record: record.scores), _lower_is_better(groups))
    alt = f"Line chart of the {_score_name(groups)} by round. At the end: {told}."
    return Plot("Score by round", caption, alt, figure)


def _scores_by_bytes(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    ends, flat, extra = [], [], []
    for algorithm, (colour, marker) in looks(groups).items():
        found = curve(groups[algorithm], lambda record: record.scores, agents=False)
        if found is None:
            continue
        sent = np.mean([_sent(run, found.rounds) for run in groups[algorithm]], axis=0)
        style = line_style(algorithm, colour, marker, len(sent))
        if sent[-1] > 0:
            axes.plot(sent, found.mean, label=called(algorithm), **style)
            ends.append(sent[-1])
        else:
            flat.append(called(algorithm))
            axes.axhline(found.mean[-1], **(style | {"marker": "", "label": "_"}))
            extra.append((float(found.mean[-1]), called(algorithm), colour))
    if not ends:
        return None
    if max(ends) > 10 * min(ends):
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))  # the labels are long
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("bytes sent by one agent")
    axes.set_ylabel(_score_name(groups))
    label_ends(axes, extra)
    caption = "The same score against what one agent has sent so far (mean over agents)."
    if flat:
        caption += f" Horizontal: the final score of what sends nothing ({', '.join(flat)})."
    spent = {name: float(_sent_in_all(runs)) for name, runs in groups.items() if _sent_in_all(runs)}
    bytes_ = ", ".join(f"{called(name)} {EngFormatter(unit='B', places=2)(sent)}" for name, sent in spent.items())
    told = _told(_ends(groups, lambda record: record.scores), _lower_is_better(groups))
    alt = f"Line chart of the {_score_name(groups)} by bytes sent. At the end: {told}. An agent has sent: {bytes_}."
    return Plot("Score by bytes sent", caption, alt, figure)


def _sent(run: RunRecords, rounds: np.ndarray) -> np.ndarray:
    """The bytes an agent had sent by the end of each of `rounds`."""
    total = np.cumsum([record.bytes_sent for record in run.records])
    return np.array([sent for sent, record in zip(total, run.records, strict=True) if record.round in rounds])


def _sent_in_all(runs: Sequence[RunRecords]) -> float:
    """The bytes that an agent has sent by the end, mean over seeds."""
    return float(np.mean([sum(record.bytes_sent for record in run.records) for run in runs]))


def _losses(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    draw_curves(axes, groups, lambda record: record.losses)
    if not axes.lines:
        return None
    axes.set_ylabel("training loss")
    label_ends(axes)
    caption = "Mean over the local steps of a round and over agents, each on its own data." + band(groups)
    alt = f"Line chart of the training loss by round. At the end: {_told(_ends(groups, lambda r: r.losses), True)}."
    return Plot("Training loss by round", caption, alt, figure)


def _consensus(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    unseen = draw_curves(axes, groups, lambda record: one(record.consensus_distance), log=True)
    if not axes.lines:
        return None
    axes.set_ylabel("distance (log scale)")
    label_ends(axes)
    caption = "How far the agents' products BA are from their mean: Frobenius norm, RMS over agents."
    told = _told(_ends(groups, lambda record: one(record.consensus_distance)), True)
    alt = f"Line chart of the consensus distance by round. At the end: {told}."
    return Plot("Consensus distance by round", caption + _band_over_seeds(groups) + _zeros(unseen), alt, figure)


def _truncation(groups: Groups) -> Plot | None:
    parts: dict[str, tuple[str, Callable[[Record], Values]]] = {
        "consensus interference": (
            "what averaging the factors A and B loses against averaging the products BA",
            lambda record: one(record.interference),
        ),
        "truncation tail": (
            "what cutting the averaged product back to the rank loses",
            lambda record: one(record.tail),
        ),
    }
    everything = [record for runs in groups.values() for run in runs for record in run.records]
    shown = [name for name, (_, value) in parts.items() if any((value(record) or [0])[0] for record in everything)]
    if not shown:
        return None
    figure = new_figure(height=2.4 * len(shown) if len(shown) > 1 else 3.6)
    panels = figure.subplots(len(shown), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    zeros, meanings = [], []
    for axes, name in zip(panels, shown, strict=True):
        meaning, value = parts[name]
        if unseen := draw_curves(axes, groups, value, log=True):
            zeros.append(f"{name} ({', '.join(unseen)})")
        meanings.append(f"{name.capitalize()}: {meaning}.")
        axes.set_ylabel(f"{name}\n(log scale)" if len(shown) > 1 else "Frobenius norm (log scale)")
        axes.set_xlabel("round" if axes is panels[-1] else "")
    for axes in panels:
        label_ends(axes)
    norm = "Frobenius norm, " if len(shown) > 1 else ""
    caption = f"{' '.join(meanings)} {norm}RMS over layers and agents.{_band_over_seeds(groups)}{_zeros(zeros)}"
    told = ". ".join(f"{name.capitalize()}: {_told(_ends(groups, parts[name][1]), True)}" for name in shown)
    alt = f"Line chart by round. At the end: {told}."
    title = "Interference against truncation" if len(shown) > 1 else shown[0].capitalize()
    return Plot(title, caption, alt, figure)


def _band_over_seeds(groups: Groups) -> str:
    return band(groups) if num_seeds(groups) > 1 else ""


def _zeros(names: Sequence[str]) -> str:
    return f" Exactly zero in every round, so not on a log scale: {', '.join(names)}." if names else ""


def _final_scores(groups: Groups) -> Plot | None:
    finals: dict[str, list[float]] = {}
    for algorithm, runs in groups.items():
        lasts = (next((r.scores for r in reversed(run.records) if r.scores), []) for run in runs)
        finals[algorithm] = [score for last in lasts for score in last if score is not None]
    finals = {algorithm: scores for algorithm, scores in finals.items() if scores}
    if max(map(len, finals.values()), default=0) < 2:
        return None
    figure = new_figure(height=max(3.2, 1.0 + 0.42 * len(finals)))
    axes, unequal = figure.add_subplot(), False
    for place, (algorithm, (colour, _)) in enumerate(looks(finals).items()):
        scores = np.array(finals[algorithm])
        axes.plot([scores.mean()] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=2.4)
        jitter = np.random.Generator(np.random.PCG64(place)).uniform(-0.22, 0.22, len(scores))
        ranks: list[int] = next((r for run in groups[algorithm] if (r := run.facts.get("ranks"))), [])
        if ranks and len(scores) % len(ranks) == 0 and algorithm != "centralized":
            unequal = True
            axes.plot(
                scores, place + jitter, linestyle=""
            )  # texts do not widen the limits of the axis; invisible points do
            for rank, score, height in zip(np.resize(ranks, len(scores)), scores, place + jitter, strict=True):
                axes.text(score, height, str(rank), color=colour, fontsize=9, ha="center", va="center")
        else:
            axes.plot(scores, place + jitter, "o", color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
    name_rows(axes, [called(name) for name in finals])
    axes.set_xlabel(_score_name(groups))
    seeds = " of every seed" if num_seeds(groups) > 1 else ""
    what = "One mark an agent, its rank," if unequal else "One dot an agent"
    caption = f"{what}{seeds} at the last evaluation; the bar is their mean."
    told = _told({name: float(np.mean(scores)) for name, scores in finals.items()}, _lower_is_better(groups))
    spans = "; ".join(f"{called(name)} {min(scores):.3g} to {max(scores):.3g}" for name, scores in finals.items())
    alt = f"Dot plot of the final score of every agent. Means: {told}. Lowest to highest agent: {spans}."
    return Plot("Final score of every agent", caption, alt, figure)


def _sites(groups: Groups) -> Plot | None:
    """The last scores of every agent by name, on all test examples and on the agent's own."""
    given = peer(groups).facts.get("names") or []
    records = [record for runs in groups.values() for run in runs for record in run.records]
    num = max((len(record.own_scores or record.scores or []) for record in records), default=0)
    names = given if len(given) == num else [f"agent {agent}" for agent in range(num)]
    kinds: dict[str, Callable[[Record], Values]] = {
        "all": lambda record: record.scores,
        "own": lambda record: record.own_scores,
    }
    found: dict[tuple[str, str], list[float]] = {}
    for algorithm, runs in groups.items():
        for kind, values in kinds.items():
            lasts: list[Sequence[float | None]] = [
                next((v for record in reversed(run.records) if (v := values(record))), []) for run in runs
            ]
            if all(len(last) == num and None not in last for last in lasts):
                found[algorithm, kind] = np.mean(np.array(lasts, dtype=float), axis=0).tolist()
    own = any(kind == "own" for _, kind in found)
    if not found or not (given or own) or not 2 <= num <= 40:
        return None
    figure = new_figure(height=max(3.2, 1.2 + 0.3 * num))
    axes = figure.add_subplot()
    for algorithm, (colour, marker) in looks(groups).items():
        for kind in kinds:
            if (algorithm, kind) in found:
                label = called(algorithm) + (f", {'its own' if kind == 'own' else 'all'} tests" if own else "")
                face = "none" if kind == "own" else colour
                axes.plot(
                    found[algorithm, kind],
                    range(num),
                    marker=marker or "_",
                    markersize=9 if kind == "own" else 4.5,  # a ring around the dot where both are equal
                    markerfacecolor=face,
                    color=colour,
                    linestyle="",
                    label=label,
                )
    name_rows(axes, names)
    axes.set_xlabel(_score_name(groups))
    legend(figure)
    on = "on all test examples (filled) and on those of its own site (open)" if own else "on all test examples"
    seeds = ", mean over seeds" if num_seeds(groups) > 1 else ""
    caption = f"Every agent's model at the last evaluation, {on}{seeds}."
    told = "; ".join(
        f"{called(algorithm)}, {kind} tests: " + ", ".join(f"{n} {v:.3g}" for n, v in zip(names[:10], of, strict=False))
        for (algorithm, kind), of in found.items()
    )
    return Plot("Every site", caption, f"Dot plot of the last score of every site. {told}.", figure)


def _labels(groups: Groups) -> Plot | None:
    run = peer(groups)
    table = run.facts["partition"].get("label_table")
    if not table:
        return None
    counts = np.array(table).T  # (classes, agents)
    classes, agents = counts.shape
    names = run.facts["partition"].get("classes") or range(classes)
    names = [text if len(text := str(name)) <= 24 else text[:23] + "…" for name in names]
    figure = new_figure(HALF if agents <= 24 else WHOLE, float(np.clip(1.1 + 0.24 * classes, 2.0, 6.4)))
    axes = figure.add_subplot()
    image = axes.imshow(counts, cmap=HEAT, vmin=0, aspect="auto", interpolation="none")
    if classes <= 20 and agents <= 16 and counts.max() < 10_000:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(column, row, str(count), ha="center", va="center", color=INK, fontsize=9.5)
    else:
        figure.colorbar(image, label="examples").outline.set_visible(False)
    step = _step(classes)
    axes.set_yticks(range(0, classes, step), names[::step])
    sites = run.facts.get("names") or []
    if len(sites) == agents <= 26:
        short = [name if len(name) <= 16 else name[:15] + "…" for name in sites]
        axes.set_xticks(range(agents), short, rotation=40, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(0, agents, _step(agents)))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("agent")
    caption = f"Training examples of each class (rows) that each agent (columns) holds; seed {run.seed}."
    sizes, kinds = counts.sum(axis=0), (counts > 0).sum(axis=0)
    alt = (
        f"Heat map of examples by class and agent under {run.partition}: an agent holds {sizes.min():.0f} to "
        f"{sizes.max():.0f} examples of {kinds.min()} to {kinds.max()} of {classes} classes."
    )
    return Plot("Who holds what", caption, alt, figure)


def _step(count: int) -> int:
    """The distance between labels of `count` rows or columns: a round number that leaves at most 26 labels."""
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return next(step for step in steps if count <= 26 * step)


def _graph(groups: Groups) -> Plot | None:
    run = peer(groups)
    weights = run.facts["graph"].get("weights")
    if not weights or len(weights) == 1:
        return None
    figure = new_figure(height=3.9)
    links = draw_graph(run, figure.add_subplot())
    caption = "The agents and who exchanges with whom."
    if (sigma := run.facts["graph"].get("sigma_2")) is not None:
        caption += f" σ₂ = {sigma:.3f}: one exchange leaves at most this share of disagreement (0: none, 1: all)."
    alt = f"Drawing of the graph {run.graph}: {len(weights)} agents, {links} links."
    return Plot(f"Graph: {run.graph}", caption, alt, figure)


def _seconds(groups: Groups) -> Plot | None:
    means: dict[str, dict[str, float]] = {}  # algorithm -> phase -> seconds of a run
    for algorithm, runs in groups.items():
        phases = dict.fromkeys(phase for run in runs for record in run.records for phase in record.seconds)
        means[algorithm] = {
            phase: sum(record.seconds.get(phase, 0.0) for run in runs for record in run.records) / len(runs)
            for phase in phases
        }
    phases = dict.fromkeys(phase for seconds in means.values() for phase in seconds)
    if not any(second > 0 for seconds in means.values() for second in seconds.values()):
        return None
    figure = new_figure(height=max(3.2, 1.2 + 0.4 * len(means)))
    axes = figure.add_subplot()
    left = np.zeros(len(means))
    hatches = itertools.cycle(("", "///", "...", "xxx", "---", "\\\\\\"))
    for phase, colour, hatch in zip(phases, itertools.cycle(PHASE_COLOURS), hatches):
        widths = np.array([seconds.get(phase, 0.0) for seconds in means.values()])
        style = {"facecolor": "none", "edgecolor": colour, "linewidth": 1.2} if hatch else {"color": colour}
        axes.barh(range(len(means)), widths, left=left, height=0.62, hatch=hatch, label=phase, **style)
        left += widths
    name_rows(axes, [called(name) for name in means])
    axes.set_xlabel("seconds")
    legend(figure)
    caption = "Wall-clock time of a run by phase" + (", mean over seeds." if num_seeds(groups) > 1 else ".")
    told = _told({name: sum(seconds.values()) for name, seconds in means.items()}, True)
    return Plot("Where the time went", caption, f"Bar chart of the seconds by phase. In all: {told}.", figure)


def draw_graph(run: RunRecords, axes: Axes) -> int:
    """Draws the graph of a run, whose weights are known, in the colours of the page; returns the number of links."""
    weights, names = np.array(run.facts["graph"]["weights"]), tuple(run.facts.get("names") or ())
    server = run.graph == "server"
    graph = Graph(weights, run.graph, require_symmetric=False, connected=False, is_server=server)
    draw(replace(graph, names=names if len(names) == len(weights) else ()), axes)
    _recolour(axes)
    return len(weights) if server else len(graph.edges)


def _recolour(axes: Axes) -> None:
    """Adapts the drawing to the page: links in the colour of the text, numbers dark on their light discs."""
    axes.set_title("")
    for links in axes.findobj(LineCollection):
        links.set_color(INK)
    for text in axes.texts:
        text.set_color("#16202c")
        text.set_visible(float(text.get_fontsize()) >= 5)  # smaller numbers would look like dots

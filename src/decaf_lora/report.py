"""How does one see what happened? One HTML file for a run or a comparison of runs.

The file needs no network and no script: the figures are inline SVG whose text and lines take the page's
colours, so one drawing serves the light page and the dark one. A run directory holds run.json; a comparison
holds run directories.
"""

import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from decaf_lora import records
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, draw
from decaf_lora.records import Aggregate, Record, SummaryRow

INK, FAINT = "#0a0b0c", "#d0d1d2"  # stand for the page's text and rule colours; `_inline` puts those in
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--rule)"}
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a class may be called "$5"
    "svg.fonttype": "none",
    "svg.hashsalt": "decaf",
}
# Okabe and Ito's colours, which the colour-blind can tell apart; the marker says the same once more.
LOOKS = {
    "decaf": ("#D55E00", "o"),
    "dlora": ("#0072B2", "s"),
    "dlora_fa": ("#56B4E9", "^"),
    "alternating": ("#009E73", "D"),
    "fedavg": ("#CC79A7", "v"),
    "flexlora": ("#E69F00", "P"),
    "fedex": ("#A0603A", "X"),
    "local": ("#8C8C8C", "x"),
    "centralized": (INK, ""),
}
PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#9AA5B1", "#CC79A7", "#56B4E9")
SPARE_LOOKS = [("#8A6FD1", "<"), ("#44AA99", ">"), ("#AA4466", "p"), ("#999933", "h"), ("#4477AA", "*")]
HEAT = LinearSegmentedColormap.from_list("heat", [(0, 0.447, 0.698, 0.0), (0, 0.447, 0.698, 1.0)])
GRAPHLESS = ("server", "pooled", "none")  # graph names of algorithms that do not use the run's graph
HALF, WHOLE = 5.6, 11.6  # inches: one column of the page, or both


@dataclass(frozen=True)
class Run:
    """One run directory, read."""

    name: str
    facts: dict[str, Any]
    records: list[Record]
    config: str
    environment: dict[str, Any]

    @property
    def algorithm(self) -> str:
        return str(self.facts["algorithm"])

    @property
    def graph(self) -> str:
        return str(self.facts["graph"]["name"])

    @property
    def partition(self) -> str:
        return str(self.facts["partition"]["name"])

    @property
    def seed(self) -> int:
        return int(self.facts["seed"])

    @property
    def uses_graph(self) -> bool:
        """Whether who talks to whom is what the graph says: not so for a server, pooled data, no exchange."""
        return bool(self.facts.get("uses_graph", self.graph not in GRAPHLESS and self.algorithm != "centralized"))


Groups = dict[str, list[Run]]  # algorithm -> its runs, one a seed
Values = Sequence[float | None] | None


@dataclass(frozen=True)
class Plot:
    """A figure for the page; `alt` is what a screen reader says."""

    title: str
    caption: str
    alt: str
    figure: Figure

    @property
    def wide(self) -> bool:
        return self.figure.get_figwidth() > HALF


@dataclass(frozen=True)
class Curve:
    """A value over rounds: the mean and the band around it, which is the mean itself if there is no band."""

    rounds: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def write_report(directory: Path | str) -> Path:
    """Write report.html for the run or the comparison in `directory` and return its path."""
    directory = Path(directory)
    runs = _read(directory)
    with matplotlib.rc_context(STYLE):
        sections = [
            (f"{graph} · {partition}", _plots(_by_algorithm(members)))
            for (graph, partition), members in _sections(runs).items()
        ]
    path = directory / "report.html"
    configurations = {run.name: run.config for run in runs}
    write_page(path, _title(runs), _facts(runs), _table(runs), sections, configurations, _environment(runs))
    return path


def write_page(
    path: Path,
    title: str,
    facts: dict[str, str],
    table: dict[str, Any],
    sections: Sequence[tuple[str, Sequence[Plot]]],
    configurations: dict[str, str],
    environment: dict[str, str],
) -> None:
    """Write a page of figures to `path`.

    facts: a few words each on what was done. table: `columns`, `note` and `groups`, (title, rows) of (text,
    highlighted) cells. sections: (title, figures, made under `STYLE`). configurations: name -> how to repeat it.
    """
    loader = jinja2.Environment(
        loader=jinja2.PackageLoader("decaf_lora"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    with matplotlib.rc_context(STYLE):
        inlined = [
            {
                "title": name,
                "plots": [(plot, _inline(plot, prefix=f"s{number}f{index}-")) for index, plot in enumerate(plots)],
            }
            for number, (name, plots) in enumerate(sections)
        ]
    page = loader.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        table=table,
        sections=inlined,
        configurations=configurations,
        environment=environment,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    records.replace_text(path, page)


def write_figures(directory: Path | str, folder: Path | str, suffix: str = ".png") -> list[Path]:
    """Write every figure of the report as a file of its own (.png, .svg or .pdf), on white, into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE | {"savefig.facecolor": "white"}):
        sections = _sections(_read(Path(directory)))
        for (graph, partition), members in sections.items():
            for plot in _plots(_by_algorithm(members)):
                words = [plot.title] if len(sections) == 1 else [graph, partition, plot.title]
                paths.append(folder / (re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()) + suffix))
                plot.figure.savefig(paths[-1], dpi=150)
    return paths


# --- reading ------------------------------------------------------------------------------------------------


def _read(directory: Path) -> list[Run]:
    """The runs in `directory`, in the order of its summary.json if it has one."""
    if (directory / "run.json").exists():
        return [_read_run(directory)]
    runs = [_read_run(path.parent) for path in sorted(directory.glob("*/run.json"))]
    if not runs:
        raise UserError(f"report: {directory} holds no run. Give the directory of a run or of a comparison.")
    summary = directory / "summary.json"
    listed = [_identity(row) for row in records.read_summary(summary)] if summary.exists() else []
    place = {identity: index for index, identity in reversed(list(enumerate(listed)))}
    return sorted(runs, key=lambda run: place.get(_identity(run), len(place)))


def _read_run(directory: Path) -> Run:
    environment = directory / "environment.json"
    config = directory / "config.yaml"
    return Run(
        name=directory.resolve().name,
        facts=records.read_facts(directory),
        records=records.read_records(directory / "records.jsonl"),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        environment=json.loads(environment.read_bytes()) if environment.exists() else {},
    )


def _row(run: Run) -> SummaryRow:
    return records.summary_row(run.facts, run.records)


def _identity(run: Run | SummaryRow) -> tuple[str, str, str, int]:
    return run.algorithm, run.graph, run.partition, run.seed


def _sections(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """What is to be compared with what: the runs under one graph and partition.

    Baselines that have no use for the graph (a server, pooled data, no exchange) may have run once only; they
    belong to every graph of their partition.
    """
    bound = [run for run in runs if run.uses_graph]
    sections: dict[tuple[str, str], list[Run]] = {(run.graph, run.partition): [] for run in bound or runs}
    for run in runs:
        own = (run.graph, run.partition)
        partition = [setting for setting in sections if setting[1] == run.partition]
        if "uses_graph" in run.facts:
            settings = [own] if run.uses_graph else partition or [own]
        else:  # written by an earlier version, which ran baselines under every graph
            settings = [own] if own in sections else partition or list(sections)
        for setting in settings:
            sections.setdefault(setting, []).append(run)
    return sections


def _by_algorithm(runs: Iterable[Run]) -> Groups:
    """The runs of each algorithm; a seed counts once."""
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        groups.setdefault(run.algorithm, {})[run.seed] = run
    return {algorithm: list(seeds.values()) for algorithm, seeds in groups.items()}


# --- the page's text ----------------------------------------------------------------------------------------


def _title(runs: Sequence[Run]) -> str:
    algorithms = {run.algorithm for run in runs}
    subject = runs[0].algorithm if len(algorithms) == 1 else f"{len(algorithms)} algorithms"
    tasks = _distinct(run.facts.get("task") for run in runs)
    return f"{subject} on {tasks}" if tasks else subject


def _distinct(values: Iterable[object]) -> str:
    """The different values, in order of appearance, as one text."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """What was run, in a few words each."""
    peers = [run for run in runs if run.algorithm != "centralized"] or runs
    bound = [run for run in peers if run.uses_graph] or peers
    facts = {
        "Task": _distinct(run.facts.get("task") for run in runs),
        "Algorithms" if len(runs) > 1 else "Algorithm": _distinct(run.algorithm for run in runs),
        "Agents": _distinct(run.facts.get("agents") for run in peers),
        "Ranks": _distinct(", ".join(map(str, ranks)) for run in peers if (ranks := run.facts.get("ranks"))),
        "Rounds": _distinct(run.facts.get("rounds") for run in runs),
        "Graph": _distinct(_graph_name(run) for run in bound),
        "Partition": _distinct(run.partition for run in peers),
        "Seeds" if len(runs) > 1 else "Seed": _distinct(run.seed for run in runs),
        "Score": _distinct(run.facts.get("score_name") for run in runs),
    }
    return {name: value for name, value in facts.items() if value}


def _graph_name(run: Run) -> str:
    sigma = run.facts["graph"].get("sigma_2")
    return run.graph + ("" if sigma is None else f" (σ₂ = {sigma:.3f})")


def _table(runs: Sequence[Run]) -> dict[str, Any]:
    """The summary for the template: for each section its rows, and which of their cells are the best.

    The centralized baseline competes with nobody: it sees all the data.
    """
    algorithms = list(dict.fromkeys(run.algorithm for run in runs))
    everything: list[SummaryRow] = []
    groups = []
    for setting, of_setting in _sections(runs).items():
        summary = [replace(_row(run), graph=setting[0], partition=setting[1]) for run in of_setting]
        everything += summary
        members = sorted(records.aggregate(summary), key=lambda row: algorithms.index(row.algorithm))
        best = _best([row for row in members if row.algorithm != "centralized"])
        lines = [
            [(text, (id(row), column) in best) for column, text in enumerate(records.cells(row))] for row in members
        ]
        # The title says what graph and partition (columns 1 and 2) are.
        groups.append((" · ".join(setting), [line[:1] + line[3:] for line in lines]))
    several_seeds = any(row.seeds > 1 for row in records.aggregate(everything))
    notes = ["± is the standard deviation over seeds."] if several_seeds else []
    if any(best for _, lines in groups for line in lines for _, best in line):
        notes.append("Highlighted: the best that does not pool the data.")
    notes.append("Scores are those of the last evaluated round.")
    return {
        "columns": records.COLUMNS[:1] + records.COLUMNS[3:],
        "groups": groups,
        "pivots": [_pivot(everything, metric) for metric in records.SHOWN] if len(groups) > 1 else [],
        "note": " ".join(notes),
    }


def _pivot(rows: Sequence[SummaryRow], metric: str) -> dict[str, Any]:
    """A score by algorithm and setting for the template, the best of each column marked as in the other table."""
    pivot = records.pivot(rows, metric)
    lines = {algorithm: pivot.cells(algorithm) for algorithm in pivot.lines}
    best = set()
    for column in range(len(pivot.settings)):
        spreads = {name: of_all[column] for name, of_all in pivot.lines.items() if name != "centralized"}
        means = {name: round(s.mean, 3) for name, s in spreads.items() if s is not None and s.mean is not None}
        if len(means) > 1:
            best |= {(name, column) for name, mean in means.items() if mean == max(means.values())}
    return {
        "title": records.SHOWN[metric].capitalize(),
        "graphs": pivot.graphs,
        "partitions": [partition for _, partition in pivot.settings],
        "lines": [(name, [(text, (name, k) in best) for k, text in enumerate(of)]) for name, of in lines.items()],
    }


def _best(rows: Iterable[Aggregate]) -> set[tuple[int, int]]:
    """(id of the row, column) of the best scores, as far as the three decimals shown can tell."""
    best = set()
    for metric, column in (("mean_score", 4), ("worst_score", 5), ("averaged_score", 7)):
        means = {id(row): round(mean, 3) for row in rows if (mean := getattr(row, metric).mean) is not None}
        if len(means) > 1:
            best |= {(row, column) for row, mean in means.items() if mean == max(means.values())}
    return best


def _environment(runs: Sequence[Run]) -> dict[str, str]:
    """The environments of the runs as one table; where they differ, every value is listed."""
    keys = dict.fromkeys(key for run in runs for key in run.environment)
    table = {key: _distinct(run.environment.get(key) for run in runs) for key in keys if key != "started"}
    started = sorted(str(run.environment["started"]) for run in runs if run.environment.get("started"))
    if started:
        table["started"] = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    return table


# --- curves -------------------------------------------------------------------------------------------------


def _looks(algorithms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each algorithm: always the same for those of the package."""
    names = list(algorithms)
    strangers = [name for name in names if name not in LOOKS]
    spare = {name: SPARE_LOOKS[index % len(SPARE_LOOKS)] for index, name in enumerate(strangers)}
    return {name: LOOKS.get(name) or spare[name] for name in names}


def _one(value: float | None) -> Values:
    return None if value is None else [value]


def _curve(runs: Sequence[Run], value: Callable[[Record], Values], agents: bool) -> Curve | None:
    """`value` over the rounds that every run has, mean over agents and seeds.

    The band is the range over seeds; with one seed, the range over agents if `agents`, otherwise none.
    """
    tables = [
        {
            record.round: [np.nan if number is None else number for number in values]
            for record in run.records
            if (values := value(record))
        }
        for run in runs
    ]
    tables = [table for table in tables if table]
    rounds = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    if not rounds:
        return None
    means = np.array([[np.mean(table[number]) for number in rounds] for table in tables])  # (seeds, rounds)
    spread = np.array([tables[0][number] for number in rounds]).T if len(tables) == 1 and agents else means
    return Curve(np.array(rounds), means.mean(axis=0), spread.min(axis=0), spread.max(axis=0))


def _draw(axes: Axes, groups: Groups, value: Callable[[Record], Values], log: bool = False) -> list[str]:
    """A curve for each algorithm; returns those that have no point on the axis because all are zero."""
    unseen = []
    for algorithm, (colour, marker) in _looks(groups).items():
        curve = _curve(groups[algorithm], value, agents=len(groups) == 1)
        if curve is None:
            continue
        mean, low, high = (
            np.where(line > 0, line, np.nan) if log else line for line in (curve.mean, curve.low, curve.high)
        )
        if log and np.isnan(mean).all():
            unseen.append(algorithm)
            continue
        axes.plot(curve.rounds, mean, label=algorithm, **_line(algorithm, colour, marker, len(mean)))
        if (curve.high > curve.low).any():
            axes.fill_between(curve.rounds, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.margins(x=0.02)
    if log and axes.lines:
        log_axis(axes)
    return unseen


def _line(algorithm: str, colour: str, marker: str, points: int) -> dict[str, Any]:
    """The style of a curve. Markers are about ten a curve; a single point is always marked."""
    if algorithm == "centralized":
        return {"color": colour, "linestyle": "--", "linewidth": 1.3, "marker": "" if points > 1 else "_"}
    return {"color": colour, "marker": marker, "markevery": max(1, points // 10)}


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis whose labels are plain text: 0.02, 0.05, or 10⁻⁶, 10⁻⁵ on a long one."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=9))
    label = _power if low < 1e-3 or high >= 1e4 else "{:g}".format
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.0e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"


def legend(figure: Figure) -> None:
    """One legend for all axes, above them, if there is anything to tell apart."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if len(entries) > 1:
        columns = max(1, int(figure.get_figwidth() * 11 / (6 + max(map(len, entries)))))
        rows = -(-len(entries) // columns)
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=-(-len(entries) // rows))


def _band(groups: Groups) -> str:
    """What the shaded band means, as a sentence for the caption."""
    if _seeds(groups) > 1:
        return " Bands: lowest to highest seed."
    return " Band: lowest to highest agent." if len(groups) == 1 and _agents(groups) > 1 else ""


def _seeds(groups: Groups) -> int:
    return max(len(runs) for runs in groups.values())


def _agents(groups: Groups) -> int:
    everything = (record for runs in groups.values() for run in runs for record in run.records)
    return max((len(record.scores or ()) for record in everything), default=0)


def _names(groups: Groups) -> str:
    return ", ".join(groups)


def _score_name(groups: Groups) -> str:
    return next((str(run.facts.get("score_name") or "score") for runs in groups.values() for run in runs), "score")


# --- figures ------------------------------------------------------------------------------------------------


def new_figure(width: float = HALF, height: float = 3.6) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _plots(groups: Groups) -> list[Plot]:
    """The figures of a section; one without data is left out."""
    makers = (
        _scores,
        _scores_by_bytes,
        _losses,
        _consensus,
        _truncation,
        _final_scores,
        _labels,
        _graph,
        _seconds,
    )
    return [plot for maker in makers if (plot := maker(groups))]


def _scores(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    _draw(axes, groups, lambda record: record.scores)
    caption = "Each agent's own model on the test data, mean over agents." + _band(groups)
    if len(groups) == 1 and _agents(groups) > 1:
        [runs] = groups.values()
        averaged = _curve(runs, lambda record: _one(record.averaged_score), agents=False)
        if averaged is not None and axes.lines:
            axes.lines[0].set_label("mean over agents")
            axes.plot(averaged.rounds, averaged.mean, ":", color=INK, label="averaged model")
            caption += " Dotted: the model that averages all agents' adapters."
    if not axes.lines:
        return None
    axes.set_ylabel(_score_name(groups))
    legend(figure)
    return Plot("Score by round", caption, f"Line chart of the score by round for {_names(groups)}.", figure)


def _scores_by_bytes(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    ends, flat = [], []
    for algorithm, (colour, marker) in _looks(groups).items():
        curve = _curve(groups[algorithm], lambda record: record.scores, agents=False)
        if curve is None:
            continue
        sent = np.mean([_sent(run, curve.rounds) for run in groups[algorithm]], axis=0)
        style = _line(algorithm, colour, marker, len(sent))
        if sent[-1] > 0:
            axes.plot(sent, curve.mean, label=algorithm, **style)
            ends.append(sent[-1])
        else:
            flat.append(algorithm)
            style |= {"marker": "", "linestyle": style.get("linestyle", "-.")}
            axes.axhline(curve.mean[-1], label=algorithm, **style)
    if not ends:
        return None
    if max(ends) > 10 * min(ends):
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_xlabel("bytes sent by one agent")
    axes.set_ylabel(_score_name(groups))
    legend(figure)
    caption = "The same score against what one agent has sent so far (mean over agents)."
    if flat:
        caption += f" Horizontal: the final score of what sends nothing ({', '.join(flat)})."
    alt = f"Line chart of the score by bytes sent for {_names(groups)}."
    return Plot("Score by bytes sent", caption, alt, figure)


def _sent(run: Run, rounds: np.ndarray) -> np.ndarray:
    """The bytes an agent had sent by the end of each of `rounds`."""
    total = np.cumsum([record.bytes_sent for record in run.records])
    return np.array([sent for sent, record in zip(total, run.records, strict=True) if record.round in rounds])


def _losses(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    _draw(axes, groups, lambda record: record.losses)
    if not axes.lines:
        return None
    axes.set_ylabel("training loss")
    legend(figure)
    caption = "Mean over the local steps of a round and over agents, each on its own data." + _band(groups)
    alt = f"Line chart of the training loss by round for {_names(groups)}."
    return Plot("Training loss by round", caption, alt, figure)


def _consensus(groups: Groups) -> Plot | None:
    figure = new_figure()
    axes = figure.add_subplot()
    unseen = _draw(axes, groups, lambda record: _one(record.consensus_distance), log=True)
    if not axes.lines:
        return None
    axes.set_ylabel("distance (log scale)")
    legend(figure)
    caption = "How far the agents' products BA are from their mean: Frobenius norm, RMS over agents."
    alt = f"Line chart of the consensus distance by round for {_names(groups)}."
    return Plot("Consensus distance by round", caption + _band_over_seeds(groups) + _zeros(unseen), alt, figure)


def _truncation(groups: Groups) -> Plot | None:
    parts: dict[str, tuple[str, Callable[[Record], Values]]] = {
        "consensus interference": (
            "what averaging the factors A and B loses against averaging the products BA",
            lambda record: _one(record.interference),
        ),
        "truncation tail": (
            "what cutting the averaged product back to the rank loses",
            lambda record: _one(record.tail),
        ),
    }
    everything = [record for runs in groups.values() for run in runs for record in run.records]
    shown = [name for name, (_, value) in parts.items() if any((value(record) or [0])[0] for record in everything)]
    if not shown:
        return None
    figure = new_figure(WHOLE, 3.4) if len(shown) > 1 else new_figure()
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    zeros, meanings = [], []
    for axes, name in zip(panels, shown, strict=True):
        meaning, value = parts[name]
        if unseen := _draw(axes, groups, value, log=True):
            zeros.append(f"{name} ({', '.join(unseen)})")
        meanings.append(f"{name.capitalize()}: {meaning}.")
        if len(shown) > 1:
            axes.set_title(name, fontsize=10)
    panels[0].set_ylabel("Frobenius norm (log scale)")
    legend(figure)
    caption = f"{' '.join(meanings)} RMS over layers and agents.{_band_over_seeds(groups)}{_zeros(zeros)}"
    alt = f"Line chart of {' and '.join(shown)} by round for {_names(groups)}."
    title = "Interference against truncation" if len(shown) > 1 else shown[0].capitalize()
    return Plot(title, caption, alt, figure)


def _band_over_seeds(groups: Groups) -> str:
    return _band(groups) if _seeds(groups) > 1 else ""


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
    for place, (algorithm, (colour, _)) in enumerate(_looks(finals).items()):
        scores = np.array(finals[algorithm])
        axes.plot([scores.mean()] * 2, [place - 0.34, place + 0.34], color=colour, linewidth=2.4)
        jitter = np.random.Generator(np.random.PCG64(place)).uniform(-0.22, 0.22, len(scores))
        ranks: list[int] = next((r for run in groups[algorithm] if (r := run.facts.get("ranks"))), [])
        if ranks and len(scores) % len(ranks) == 0 and algorithm != "centralized":
            unequal = True
            axes.plot(scores, place + jitter, linestyle="")  # for the limits of the axis, which a text does not widen
            for rank, score, height in zip(np.resize(ranks, len(scores)), scores, place + jitter, strict=True):
                axes.text(score, height, str(rank), color=colour, fontsize=9, ha="center", va="center")
        else:
            axes.plot(scores, place + jitter, "o", color=colour, markersize=4, alpha=0.55, markeredgewidth=0)
    _name_rows(axes, finals)
    axes.set_xlabel(_score_name(groups))
    seeds = " of every seed" if _seeds(groups) > 1 else ""
    what = "One mark an agent, its rank," if unequal else "One dot an agent"
    caption = f"{what}{seeds} at the last evaluation; the bar is their mean."
    alt = f"Dot plot of the final score of every agent for {_names(groups)}."
    return Plot("Final score of every agent", caption, alt, figure)


def _name_rows(axes: Axes, names: Collection[str]) -> None:
    """Rows from the top down, one a name, for a y axis; a single row does not fill the height."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(max(len(names) - 0.5, 1), -0.5 if len(names) > 1 else -1)
    axes.grid(axis="y", visible=False)


def _peer(groups: Groups) -> Run:
    """The run whose graph and partition stand for the section."""
    runs = [run for group in groups.values() for run in group]
    peers = [run for run in runs if run.algorithm != "centralized"] or runs
    return next((run for run in peers if run.uses_graph), peers[0])


def _labels(groups: Groups) -> Plot | None:
    run = _peer(groups)
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
                colour = "white" if count > 0.55 * counts.max() else INK
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    else:
        figure.colorbar(image, label="examples").outline.set_visible(False)
    step = _step(classes)
    axes.set_yticks(range(0, classes, step), names[::step])
    axes.set_xticks(range(0, agents, _step(agents)))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("agent")
    caption = f"Training examples of each class (rows) that each agent (columns) holds; seed {run.seed}."
    alt = f"Heat map of examples by class and agent under {run.partition}."
    return Plot("Who holds what", caption, alt, figure)


def _step(count: int) -> int:
    """Label every how many of `count` rows or columns: a round number that leaves at most 26 labels."""
    steps = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return next(step for step in steps if count <= 26 * step)


def _graph(groups: Groups) -> Plot | None:
    run = _peer(groups)
    weights = run.facts["graph"].get("weights")
    if not weights or len(weights) == 1:
        return None
    figure = new_figure(height=3.9)
    axes = figure.add_subplot()
    server = run.graph == "server"
    draw(Graph(np.array(weights), run.graph, require_symmetric=False, connected=False, is_server=server), axes)
    _recolour(axes)
    caption = "The agents and who exchanges with whom."
    if (sigma := run.facts["graph"].get("sigma_2")) is not None:
        caption += f" σ₂ = {sigma:.3f}: one exchange leaves at most this share of disagreement (0: none, 1: all)."
    alt = f"Drawing of the graph {run.graph} of {len(weights)} agents."
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
    for phase, colour in zip(phases, itertools.cycle(PHASE_COLOURS)):
        widths = np.array([seconds.get(phase, 0.0) for seconds in means.values()])
        axes.barh(range(len(means)), widths, left=left, height=0.62, color=colour, label=phase)
        left += widths
    _name_rows(axes, means)
    axes.set_xlabel("seconds")
    legend(figure)
    caption = "Wall-clock time of a run by phase" + (", mean over seeds." if _seeds(groups) > 1 else ".")
    return Plot("Where the time went", caption, f"Bar chart of the seconds by phase for {_names(groups)}.", figure)


def _recolour(axes: Axes) -> None:
    """Let the drawing follow the page: links in the text's colour, numbers dark on their light discs."""
    axes.set_title("")
    for links in axes.findobj(LineCollection):
        links.set_color(INK)
    for text in axes.texts:
        text.set_color("#16202c")
        text.set_visible(float(text.get_fontsize()) >= 5)  # no dots for digits


def _inline(plot: Plot, prefix: str) -> Markup:
    """The figure as an SVG element for the page: its colours and font, and ids that no other figure has."""
    buffer = io.StringIO()
    plot.figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prologue inside HTML
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # the page has it
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1))

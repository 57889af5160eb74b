"""How do the figures look? Colours, markers, axes and legends, the same in every figure."""

from collections.abc import Collection, Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, FAINT = "#0a0b0c", "#d0d1d2"  # placeholders, for which `page.inline` puts the page's own text and rule colours
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
# Okabe and Ito's colours, which colour-blind people can tell apart; each algorithm also has a marker of its own.
LOOKS = {
    "decaf": ("#D55E00", "o"),
    "decaf_tracked": ("#009E73", "D"),
    "dlora": ("#0072B2", "s"),
    "dlora_fa": ("#56B4E9", "^"),
    "alternating": ("#8A6FD1", "<"),
    "fedsa": ("#E69F00", "P"),
    "core": ("#44AA99", ">"),
    "fedavg": ("#CC79A7", "v"),
    "fedprox": ("#AA4466", "p"),
    "fedadam": ("#882255", "h"),
    "scaffold": ("#B5651D", "d"),
    "flexlora": ("#DD88CC", "*"),
    "local": ("#8C8C8C", "x"),
    "centralized": (INK, ""),
}
PHASE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#9AA5B1", "#CC79A7", "#56B4E9")
SPARE_LOOKS = [
    ("#999933", "h"),
    ("#4477AA", "*"),
    ("#117733", "X"),
    ("#6699CC", "8"),
    ("#BBAA00", "H"),
    ("#774411", "1"),
]
HEAT = LinearSegmentedColormap.from_list("heat", [(0, 0.447, 0.698, 0.0), (0, 0.447, 0.698, 1.0)])
HALF, WHOLE = 5.6, 11.6  # inches: one column of the page, or both


def new_figure(width: float = HALF, height: float = 3.6) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def looks(algorithms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Algorithm -> (colour, marker). Those of this package always have the same; others take spare ones in turn."""
    names = list(algorithms)
    strangers = [name for name in names if name not in LOOKS]
    spare = {name: SPARE_LOOKS[index % len(SPARE_LOOKS)] for index, name in enumerate(strangers)}
    return {name: LOOKS.get(name) or spare[name] for name in names}


def line_style(algorithm: str, colour: str, marker: str, points: int) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot` for a curve of `points` points: about ten markers, and one on a single point."""
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
    """Puts one legend for all axes above them, if there are at least two entries."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if len(entries) > 1:
        columns = max(1, int(figure.get_figwidth() * 11 / (6 + max(map(len, entries)))))
        rows = -(-len(entries) // columns)
        figure.legend(list(entries.values()), list(entries), loc="outside upper left", ncols=-(-len(entries) // rows))


def name_rows(axes: Axes, names: Collection[str]) -> None:
    """Labels the y axis with one row for each name, from the top down; a single row does not fill the height."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(max(len(names) - 0.5, 1), -0.5 if len(names) > 1 else -1)
    axes.grid(axis="y", visible=False)

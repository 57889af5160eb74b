"""How do the figures look? Colours, markers, axes and legends, the same in every figure."""

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, FAINT = "#0a0b0c", "#d0d1d2"  # placeholders, for which `page.inline` puts the page's own text and rule colours
LOOKS = {
    "decaf": ("#d53d01", "o"),
    "decaf_tracked": ("#0b5229", "D"),
    "dlora": ("#2062f2", "s"),
    "dlora_fa": ("#4e055d", "^"),
    "alternating": ("#3f4db8", "<"),
    "fedsa": ("#8a6100", "P"),
    "core": ("#00757f", ">"),
    "fedavg": ("#cc20ac", "v"),
    "fedprox": ("#9c2f2f", "p"),
    "fedadam": ("#8b3fa0", "h"),
    "scaffold": ("#7a4b00", "d"),
    "flexlora": ("#5f6f00", "*"),
    "local": ("#757575", "x"),
    "centralized": (INK, ""),
}
"""Algorithm -> colour on white, and marker.

`tests/test_looks.py` checks their contrast, and that colour-blind readers can tell them apart."""
SPARE_LOOKS = [
    ("#a3195b", "X"),
    ("#35608f", "8"),
    ("#4d7300", "H"),
    ("#7b4b94", "1"),
    ("#8f4700", "2"),
    ("#00647a", "3"),
]
DARK = {
    "#d53d01": "#ffa566",
    "#0b5229": "#22dd92",
    "#2062f2": "#6db2f7",
    "#4e055d": "#cd6bff",
    "#cc20ac": "#ff4d7a",
    "#757575": "#949ba4",
    "#8a6100": "#e8b84a",
    "#3f4db8": "#9aa6ff",
    "#00757f": "#4fd3e0",
    "#9c2f2f": "#ff8f85",
    "#5f6f00": "#c3d34c",
    "#8b3fa0": "#e79cf2",
    "#7a4b00": "#e0a35c",
    "#a3195b": "#ff7fb5",
    "#35608f": "#8fb8ec",
    "#4d7300": "#a8d64f",
    "#7b4b94": "#d3a6ef",
    "#8f4700": "#f0a860",
    "#00647a": "#5cc8e6",
}
"""Colour on white -> the same on the dark page."""
DASHES: dict[str, Any] = {
    "decaf_tracked": (0, (6, 1.5)),
    "dlora": (0, (4, 1.5, 1, 1.5)),
    "dlora_fa": (0, (2.5, 1.2)),
    "fedavg": (0, (8, 1.5, 1, 1.5, 1, 1.5)),
    "alternating": (0, (3, 1.5, 3, 3)),
    "fedsa": (0, (10, 2)),
    "core": (0, (1, 2.5)),
    "fedprox": (0, (6, 1.5, 1, 1.5, 1, 1.5, 1, 1.5)),
    "fedadam": (0, (2, 4)),
    "scaffold": (0, (12, 2, 2, 2)),
    "flexlora": (0, (5, 1.2, 5, 3.5)),
    "local": (0, (1, 1.2)),
    "centralized": (0, (5, 3)),
}
"""Algorithm -> dashes of its line; others are solid."""
NAMES = {
    "decaf": "DeCAF",
    "decaf_tracked": "DeCAF, tracked",
    "dlora": "DLoRA",
    "dlora_fa": "DLoRA-FA",
    "fedsa": "FedSA",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedadam": "FedAdam",
    "scaffold": "SCAFFOLD",
    "flexlora": "FlexLoRA",
}
"""Algorithm -> its name for people; others are called as they are."""
PAGE_COLOURS = {INK: "currentColor", FAINT: "var(--rule)", **{light: f"var(--c{light[1:]})" for light in DARK}}
"""Colour in a figure -> the colour of the page, which is another one where the page is dark."""
PHASE_COLOURS = ("#8a6100", "#3f4db8", "#00757f", "#8b3fa0", "#9c2f2f", "#5f6f00")
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
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
HEAT = LinearSegmentedColormap.from_list("heat", [(0, 0.447, 0.698, 0.0), (0, 0.447, 0.698, 0.55)])
"""Never so full that the text of the page could not be read on it."""
HALF, WHOLE = 5.2, 10.8  # inches: one column of the page, or both


def new_figure(width: float = HALF, height: float = 3.6) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def looks(algorithms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Algorithm -> (colour, marker). Those of this package always have the same; others take spare ones in turn."""
    names = list(algorithms)
    strangers = [name for name in names if name not in LOOKS]
    spare = {name: SPARE_LOOKS[index % len(SPARE_LOOKS)] for index, name in enumerate(strangers)}
    return {name: LOOKS.get(name) or spare[name] for name in names}


def called(algorithm: str, most: int = 32) -> str:
    """The name of an algorithm or a setting for people, at most `most` characters long."""
    name = NAMES.get(algorithm, algorithm)
    return name if len(name) <= most else name[: most - 1] + "…"


def line_style(algorithm: str, colour: str, marker: str, points: int) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot` for a curve of `points` points: about ten markers, and one on a single point."""
    style = {"color": colour, "linestyle": DASHES.get(algorithm, "-"), "marker": marker}
    if algorithm == "centralized":
        return {**style, "linewidth": 1.3, "marker": "" if points > 1 else "_"}
    return {**style, "markevery": max(1, points // 10)}


def label_ends(axes: Axes, extra: Iterable[tuple[float, str, str]] = ()) -> None:
    """Writes the name of each line at its right end, beside the axes, so far apart that all can be read.

    A thin line leads from the end of a curve to its name where others are in the way. Call it last: the limits of the
    axes must not change any more.

    Args:
        axes: whose lines with a label are named.
        extra: height, text and colour of further names, of lines from edge to edge that have no label.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    ends = []
    for line in axes.lines:
        text = str(line.get_label())
        points = np.column_stack([np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)])
        points = points[np.isfinite(points).all(axis=1)]
        if not text.startswith("_") and len(points):
            ends.append((*points[-1], text, to_hex(line.get_color())))
    right = axes.get_xlim()[1]
    ends += [(right, height, text, colour) for height, text, colour in extra]
    if not ends:
        return
    places = axes.transLimits.transform(axes.transScale.transform([end[:2] for end in ends]))
    grid = axes.get_gridspec()
    tall = figure.get_figheight() / (grid.nrows if grid else 1) * 72 - 60  # points: without the axis' own labels
    heights = apart(np.clip(places[:, 1], 0, 1), 13 / tall)
    for (x, place), height, (_, _, text, colour) in zip(places, heights, ends, strict=True):
        axes.annotate(
            text,
            xy=(min(x, 1), place),
            xytext=(1.035, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 1},
            annotation_clip=False,
        )


def apart(heights: np.ndarray, distance: float) -> np.ndarray:
    """The heights, 0 to 1, moved as little as needed to be at least `distance` apart, in their order, and below 1."""
    if len(heights) == 0:
        return heights
    order = np.argsort(heights, kind="stable")
    steps = distance * np.arange(len(heights))
    # Least squares under an order: what is too close shares a block, whose middle stays (isotonic regression).
    blocks: list[list[float]] = []  # sum, count
    for value in heights[order] - steps:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    moved = np.empty(len(heights))
    placed = np.concatenate([[total / count] * int(count) for total, count in blocks]) + steps
    moved[order] = np.minimum(placed, 1 - distance * np.arange(len(heights))[::-1])
    return moved


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

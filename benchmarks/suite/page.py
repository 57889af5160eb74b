"""How does one read the results? docs/performance.md, made from the committed JSON alone."""

from __future__ import annotations

from statistics import median
from typing import Any

from . import cells
from .cells import Bar, Results
from .machine import ROOT
from .timing import shown

PLACE = ROOT / "docs" / "performance.md"

HEAD = """# How fast is it?

This page is made by `python -m benchmarks.suite --page` from `benchmarks/results_suite_cpu.json` and
`benchmarks/results_suite_cuda.json`. `make bench` measures a cell or two of every row, and
`python -m benchmarks.suite --full` the whole grid. Runs that are compared take turns, so that a busy machine slows all
of them alike. A number is the median of the turns' ratios, with the quartiles in brackets; a ratio "x / ours" of 2 says
that x takes twice as long. A bar that is missed stays on the page, with the reason.
"""

NOTHING = {
    "cpu": "Nothing has been measured yet.\n",
    "cuda": """No GPU has been at hand yet, so nothing has been measured on one. The one command
`python -m benchmarks.suite --device cuda` does it: every row above with the peak memory of the device, `torchrun` with
NCCL on one rank, QR against the Gram form and the batched float64 decompositions, the peak against `decaf plan`,
`torch.compile` and CUDA graphs.
""",
}


def written() -> str:
    """The page."""
    parts = [HEAD]
    for device, title in (("cpu", "On a CPU"), ("cuda", "On a GPU")):
        results = Results(cells.place(device))
        parts.append(f"## {title}\n")
        if not results.cells:
            parts.append(NOTHING[device])
            continue
        parts += [_where(results), _verdicts(results)]
        parts += [_row(results, name) for name in cells.ROWS if results.of(name)]
        if left := [name.replace("_", " ") for name in cells.rows_of(device) if not results.of(name)]:
            parts.append(f"Not measured here yet: {', '.join(left)}.\n")
    return "\n".join(parts)


def verdict(bar: Bar) -> str:
    """met, missed or open."""
    return {True: "met", False: "missed", None: "open"}[bar.met]


def in_a_line(figures: dict[str, Any]) -> str:
    """The figures of a cell that are ratios or single numbers, for the terminal."""
    if "left_out" in figures:
        return f"left out: {figures['left_out']}"
    short = {
        name: value
        for name, value in figures.items()
        if isinstance(value, int | float) or (isinstance(value, dict) and "median" in value)
    }
    return ", ".join(f"{name} {shown(value)}" for name, value in short.items())


def _where(results: Results) -> str:
    """Hardware, versions and commits, as they differ between the cells."""

    def values(*names: str) -> str:
        machines = [cell["machine"] for cell in results.cells]
        return ", ".join(dict.fromkeys(str(m[name]) for m in machines for name in names if m.get(name)))

    loads = [cell["machine"]["load"] for cell in results.cells]
    lines = [
        f"{values('processor')}, {values('cpu_count')} cores, {values('memory')} GiB"
        + (f"; {values('gpu')}, CUDA {values('cuda')}" if values("gpu") else "")
        + f"; Python {values('python')}, torch {values('torch')}, transformers {values('transformers')}, "
        f"PEFT {values('peft')}; threads: {values('threads')}."
    ]
    dates = sorted(cell["machine"]["started"][:10] for cell in results.cells)
    period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    commits = ", ".join(_short(c) for c in dict.fromkeys(cell["machine"]["commit"] for cell in results.cells))
    lines.append(f"Measured {period}, at commit {commits}.")
    low, middle, high = (f"{load:.1f}" for load in (min(loads), median(loads), max(loads)))
    lines.append(f"Load of the machine before a cell: {low} to {high}, {middle} in the middle.\n")
    return "\n".join(lines)


def _short(commit: str) -> str:
    name, _, edited = commit.partition("-")
    return name[:10] + (" with edits" if edited else "")


def _verdicts(results: Results) -> str:
    lines = ["| benchmark | bar | measured | | why it is missed |", "| --- | --- | --- | --- | --- |"]
    for name in cells.ROWS:
        row, found = cells.row(name), results.of(name)
        if not found:
            continue
        for bar in row.bars(found):
            why = (row.WHY.get(bar.name) or "not explained yet") if bar.met is False else ""
            title = name.replace("_", " ")
            lines.append(f"| {title}: {bar.name} | {bar.bar} | {bar.measured} | {verdict(bar)} | {why} |")
    return "\n".join(lines) + "\n"


def _row(results: Results, name: str) -> str:
    row = cells.row(name)
    _, _, text = (row.__doc__ or "").partition("\n\n")
    about = [f"### {row.QUESTION}\n", f"Against: {row.AGAINST}.\n", f"{text.strip()}\n"]
    parts = [*about, row.table(results.of(name)), ""]
    measured = [cell for cell in results.cells if cell["row"] == name]
    if any(cell["machine"].get("gpu") for cell in measured):
        peaks = [f"{_key(cell)}: {cell['machine']['peak'] / 2**20:,.0f}" for cell in measured]
        parts += [f"Peak memory of the device, MiB: {'; '.join(peaks)}.", ""]
    return "\n".join(parts)


def _key(cell: dict[str, Any]) -> str:
    return " ".join(str(value) for value in cell["settings"].values())

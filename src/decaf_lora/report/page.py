"""How is the page made? One HTML file for a run or a comparison of runs.

The file needs no network and no script. Its figures are inline SVG whose text and lines take the colours of the page,
so that one drawing serves the light page and the dark one. A run's directory holds run.json; a comparison's directory
holds those of its runs.
"""

import contextlib
import io
import re
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG

from decaf_lora import records
from decaf_lora.errors import UserError, remedy
from decaf_lora.report import words
from decaf_lora.report.figures import Plot, make_plots
from decaf_lora.report.gains import gains
from decaf_lora.report.overview import make_overview
from decaf_lora.report.reading import RunRecords, by_algorithm, by_setting, read_runs
from decaf_lora.report.style import DARK, PAGE_COLOURS, STYLE

_drawing = threading.RLock()
"""Held while figures are drawn: matplotlib's settings belong to the whole process, and a live page has a thread."""


def write_report(directory: Path | str) -> Path:
    """Writes report.html for the run or the comparison in `directory`, and returns its path.

    Raises:
        UserError: there is no run, one cannot be read, or the file cannot be written.
    """
    directory = Path(directory)
    runs = read_runs(directory)
    with writing(directory / "report.html"):
        return _write_report(directory, runs)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system inside into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        where, reason = str(path)[:200], error.strerror or error
        raise UserError(
            f"report: cannot write {where} ({reason}); {remedy(error)}, or copy the run to where there is some."
        ) from error


def _write_report(directory: Path, runs: list[RunRecords]) -> Path:
    path = directory / "report.html"
    records.replace_text(path, page_of(runs))
    return path


def page_of(runs: Sequence[RunRecords]) -> str:
    """The report of runs, which may still be under way, as HTML."""
    with _drawing, matplotlib.rc_context(STYLE):
        sections = _sections(runs)
    return page(
        words.title(runs),
        words.facts_shown(runs),
        words.summary_table(runs),
        sections,
        {run.name: run.config for run in runs if run.config},
        words.environments(runs),
        words.verdict(runs),
    )


def _sections(runs: Sequence[RunRecords]) -> list[tuple[str, list[Plot]]]:
    """Title and figures of the overview, if there are several settings, and of each setting."""
    settings = by_setting(runs)
    overview = make_overview(settings)
    drawn = any(plot.title == "The graphs" for plot in overview)
    sections = [("All settings", overview)] if overview else []
    for (graph, partition), members in settings.items():
        groups = by_algorithm(members)
        answer = [plot] if (plot := gains(groups)) else []
        sections.append((f"{graph} · {partition}", [*answer, *make_plots(groups, with_graph=not drawn)]))
    return sections


def write_page(
    path: Path,
    title: str,
    facts: dict[str, str],
    table: dict[str, Any],
    sections: Sequence[tuple[str, Sequence[Plot]]],
    configurations: dict[str, str],
    environment: dict[str, str],
    verdict: Sequence[str] = (),
) -> None:
    """Writes a page of figures to `path`.

    Args:
        path: the file to write.
        title: of the page.
        facts: name -> a few words on what was done.
        table: `columns`; `groups`, pairs of a title and rows of (text, highlighted) cells; `note`; and, where there are
            some, `pivots`, `differences` (a header and lines of text) and `warnings` (lines of text).
        sections: pairs of a title and figures, which were made under `STYLE`.
        configurations: name of a run -> its configuration, to repeat it.
        environment: name -> where it ran.
        verdict: sentences that open the page: what came out.
    """
    records.replace_text(path, page(title, facts, table, sections, configurations, environment, verdict))


def page(
    title: str,
    facts: dict[str, str],
    table: dict[str, Any],
    sections: Sequence[tuple[str, Sequence[Plot]]],
    configurations: dict[str, str],
    environment: dict[str, str],
    verdict: Sequence[str] = (),
) -> str:
    """The HTML that `write_page` writes, which explains the arguments."""
    loader = jinja2.Environment(
        loader=jinja2.PackageLoader("decaf_lora.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    with _drawing, matplotlib.rc_context(STYLE):
        inlined = [
            {
                "title": name,
                "plots": [(plot, inline(plot, prefix=f"s{number}f{index}-")) for index, plot in enumerate(plots)],
            }
            for number, (name, plots) in enumerate(sections)
        ]
    return loader.get_template("report.html.j2").render(
        title=title,
        facts=facts,
        table=table,
        sections=inlined,
        configurations=configurations,
        environment=environment,
        verdict=verdict,
        colours=DARK,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write_figures(directory: Path | str, folder: Path | str, suffix: str = ".png") -> list[Path]:
    """Writes every figure of a report to a file of its own, on white; returns the files.

    Args:
        directory: of the run or comparison.
        folder: to write to; made if missing.
        suffix: of the files: .png, .svg or .pdf.

    Raises:
        UserError: there is no run, one cannot be read, or a file cannot be written.
    """
    with writing(Path(folder)):
        return _write_figures(Path(directory), Path(folder), suffix)


def _write_figures(directory: Path, folder: Path, suffix: str) -> list[Path]:
    runs = read_runs(directory)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with _drawing, matplotlib.rc_context(STYLE | {"savefig.facecolor": "white", "pdf.fonttype": 42}):
        sections = _sections(runs)
        for title, plots in sections:
            for plot in plots:
                name = plot.title if len(sections) == 1 else f"{title} {plot.title}"
                paths.append(folder / (re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") + suffix))
                plot.figure.savefig(paths[-1], dpi=150)
    return paths


def inline(plot: Plot, prefix: str) -> Markup:
    """The figure as an SVG element in the colours and font of the page; `prefix` makes its ids differ from others'."""
    buffer = io.StringIO()
    # `Figure.savefig` draws all once more, without output, for what else than the layout may need it.
    FigureCanvasSVG(plot.figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # no XML prologue inside HTML
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)  # the page has it
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\g<1>#{prefix}", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.alt)}"', 1))

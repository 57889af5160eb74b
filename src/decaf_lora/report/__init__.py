"""How does one see what happened? One HTML file for a run or a comparison of runs."""

from decaf_lora.report.figures import Plot
from decaf_lora.report.page import write_figures, write_page, write_report
from decaf_lora.report.reading import RunRecords
from decaf_lora.report.style import (
    HALF,
    INK,
    LOOKS,
    PAGE_COLOURS,
    STYLE,
    WHOLE,
    legend,
    log_axis,
    new_figure,
)

__all__ = [
    "HALF",
    "INK",
    "LOOKS",
    "PAGE_COLOURS",
    "STYLE",
    "WHOLE",
    "Plot",
    "RunRecords",
    "legend",
    "log_axis",
    "new_figure",
    "write_figures",
    "write_page",
    "write_report",
]

"""What happened in a run, and how is it told?"""

from decaf_lora.records.formats import (
    COLUMNS,
    cells,
    columns,
    human_bytes,
    lines,
    references,
    table,
    to_csv,
    to_latex,
    to_markdown,
)
from decaf_lora.records.learnt import nothing_learnt
from decaf_lora.records.machine import environment
from decaf_lora.records.pivot_tables import SHOWN, Pivot, pivot, shown, tables
from decaf_lora.records.record import (
    Record,
    RecordWriter,
    read_facts,
    read_records,
    replace_text,
    whole_rounds,
    write_json,
)
from decaf_lora.records.summary import (
    METRICS,
    Aggregate,
    Spread,
    SummaryRow,
    aggregate,
    mean_score,
    read_summary,
    summarise,
    summary_row,
)

__all__ = [
    "COLUMNS",
    "METRICS",
    "SHOWN",
    "Aggregate",
    "Pivot",
    "Record",
    "RecordWriter",
    "Spread",
    "SummaryRow",
    "aggregate",
    "cells",
    "columns",
    "environment",
    "human_bytes",
    "lines",
    "mean_score",
    "nothing_learnt",
    "pivot",
    "read_facts",
    "read_records",
    "read_summary",
    "references",
    "replace_text",
    "shown",
    "summarise",
    "summary_row",
    "table",
    "tables",
    "to_csv",
    "to_latex",
    "to_markdown",
    "whole_rounds",
    "write_json",
]

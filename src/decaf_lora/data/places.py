"""What kind of file is it, and where in it does a row stand? For messages whose places a person finds in an editor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset

from decaf_lora.errors import UserError

PLACE = "decaf:place"
"""Name of the column of places (`place`), which the readers of files add."""


def place(rows: Dataset, index: int) -> str:
    """Where a row comes from: `line 3 of test.csv`, or `row 2` where the source has no lines."""
    return str(rows[index][PLACE]) if PLACE in rows.column_names else f"row {index}"


def refuse_place(names: Iterable[str], path: Path) -> None:
    """UserError if a file has a column of this name itself."""
    if PLACE in names:
        raise UserError(f"task.data: {path} has a column {PLACE!r}, a name kept for this program; rename it.")


_PACKED = (".gz", ".bz2", ".xz", ".zip")


def suffix_of(path: Path) -> str:
    """The lower-case suffix that says what a file holds: `.csv` of `A.CSV` and of `a.csv.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def stem_of(path: Path) -> str:
    """The name of a file without the suffix of `suffix_of` and those of packed files: `a` of `a.csv.gz`."""
    while path.suffix.lower() in _PACKED:
        path = path.with_suffix("")
    return path.stem

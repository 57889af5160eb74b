"""How is a table with delimiters (CSV, TSV) read? As its writer meant it, or not at all.

The delimiter and the meaning of quotes are found from the file. A single clear reading is taken, with a warning if it
is not the usual one. Between two possible readings the user has to choose. All faulty lines are named at once, by their
number in the file.
"""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from decaf_lora.config import TaskConfig
from decaf_lora.data.faults import Faults
from decaf_lora.data.places import PLACE, refuse_place
from decaf_lora.errors import UserError

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
SAMPLE = 200
"""Lines from which the delimiter is found."""
CHUNK = 50_000
"""Rows in one part of an Arrow table."""

Row = tuple[int, list[str]]
"""Number of a row's first line in the file, and its fields."""


class Dialect(NamedTuple):
    """How the fields of a row are told apart."""

    delimiter: str
    quotes: bool
    """Whether a quote at the beginning of a field encloses it."""


def read_delimited(
    raw: bytes, encoding: str, path: Path, suffix: str, config: TaskConfig, wanted: Sequence[str]
) -> tuple[pa.Table, list[str]]:
    """Reads a table with delimiters.

    Columns of whole numbers, numbers or truth values get these types. An empty field is a missing value.

    Args:
        raw: content of the file.
        encoding: of the text.
        path: of the file, for errors.
        suffix: .csv or .tsv, which says the usual delimiter.
        config: may give the delimiter and the meaning of quotes.
        wanted: columns that the task needs.

    Returns:
        The table, with the column `PLACE`, and warnings for the user about how it was read.

    Raises:
        UserError: the file is empty, has faulty lines, or can be read in two ways.
    """
    csv.field_size_limit(sys.maxsize)  # the library's default refuses texts of 128 KB
    notes: list[str] = []
    delimiter, told = _delimiter(raw, encoding, path, suffix, config, wanted)
    notes += told
    quotes, told = _quotes(raw, encoding, path, config, delimiter)
    notes += told
    rows = _rows(raw, encoding, Dialect(delimiter, quotes))
    first = next(rows, None)
    if first is None:
        raise UserError(f"task.data: {path} is empty.")
    header = _header(first[1], path, wanted)
    faults, parts = Faults(path), [_part([], [], header)]
    while chunk := list(itertools.islice(rows, CHUNK)):
        for line, fields in chunk:
            if _width(fields, header) != len(header):
                faults.add(line, f"{len(fields)} fields")
        if not faults:
            lines = [f"line {line} of {path.name}" for line, _ in chunk]
            parts.append(_part([fields[: len(header)] for _, fields in chunk], lines, header))
    faults.refuse(f"another number of fields than the {len(header)} of line {first[0]}")
    table = pa.concat_tables(parts)
    for i, name in enumerate(header):
        table = table.set_column(i, name, typed(table[name]))
    return table, notes


def typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of text as whole numbers, numbers or truth values if all of its values are; "" becomes missing."""
    column = pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
    trimmed = pc.utf8_trim_whitespace(column)
    values = trimmed.drop_null()

    def every(pattern: str) -> bool:
        return bool(pc.all(pc.match_substring_regex(values, f"^({pattern})$")).as_py())

    if not len(values):
        return column
    if every(r"[+-]?(0|[1-9][0-9]{0,17})"):  # codes such as 007 stay text
        return pc.cast(pc.replace_substring_regex(trimmed, r"^\+", ""), pa.int64())
    if pc.any(pc.match_substring_regex(values, r"^[+-]?[0-9]{16}")).as_py():  # a float would lose digits
        return column
    number = r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
    if every(rf"{number}|(?i:[+-]?(nan|inf|infinity))") and pc.any(pc.match_substring_regex(values, "[0-9]")).as_py():
        return pa.chunked_array([[None if v is None else float(v) for v in trimmed.to_pylist()]], pa.float64())
    if every(r"(?i:true|false)"):
        return pc.equal(pc.utf8_lower(trimmed), "true")
    return column


def _rows(raw: bytes, encoding: str, dialect: Dialect) -> Iterator[Row]:
    """All rows that are not blank.

    Raises csv.Error for a quote that encloses no field; its second argument is the number of the row's first line.
    """
    stream = io.TextIOWrapper(io.BytesIO(raw), encoding=encoding, newline="")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if dialect.quotes else csv.QUOTE_NONE
    reader = csv.reader(stream, delimiter=dialect.delimiter, quoting=quoting, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise csv.Error(str(error), line) from error
        if fields:
            yield line, fields


def _header(fields: Sequence[str], path: Path, wanted: Sequence[str]) -> list[str]:
    header = [name.strip() or f"Unnamed: {i}" for i, name in enumerate(fields)]
    refuse_place(header, path)
    for name in wanted:
        if header.count(name) > 1:
            raise UserError(f"task.data: {path} has {header.count(name)} columns {name!r}; rename all but one.")
    return [f"{name}.{header[:i].count(name)}" if name in header[:i] else name for i, name in enumerate(header)]


def _width(fields: Sequence[str], header: Sequence[str]) -> int:
    """Number of fields. Empty ones beyond the header do not count: some programs end every line with a delimiter."""
    count = len(fields)
    while count > len(header) and not fields[count - 1]:
        count -= 1
    return count


def _part(rows: Sequence[Sequence[str]], places: Sequence[str], header: Sequence[str]) -> pa.Table:
    columns = [pa.array([row[i] for row in rows], pa.string()) for i in range(len(header))]
    return pa.table([*columns, pa.array(places, pa.string())], names=[*header, PLACE])


def _delimiter(
    raw: bytes, encoding: str, path: Path, suffix: str, config: TaskConfig, wanted: Sequence[str]
) -> tuple[str, list[str]]:
    if config.delimiter is not None:
        return {"tab": "\t", "\\t": "\t"}.get(config.delimiter, config.delimiter), []
    usual = "\t" if suffix == ".tsv" else ","
    lines = list(itertools.islice(io.TextIOWrapper(io.BytesIO(raw), encoding=encoding, newline=""), SAMPLE))
    found: dict[str, list[list[str]]] = {}
    for delimiter in DELIMITERS:
        reader = csv.reader(lines, delimiter=delimiter)
        try:
            found[delimiter] = [row for row in reader if row]
        except csv.Error:
            continue
    headers = {d: [name.strip() for name in rows[0]] for d, rows in found.items() if rows}
    if not headers:
        return usual, []
    if all(len(header) == 1 for header in headers.values()):
        if _even(found.get(usual, []), 1):
            return usual, []
        whole = next((d for d in found if _even(found[d], 1)), usual)
        return whole, []
    named = {d: sum(name in header for name in wanted) for d, header in headers.items()}
    best = max(named.values())
    fitting = [d for d in named if best and named[d] == best]
    if not fitting:
        fitting = [d for d, header in headers.items() if len(header) > 1 and _even(found[d], len(header))]
    if len(fitting) > 1:
        shown = " or with ".join(f"{DELIMITERS[d]} (columns {', '.join(map(repr, headers[d]))})" for d in fitting)
        raise UserError(
            f"task.delimiter: {path} can be read with {shown}; say which, such as --task.delimiter {fitting[0]!r}."
        )
    chosen = fitting[0] if fitting else usual
    if chosen == usual:
        return chosen, []
    return chosen, [f"task.delimiter: {path.name} is separated by {DELIMITERS[chosen]}, and is read so."]


def _even(rows: Sequence[Sequence[str]], width: int) -> bool:
    return all(len(row) == width for row in rows[:-1]) and bool(rows)  # the last one may have been cut


def _quotes(raw: bytes, encoding: str, path: Path, config: TaskConfig, delimiter: str) -> tuple[bool, list[str]]:
    """Whether quotes enclose fields, and warnings for the user.

    Quotes are plain characters where they cannot enclose fields and all lines have the right number of fields as they
    stand.
    """
    if b'"' not in raw and '"'.encode(encoding) not in raw:
        return True, []
    if config.quoting is not None:
        quotes = config.quoting == "standard"
        try:
            for _ in _rows(raw, encoding, Dialect(delimiter, quotes)):
                pass
        except csv.Error as error:
            raise _bad_quote(path, error) from error
        return quotes, []
    plain = _fits(_rows(raw, encoding, Dialect(delimiter, False)))
    try:
        crossed = _crossed(raw, encoding, delimiter) if plain else None
        for _ in _rows(raw, encoding, Dialect(delimiter, True)):
            pass
    except csv.Error as error:
        if not plain:
            raise _bad_quote(path, error) from error
        return False, [
            f"task.quoting: line {error.args[1]} of {path.name} has a quote that encloses no field; all quotes are "
            "read as they stand."
        ]
    if crossed is not None:
        raise UserError(
            f"task.quoting: {path} can be read in two ways: the quote in line {crossed[0]} encloses a text of "
            f"{crossed[1]} lines, or it is a character like others and these are rows of their own; say which: "
            "--task.quoting standard, or none."
        )
    return True, []


def _bad_quote(path: Path, error: csv.Error) -> UserError:
    return UserError(
        f"task.data: {path}, line {error.args[1]}: a quote is not closed, or has text behind it; double the quotes "
        "within a quoted field, or, if quotes are characters like others, set task.quoting none."
    )


def _fits(rows: Iterable[Row]) -> bool:
    """Whether all rows have as many fields as the first."""
    found = iter(rows)
    try:
        header = next(found, None)
        return header is not None and all(_width(fields, header[1]) == len(header[1]) for _, fields in found)
    except csv.Error:
        return False


def _crossed(raw: bytes, encoding: str, delimiter: str) -> tuple[int, int] | None:
    """A quoted field whose lines could also be rows of their own: its first line, and its number of lines.

    None if there is no such field, or if another field shows that quotes enclose: one that holds a delimiter within one
    line, or doubled quotes.
    """
    width, found = 0, None
    for line, fields in _rows(raw, encoding, Dialect(delimiter, True)):
        width = width or len(fields)
        for field in fields:
            several = "\n" in field or "\r" in field
            if (delimiter in field and not several) or ('"' in field and (several or delimiter in field)):
                return None
            if several and found is None and field.count(delimiter) >= width - 1 > 0:
                found = line, len(field.splitlines())
    return found

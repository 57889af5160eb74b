"""How are JSON, Excel and plain text files read? Each becomes a table, with the place of every row in its file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from decaf_lora.config import TaskConfig
from decaf_lora.data.faults import Faults
from decaf_lora.data.places import PLACE, refuse_place, suffix_of
from decaf_lora.errors import UserError
from decaf_lora.extras import need

Record = tuple[int, Any]
"""(line or number of an example in its file, its value)."""


def read_json(raw: bytes, encoding: str, path: Path, wanted: Sequence[str]) -> pa.Table:
    """Reads a JSON file: one object a line, a list of objects, or an object of columns.

    Args:
        raw: content of the file.
        encoding: of the text.
        path: of the file, for errors.
        wanted: columns that the task needs.

    Returns:
        A table with the column `PLACE`.

    Raises:
        UserError: the file is no JSON or empty, an example is no object, or a wanted column holds values of several
            kinds.
    """
    faults = Faults(path)
    lists = _whole_document(raw, encoding, path)
    records = list(lists if lists is not None else _lines(raw, encoding, faults))
    for line, value in records:
        if not isinstance(value, dict):
            faults.add(line, _kind(value))
    faults.refuse("no JSON object with the columns of an example")
    if not records:
        raise UserError(f"task.data: {path} is empty.")
    word = "line" if lists is None else "example"
    return table_of([value for _, value in records], [f"{word} {n} of {path.name}" for n, _ in records], path, wanted)


def read_text(raw: bytes, encoding: str, path: Path) -> pa.Table:
    """Reads a text file: each paragraph (empty lines separate them) is a row of the column `text`."""
    text = io.TextIOWrapper(io.BytesIO(raw), encoding=encoding).read()  # all ends of lines become \n
    places, texts, line = [], [], 1
    for paragraph in text.split("\n\n"):
        if paragraph:
            texts.append(paragraph)
            places.append(f"line {line} of {path.name}")
        line += paragraph.count("\n") + 2
    return pa.table([pa.array(texts, pa.string()), pa.array(places, pa.string())], names=["text", PLACE])


def read_excel(raw: bytes, path: Path, config: TaskConfig, wanted: Sequence[str]) -> pa.Table:
    """Reads the sheet of an Excel file that `config.subset` names, or the only sheet that holds anything.

    Args:
        raw: content of the file.
        path: of the file, for errors.
        config: may name the sheet.
        wanted: columns that the task needs.

    Raises:
        UserError: openpyxl is missing, the file cannot be read or is empty, or it is not clear which sheet is meant.
    """
    need("data", "task.data")
    import openpyxl

    try:
        book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
        sheets = {sheet.title: [list(row) for row in sheet.iter_rows(values_only=True)] for sheet in book.worksheets}
    except Exception as error:  # a broken file raises whatever its zip archive and its XML raise
        raise UserError(f"task.data: {path} cannot be read: {str(error).splitlines()[0][:200]}") from error
    filled = [name for name, rows in sheets.items() if any(v is not None for row in rows for v in row)]
    if config.subset is not None and config.subset not in sheets:
        raise UserError(f"task.subset: {path} has no sheet {config.subset!r}; it has {', '.join(map(repr, sheets))}.")
    if config.subset is None and len(filled) != 1:
        names = ", ".join(map(repr, filled))
        raise UserError(
            f"task.subset: {path} has {len(filled)} sheets with data ({names}); name one."
            if filled
            else f"task.data: {path} is empty."
        )
    rows = sheets[config.subset or filled[0]]
    records, places, header = [], [], list[str]()
    for line, row in enumerate(rows, 1):
        if all(value is None for value in row):
            continue
        if not header:
            header = [str(v) if v is not None else f"Unnamed: {i}" for i, v in enumerate(row)]
            for name in wanted:
                if header.count(name) > 1:
                    raise UserError(f"task.data: {path} has {header.count(name)} columns {name!r}; rename all but one.")
            continue
        records.append({name: _cell(value) for name, value in zip(header, row, strict=False)})
        places.append(f"line {line} of {path.name}")
    return table_of(records, places, path, (), header)


def table_of(
    records: Sequence[dict[str, Any]],
    places: Sequence[str],
    path: Path,
    wanted: Sequence[str],
    header: Sequence[str] = (),
) -> pa.Table:
    """Makes a table of records, with the union of their columns. A column with values of several kinds becomes text.

    Args:
        records: column -> value, for each row.
        places: of the rows in the file.
        path: of the file, for errors.
        wanted: columns that must hold values of one kind.
        header: columns in order, before all others.

    Raises:
        UserError: a wanted column holds values of several kinds (the message gives a place of each), or a column has
            the name `PLACE`.
    """
    names = list(dict.fromkeys([*header, *(name for record in records for name in record)]))
    columns = []
    for name in names:
        values = [record.get(name) for record in records]
        try:
            columns.append(pa.array(values))
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            if name in wanted:
                raise _mixed(name, values, places, path) from error
            columns.append(pa.array([_as_text(value) for value in values], pa.string()))
    refuse_place(names, path)
    return pa.table([*columns, pa.array(places, pa.string())], names=[*names, PLACE])


def _whole_document(raw: bytes, encoding: str, path: Path) -> Iterator[Record] | None:
    """The examples of a file that is one JSON document; None if the file may hold one document a line.

    Raises UserError for a document that breaks off or is nested too deeply.
    """
    text = raw.decode(encoding)
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _parses(text.lstrip().partition("\n")[0]) or suffix_of(path) != ".json":
            return None
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f"task.data: {path} cannot be read as JSON: {where[:200]}.") from error
    if isinstance(document, dict):
        lists = {k: v for k, v in document.items() if isinstance(v, list)}
        if lists and len(lists) == len(document) and len({len(v) for v in lists.values()}) == 1:
            columns = lists
            if len(lists) == 1 and all(isinstance(v, dict) for v in next(iter(lists.values()))):
                document = next(iter(lists.values()))  # {"data": [{...}, ...]}
            else:
                document = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        else:
            return None
    return enumerate(document, 1) if isinstance(document, list) else None


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(raw: bytes, encoding: str, faults: Faults) -> Iterator[Record]:
    for number, line in enumerate(io.TextIOWrapper(io.BytesIO(raw), encoding=encoding), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except RecursionError:
            faults.add(number, "nested too deeply")
        except ValueError as error:
            faults.add(number, "no JSON: " + str(error).partition(":")[0].lower()[:60])
        else:
            yield number, value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    kinds |= {list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def _mixed(name: str, values: Sequence[Any], places: Sequence[str], path: Path) -> UserError:
    first: dict[str, int] = {}
    for i, value in enumerate(values):
        if value is not None:
            first.setdefault(_kind(value), i)
    if len(first) > 1:
        each = ", ".join(f"{kind} ({places[i]})" for kind, i in first.items())
        return UserError(f"task.data: column {name!r} of {path} holds values of several kinds: {each}; make them one.")
    return UserError(f"task.data: column {name!r} of {path} holds values that no table can (such as half characters).")


def _as_text(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)):
        return value
    return json.dumps(value, default=str)  # ASCII, so that half characters do no harm


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    return text if text.strip() else None

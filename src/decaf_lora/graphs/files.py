"""Which graph does a file hold?"""

import csv
from pathlib import Path
from xml.etree.ElementTree import ParseError

import networkx as nx
import numpy as np

from decaf_lora.errors import UserError

from .arrays import from_array
from .checks import check_names
from .graph import Graph
from .schedule import Schedule
from .weights import from_networkx

FILES = (".npy", ".csv", ".txt", ".edgelist", ".adjlist", ".graphml")
"""Endings of the files that a graph can be read from."""

_HEADERS = ({"source", "target"}, {"from", "to"})
"""Headers of edge lists in CSV files: such a first line is no edge."""

Rows = list[list[str]]


def read(path: Path) -> Graph | Schedule:
    """The graph or schedule in a file. The suffix says how the file is written.

    - .npy: an array for `from_array`: a mixing matrix, an adjacency of 0 and 1, or one mixing matrix for each round.
    - .csv (commas), .txt (spaces): a mixing matrix or an adjacency. The names of the agents may stand in the first
      row, and before each row. A file of two columns of names is an edge list.
    - .edgelist, .adjlist, .graphml: an undirected graph as networkx writes it.

    A graph without weights gets Metropolis weights. The agents of a matrix are in the order of its rows; those of any
    other file are sorted by name.

    Raises:
        UserError: the file is missing, cannot be read, or holds no graph that leads to agreement.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return from_array(np.load(path, allow_pickle=False), path.name)
        if suffix in (".csv", ".txt"):
            return _table(path, _rows(path))
        if suffix == ".graphml":
            return _links(nx.read_graphml(path), path)
        if suffix == ".adjlist":
            return _links(nx.read_adjlist(path), path)
        _refuse_third_names(path)
        return _links(nx.read_edgelist(path, data=False), path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"graph: there is no file {path}.") from None
    except (OSError, EOFError, ValueError, ParseError, nx.NetworkXException) as error:
        raise UserError(f"graph: {path} cannot be read as {suffix}: {error}.") from error


def _links(links: nx.Graph, path: Path) -> Graph:
    if all(str(node).isdecimal() for node in links):
        links = nx.relabel_nodes(links, {node: int(node) for node in links})  # so that 10 sorts after 9
    return from_networkx(links, path.name)


def _refuse_third_names(path: Path) -> None:
    """Raises UserError for lines of more than two names: then names hold spaces. Data of an edge are ignored."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        third = line.partition("#")[0].split(maxsplit=2)[2:]
        if third and not third[0].startswith("{") and not _is_number(third[0].split()[0]):
            raise UserError(
                f"graph: line {number} of {path} has more than two names; put names that hold spaces into a .csv file "
                "of two columns."
            )


def _rows(path: Path) -> Rows:
    """The lines of a table that are not empty, split into fields."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [line.partition("#")[0] for line in file]
    rows = csv.reader(lines) if path.suffix.lower() == ".csv" else map(str.split, lines)
    stripped = [[field.strip() for field in row] for row in rows]
    return [row for row in stripped if any(row)]


def _table(path: Path, rows: Rows) -> Graph | Schedule:
    if rows and all(len(row) == 2 and not any(map(_is_number, row)) for row in rows):
        return _links(nx.Graph(rows[1:] if {field.lower() for field in rows[0]} in _HEADERS else rows), path)
    names: list[str] = []
    if rows and not any(map(_is_number, rows[0])):
        names, rows = rows[0], rows[1:]
        if not any(_is_number(row[0]) for row in rows):  # every row is named, too
            columns, names = names[-len(rows) :], [row[0] for row in rows]  # the corner is empty, named, or missing
            check_names(names, len(names))
            if sorted(columns) != sorted(names):
                raise UserError(
                    f"graph: the rows of {path} are named {', '.join(names)} but its columns {', '.join(columns)}; "
                    "name them alike."
                )
            rows = [[row[1:][columns.index(name)] for name in names] for row in rows]
    widths = sorted({len(row) for row in rows})
    if len(widths) > 1:
        raise ValueError(f"it has rows of {widths[0]} and of {widths[1]} numbers")
    return from_array([[float(field) for field in row] for row in rows], path.name, names)


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True

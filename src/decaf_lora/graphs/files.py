"""Which graph does a file hold?"""

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from decaf_lora.errors import UserError

from .graph import Graph
from .schedule import Schedule
from .weights import from_matrix, from_networkx

FILES = (".npy", ".csv", ".txt", ".edgelist", ".graphml")


def read(path: Path) -> Graph | Schedule:
    """The graph in a file, or the schedule; the suffix says how it is written."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            matrix = np.load(path, allow_pickle=False)
            return _rounds(matrix, path.name) if matrix.ndim == 3 else from_matrix(matrix, path.name)
        if suffix in (".csv", ".txt"):
            delimiter = "," if suffix == ".csv" else None
            return from_matrix(np.loadtxt(path, delimiter=delimiter, ndmin=2), path.name)
        links = nx.read_graphml(path) if suffix == ".graphml" else nx.read_edgelist(path, data=False)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"graph: there is no file {path}.") from None
    except (OSError, EOFError, ValueError, ParseError, nx.NetworkXException) as error:
        raise UserError(f"graph: {path} cannot be read as {suffix}: {error}.") from error
    if all(str(node).isdecimal() for node in links):
        links = nx.relabel_nodes(links, {node: int(node) for node in links})  # so that 10 sorts after 9
    return from_networkx(links, path.name)


def _rounds(matrices: NDArray[Any], name: str) -> Schedule:
    """The schedule of mixing matrices (T, N, N), directed ones among them, one a round."""
    graphs = []
    for number, matrix in enumerate(matrices):
        try:
            graph = from_matrix(matrix, f"round {number}", require_symmetric=False, connected=False)
        except UserError as error:
            raise UserError(f"graph: round {number} of {name}: {str(error).removeprefix('graph: ')}") from None
        graphs.append(graph)
    return Schedule.cycle(graphs, name)

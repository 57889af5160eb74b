"""Which graph does an array mean: a mixing matrix, an adjacency, or one matrix a round?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decaf_lora.errors import UserError

from .graph import Graph
from .schedule import Schedule
from .weights import from_matrix, metropolis


def from_array(array: ArrayLike, name: str, names: Sequence[str] = ()) -> Graph | Schedule:
    """The graph of a file or of a function of the user's own.

    Args:
        array: (N, N), a mixing matrix; (N, N) of 0 and 1 only, an adjacency, which gets Metropolis weights; or
            (T, N, N), a mixing matrix for each round. A mixing matrix of 0 and 1 only would pass models on and never
            blend them, so the two cannot be confused.
        name: what tables and figures call the graph.
        names: (N,) of the agents, in the order of the rows.

    Raises:
        UserError: the array holds something else than numbers, or is no such matrix; names the row at fault.
    """
    try:
        matrix = np.array(array, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"graph: {name} gives no matrix of numbers ({error}).") from error
    if matrix.ndim == 3:
        return _rounds(matrix, name)
    links = matrix.ndim == 2 and len(matrix) > 1 and np.isin(matrix, (0, 1)).all()
    return (metropolis if links else from_matrix)(matrix, name, names=names)


def _rounds(matrices: NDArray[Any], name: str) -> Schedule:
    """The schedule of the mixing matrices (T, N, N), one for each round; directed ones are accepted."""
    graphs = []
    for number, matrix in enumerate(matrices):
        try:
            graph = from_matrix(matrix, f"round {number}", require_symmetric=False, connected=False)
        except UserError as error:
            raise UserError(f"graph: round {number} of {name}: {str(error).removeprefix('graph: ')}") from None
        graphs.append(graph)
    return Schedule.cycle(graphs, name)

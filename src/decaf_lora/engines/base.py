"""Where do agents live and how do messages travel? The contract of an engine."""

from __future__ import annotations

from typing import Protocol

from decaf_lora.algorithms.base import Inbox, Tensors
from decaf_lora.graphs import Graph


class Engine(Protocol):
    """Places the agents and moves their messages; the round itself is in run.py and the same for all.

    Where agents live in several processes, all of them call every method, in the same order.
    """

    num_agents: int
    """N, the agents of the whole run."""
    agents: list[int]
    """Numbers of the agents that this process holds, ascending."""
    is_main: bool
    """Whether this process prints and writes."""

    def exchange(self, message: Tensors, graph: Graph, round_: int) -> Inbox:
        """Sends every agent's message (name -> (n, ...)) to its neighbours and returns what arrived."""

    def wire_bytes(self, message: Tensors, graph: Graph) -> float | None:
        """Bytes that an exchange of such messages moves between processes, mean over agents; None in one process."""

    def gather(self, tensors: Tensors, everywhere: bool = True) -> Tensors:
        """name -> (n, ...) of this process to name -> (N, ...) of all agents.

        With `everywhere` false the main process alone receives them, for what is large; the others return {}.
        """

    def scatter(self, tensors: Tensors) -> Tensors:
        """name -> (N, ...) of the main process to name -> (n, ...), everybody's own agents.

        What the other processes pass is ignored.
        """

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process: so that all of them stop in the same step."""

"""Where do agents live and how do messages travel? The contract of an engine."""

from __future__ import annotations

from typing import Protocol

from decaf_lora.algorithms.base import Inbox, Tensors
from decaf_lora.graphs import Graph


class Engine(Protocol):
    """Places the agents and moves their messages; the round itself is in run.py and the same for all."""

    num_agents: int
    """N, the agents of the whole run."""
    agents: list[int]
    """Numbers of the agents that this process holds, ascending."""
    is_main: bool
    """Whether this process prints and writes."""

    def exchange(self, message: Tensors, graph: Graph, round_: int) -> Inbox:
        """Sends every agent's message (name -> (n, ...)) to its neighbours and returns what arrived."""

    def gather(self, tensors: Tensors) -> Tensors:
        """name -> (n, ...) of this process to name -> (N, ...) of all agents, in every process."""

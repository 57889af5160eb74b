"""All agents in this process: messages are rows of the stacked tensors and travel nowhere."""

from __future__ import annotations

import functools

from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.inbox import Group, Inbox, routes
from decaf_lora.engines.base import InStep, Pending, Sizes
from decaf_lora.graphs import Graph


class Simulate(InStep):
    """The engine of one process that holds all `num_agents` agents."""

    is_main = True

    def __init__(self, num_agents: int) -> None:
        self.num_agents = num_agents
        self.agents = list(range(num_agents))
        self.reports = self.agents
        self._routes = functools.lru_cache(maxsize=64)(self._find_routes)

    def _find_routes(self, graph: Graph) -> tuple[Group, ...]:
        return routes(graph.weights, self.agents, self.agents)

    def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """The inbox of all agents under the graph's weights."""
        everybody = self.agents
        inbox = Inbox.from_weights(message, graph.weights, everybody, everybody, exchange, self._routes(graph))
        return Pending(lambda: inbox)

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """None: nothing leaves the process."""
        return None

    def gather(self, tensors: Tensors) -> Tensors:
        """All agents are here already."""
        return tensors

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """All agents are here already."""
        return Pending(lambda: tensors)

    def scatter(self, tensors: Tensors) -> Tensors:
        """All agents live here."""
        return tensors

    def anyone_stops(self, asked: bool) -> bool:
        """There is no other process."""
        return asked

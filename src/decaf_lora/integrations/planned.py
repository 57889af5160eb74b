"""What do the agents of training scripts exchange, with whom, and when?"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal

from decaf_lora import algorithms, graphs
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange, exchanges_of_round
from decaf_lora.graphs import Graph, Schedule, as_schedule


class Plan:
    """What is exchanged with whom, and when."""

    def __init__(
        self,
        algorithm: str | Algorithm,
        graph: str | Graph | Schedule | None,
        agents: int,
        every: int,
        seed: int,
        gossip_steps: int | Literal["period"],
    ) -> None:
        self.algorithm = algorithms.make(algorithm) if isinstance(algorithm, str) else algorithm
        self.every, self.seed = every, seed
        self.mixes = self.algorithm.topology != "none"
        if self.algorithm.topology in ("server", "pooled"):
            raise UserError(f"algorithm: {self.algorithm.name} does not gossip; use decaf on the complete graph.")
        if self.algorithm.rule.begin is not None:
            raise UserError(
                f"algorithm: {self.algorithm.name} trains what a PEFT model does not hold; use decaf, or decaf run."
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UserError(f"every: {every!r} steps never come; give a whole number of at least 1.")
        if not self.mixes:
            graph = graphs.complete(agents)
        elif agents < 2:
            raise UserError(f"agents: {self.algorithm.name} needs at least 2, got {agents}; use local for one.")
        elif graph is None:
            raise UserError("graph: missing; say who listens to whom, for instance graph='ring'.")
        elif isinstance(graph, str):
            graph = graphs.parse(graph, agents, seed)
        self.schedule = as_schedule(graph)
        if self.schedule.num_agents != agents:
            raise UserError(f"graph: it joins {self.schedule.num_agents} agents, here are {agents}; make them equal.")
        self.gossip_steps = exchanges_of_round(self.schedule, gossip_steps)
        made = hashlib.sha256()
        for number in range(self.schedule.period or 16):
            made.update(self.schedule.at(number).weights.tobytes())
        self.shown = f"{self.schedule.name} ({made.hexdigest()[:8]})"
        parts = [self.algorithm.rule.name, *(transform.name for transform in self.algorithm.transforms)]
        self.described = " | ".join(parts)

    def exchange(self, engine: Any, steps: int) -> Exchange:
        """What makes the exchanges of a training of so many steps."""
        rounds, number = self.rounds(steps), self.gossip_steps
        return Exchange(self.algorithm, self.schedule, engine, rounds=rounds, gossip_steps=number, seed=self.seed)

    def rounds(self, steps: int) -> int:
        """Exchanges in a training of so many steps; the last one may come after fewer than `every`."""
        return math.ceil(steps / self.every)

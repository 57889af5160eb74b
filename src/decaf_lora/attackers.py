"""How do lying agents take part in a run? They send an `algorithms.attack`, or train on wrong labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.algorithms.attack import PLACE, attack
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import over
from decaf_lora.errors import UserError
from decaf_lora.tasks.base import Task
from decaf_lora.tasks.mislabelled import Mislabelled
from decaf_lora.threats import AttackersConfig

T = TypeVar("T")


class Honest:
    """Who lies in a run, and who counts: only honest agents are scored.

    Args:
        config: who lies, and how.
    """

    def __init__(self, config: AttackersConfig) -> None:
        self.config = config
        self.attackers = tuple(sorted(config.agents))
        """Numbers of the agents that lie."""

    def among(self, algorithm: Algorithm, agents: int, here: int, seed: int) -> Algorithm:
        """`algorithm` with what the attackers send; itself where they tell what they have learnt, or nobody lies.

        Args:
            algorithm: what the agents run.
            agents: N, of the run.
            here: how many of them live in this process.
            seed: of the run.

        Raises:
            UserError: the agents live in several processes, do not exchange, or none of them is honest.
        """
        if self.config.kind is None:
            return algorithm
        if algorithm.topology not in ("graph", "server"):
            raise UserError(f"attackers: {algorithm.name} exchanges nothing that could be a lie; leave them out.")
        if here < agents:
            raise UserError(
                "attackers: they are for a simulation in one process; leave them out under torchrun and in a mesh."
            )
        if outside := [agent for agent in self.attackers if not 0 <= agent < agents]:
            raise UserError(f"attackers.agents: {outside[0]} is not in this run; use 0 to {agents - 1}.")
        if len(self.attackers) == agents:
            raise UserError("attackers.agents: all agents lie, and nobody is left to be scored; leave one out.")
        if self.config.kind == "label-flip":
            return algorithm
        lies = attack(self.config.kind, self.attackers, self.config.strength or 1.0, seed, algorithm.topology)
        return over(algorithm, [(PLACE, lies)])

    def taught(self, task: Task, shards: Mapping[int, np.ndarray]) -> tuple[Task, dict[int, np.ndarray]]:
        """The task to train on, and every agent's shard of it, agent -> (m_i,)."""
        if self.config.kind != "label-flip":
            return task, dict(shards)
        both = Mislabelled(task)
        return both, {i: both.wrong(shard) if i in self.attackers else shard for i, shard in shards.items()}

    def told(self) -> str | None:
        """Who lies and how, in words; None where nobody does."""
        kind, named = self.config.kind, ", ".join(map(str, self.attackers))
        if kind is None:
            return None
        return f"{kind}{'' if kind == 'label-flip' else f' times {self.config.strength or 1:g}'} by agent {named}"

    def only(self, values: Sequence[float]) -> list[float | None]:
        """The values (N,) of all agents; None for those that lie."""
        return [None if agent in self.attackers else value for agent, value in enumerate(values)]

    def places(self, values: Sequence[T]) -> list[T]:
        """The values (N,) of all agents without those that lie."""
        return [value for agent, value in enumerate(values) if agent not in self.attackers]

    def adapters(self, adapters: Adapter) -> Adapter:
        """The adapters of all agents without those that lie."""
        return adapters.select(self.places(range(adapters.num_agents))) if self.attackers else adapters

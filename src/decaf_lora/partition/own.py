"""What does one agent of a mesh know of the split? Its own examples."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decaf_lora.errors import UserError
from decaf_lora.partition.shards import Indices, Partition, check_labels, claim, frozen


@dataclass(frozen=True, eq=False)
class Own:
    """The examples of one agent, for a process that does not know the examples of the others.

    Attributes:
        agent: its number, from 0.
        num_agents: N, the agents of the whole run.
        indices: (n_i,) indices of its examples, int64, ascending, read-only.
        labels: (M,) labels of all examples on its machine.
        name: what tables call the split.
        names: the names of the N agents; () if agents only have numbers.

    Raises:
        UserError: the agent is not among the N, or its indices do not fit the labels.
    """

    agent: int
    num_agents: int
    indices: Indices
    labels: NDArray[Any]
    name: str = "own"
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.agent < self.num_agents:
            raise UserError(f"partition: agent {self.agent} is not one of {self.num_agents}; they are numbered from 0.")
        if self.names and len(self.names) != self.num_agents:
            raise UserError(f"partition: {len(self.names)} names for {self.num_agents} agents; give each one.")
        object.__setattr__(self, "labels", check_labels(self.labels))
        object.__setattr__(self, "indices", frozen(self.indices))
        called = [f"agent {name}" for name in self.names or range(self.num_agents)]
        claim(self.indices, self.agent, np.full(len(self.labels), -1), called)

    def shard(self, agent: int) -> Indices:
        """(n_i,) the examples of `agent`, which must be this agent; ValueError for another."""
        if agent != self.agent:
            raise ValueError(f"agent {self.agent} does not know the examples of agent {agent}")
        return self.indices

    @property
    def shards(self) -> tuple[Indices]:
        """The one shard that is known: the agent's own."""
        return (self.indices,)

    @property
    def sizes(self) -> Indices:
        """(1,) how many examples the agent holds."""
        return np.array([self.indices.size])

    @cached_property
    def classes(self) -> NDArray[Any]:
        """(C,) the distinct labels, ascending."""
        return np.unique(self.labels)

    def label_table(self, labels: ArrayLike | None = None) -> Indices:
        """(1, C) how many examples of each class the agent holds; `labels` as for `Partition.label_table`."""
        return Partition((self.indices,), self.labels).label_table(labels)

    def own_tests(self) -> tuple[Indices, ...]:
        """Raises UserError: all test examples on this machine are the agent's own, none are others'."""
        raise UserError("test: an agent alone has no other test set than its own; leave it at all.")

    def tests_of(self, test: str, test_labels: ArrayLike | None, seed: int) -> tuple[Indices, ...]:
        """() for "all"; raises UserError for another `test`, as `own_tests` does."""
        return self.own_tests() if test != "all" else ()

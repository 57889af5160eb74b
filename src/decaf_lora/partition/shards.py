"""Which examples does each agent hold, and is that a split?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decaf_lora.errors import UserError
from decaf_lora.randomness import numpy_generator

Indices = NDArray[np.int64]
"""Row numbers of examples, of shape (m,)."""


@dataclass(frozen=True, eq=False)
class Partition:
    """The shards of all agents, checked when made: none empty, none shares an example with another.

    Attributes:
        shards: for every agent the indices (n_i,) of its examples, int64, ascending, read-only.
        labels: (M,) labels of all examples, also of those in no shard.
        name: the name of the rule, as `parse` reads it.
        names: the names of the agents, all different; () if agents only have numbers.
        tests: for every agent the indices (m_i,) of the test examples that are its own; () if that is not known.

    Raises:
        UserError: the shards are no split; names the agents and the example at fault.
    """

    shards: tuple[Indices, ...]
    labels: NDArray[Any]
    name: str = "custom"
    names: tuple[str, ...] = ()
    tests: tuple[Indices, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", check_labels(self.labels))
        object.__setattr__(self, "shards", tuple(frozen(shard) for shard in self.shards))
        if not self.shards:
            raise UserError("partition: there is no shard; give at least one agent.")
        object.__setattr__(self, "tests", tuple(frozen(test) for test in self.tests))
        if self.tests and len(self.tests) != len(self.shards):
            raise UserError(f"partition: {len(self.tests)} test sets for {len(self.shards)} agents; give each one.")
        if self.names and (len(self.names) != len(self.shards) or len(set(self.names)) < len(self.names)):
            raise UserError(
                f"partition: {len(set(self.names))} names for {len(self.shards)} agents; give each one of its own."
            )
        called = [f"agent {name}" for name in self.names or range(len(self.shards))]
        owner = np.full(len(self.labels), -1)
        for agent, shard in enumerate(self.shards):
            claim(shard, agent, owner, called)

    @property
    def num_agents(self) -> int:
        """N, the number of agents."""
        return len(self.shards)

    def shard(self, agent: int) -> Indices:
        """(n_i,) the examples of an agent, ascending."""
        return self.shards[agent]

    def own_tests(self) -> tuple[Indices, ...]:
        """`tests`; UserError if the owners of the test examples are not known, or an agent owns none."""
        if not self.tests:
            raise UserError(
                "test: nobody knows whose the test examples are; split by a column (column:hospital) that the test "
                "examples have, too, or score on all, or on test examples of the classes that each holds (alike)."
            )
        for agent, own in enumerate(self.tests):
            if not own.size:
                name = self.names[agent] if self.names else agent
                raise UserError(f"test: agent {name} has no test example of its own; give it some, or score on all.")
        return self.tests

    def tests_of(self, test: str, test_labels: ArrayLike | None, seed: int) -> tuple[Indices, ...]:
        """The test examples that are each agent's own where a run scores by `test` ("all", "own", "both" or "alike").

        () for "all". Raises UserError as `own_tests` and `alike_tests` do, whose arguments these are.
        """
        if test == "alike":
            return self.alike_tests(test_labels, seed)
        return self.own_tests() if test != "all" else ()

    def alike_tests(self, test_labels: ArrayLike | None, seed: int) -> tuple[Indices, ...]:
        """Test examples of the classes that each agent holds, in the same shares as its training examples.

        An agent gets the most examples of the common test set that keep the shares of its classes, to the nearest whole
        number; which ones of a class is drawn by name. The sets of two agents may overlap.

        Args:
            test_labels: (T,) the labels of the test examples; None if they are not known.
            seed: of the draw.

        Returns:
            For every agent the indices (m_i,), ascending.

        Raises:
            UserError: the test examples have no labels, or none of a class that an agent holds.
        """
        if test_labels is None:
            raise UserError("test: the classes of this task's test examples are not known (Task.test_labels); use all.")
        held, available = np.asarray(self.labels), check_labels(test_labels)
        found = []
        for agent, shard in enumerate(self.shards):
            classes, counts = np.unique(held[shard], return_counts=True)
            there = np.array([np.count_nonzero(available == name) for name in classes])
            if not there.all():
                called, lacks = self.names[agent] if self.names else agent, classes[there == 0][0]
                raise UserError(f"test: no test example has class {lacks}, which agent {called} holds; use test = all.")
            # The class that runs out first sets the size; rounded down, as no class has more than `there`.
            wanted = np.maximum(np.floor((there / counts).min() * counts + 1e-9).astype(np.int64), 1)
            draw = numpy_generator(seed, "partition", "alike", agent)
            parts = [
                draw.permutation(np.flatnonzero(available == name))[:number]
                for name, number in zip(classes, wanted, strict=True)
            ]
            found.append(frozen(np.concatenate(parts)))
        return tuple(found)

    @property
    def sizes(self) -> Indices:
        """(N,) how many examples each agent holds."""
        return np.array([shard.size for shard in self.shards])

    @cached_property
    def classes(self) -> NDArray[Any]:
        """(C,) the distinct labels, ascending."""
        return np.unique(self.labels)

    @property
    def examples(self) -> Indices:
        """The examples of all shards together, ascending."""
        return np.sort(np.concatenate(self.shards))

    def label_table(self, labels: ArrayLike | None = None) -> Indices:
        """(N, C) how many examples of each class each agent holds.

        Args:
            labels: (M,) other labels of the same examples, for instance coarser ones; None: the partition's labels.
                The columns of the table are the distinct labels, ascending.
        """
        classes, ranks = np.unique(self.labels if labels is None else check_labels(labels), return_inverse=True)
        return np.stack([np.bincount(ranks[shard], minlength=len(classes)) for shard in self.shards])


def check_labels(labels: ArrayLike) -> NDArray[Any]:
    """(M,) a read-only copy of the labels; UserError if they are not one-dimensional or there are none."""
    array = np.array(labels)
    if array.ndim != 1:
        raise UserError(f"partition: the labels have shape {array.shape}, not (M,); give every example one.")
    if array.size == 0:
        raise UserError("partition: there are no labels; give at least one example.")
    array.flags.writeable = False
    return array


def frozen(indices: ArrayLike) -> Indices:
    """(n,) the indices ascending, int64, read-only; UserError if they are not one-dimensional whole numbers."""
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(
            f"partition: indices have shape {array.shape} and type {array.dtype}; they must be (n,) integers."
        )
    array = np.sort(array).astype(np.int64)
    array.flags.writeable = False
    return array


def claim(shard: Indices, agent: int, owner: Indices, called: Sequence[str]) -> None:
    """Writes `agent` into `owner` at the examples of `shard`.

    Args:
        shard: (n,) indices, ascending.
        agent: the number of the agent that holds the shard.
        owner: (M,) the agent that holds each example, -1 for none so far; changed in place.
        called: (N,) what errors call each agent.

    Raises:
        UserError: the shard is empty, has an index outside the M examples, or an example that is taken already.
    """
    if shard.size == 0:
        raise UserError(f"partition: {called[agent]} holds no example; use fewer agents or more data.")
    if shard[0] < 0 or shard[-1] >= owner.size:
        stray = shard[0] if shard[0] < 0 else shard[-1]
        raise UserError(f"partition: {called[agent]} holds example {stray}; the examples are 0 to {owner.size - 1}.")
    # Of two equal neighbours in an ascending shard the second is a repetition.
    taken = (owner[shard] >= 0) | (np.diff(shard, prepend=-1) == 0)
    if taken.any():
        example = shard[taken][0]
        other = owner[example]
        holders = f"{called[other]} and {called[agent]} both hold" if other >= 0 else f"{called[agent]} holds twice"
        raise UserError(f"partition: {holders} example {example}; shards must be disjoint.")
    owner[shard] = agent

"""Which examples does somebody else say that each agent holds: a column, a file, a partitioner, a function?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike

from decaf_lora.errors import UserError, listed
from decaf_lora.graphs import Schedule

from .own import Own
from .shards import Indices, Partition, check_labels, frozen


@runtime_checkable
class Partitioner(Protocol):
    """An object that says which examples each agent holds, such as a partitioner of another library."""

    def load_partition(self, agent: int) -> ArrayLike:
        """(n,) indices of the training examples of `agent`, which counts from 0."""


Given: TypeAlias = Partitioner | Sequence[ArrayLike] | Mapping[str, ArrayLike]
"""What `as_partition` takes, beside a `Partition`."""


def by_value(labels: ArrayLike, values: ArrayLike, name: str = "by-value") -> Partition:
    """One agent for every distinct value, which is the agent's name: a hospital, a writer, a machine.

    Args:
        labels: (M,) the label of every example.
        values: (M,) the value of every example: strings, whole numbers or booleans. Agents are numbered in the
            ascending order of the values.
        name: what tables call the partition.

    Raises:
        UserError: there are not as many values as labels, or a value is missing.
    """
    array = check_labels(labels)
    given = np.asarray(values)
    if given.shape != array.shape:
        raise UserError(f"partition: {name} has {len(given)} values for {len(array)} examples; give every example one.")
    missing = [i for i, value in enumerate(given.tolist()) if value is None or value == "" or value != value]
    if missing:
        raise UserError(
            f"partition: {len(missing)} of {len(array)} examples have nothing in {name} (first: example {missing[0]}); "
            "fill or remove these rows."
        )
    if all(isinstance(value, str) and value.isdecimal() for value in given.tolist()):
        given = given.astype(np.int64)  # so that 10 comes after 9
    try:
        distinct, owners = np.unique(given, return_inverse=True)
    except TypeError:  # strings among numbers
        distinct, owners = np.unique(given.astype(str), return_inverse=True)
    shards = tuple(np.flatnonzero(owners == agent) for agent in range(len(distinct)))
    return Partition(shards, array, name, tuple(str(value) for value in distinct.tolist()))


def as_partition(
    given: Any, labels: ArrayLike, num_agents: int, name: str = "custom", *, examples: Indices | None = None
) -> Partition:
    """A `Partition` from what a user's function returned, or from what was given to `Run`.

    Args:
        given: a `Partition`; a mapping from the names of the agents to the indices (n_i,) of their examples; a
            sequence of these indices; or a `Partitioner`, anything with `load_partition(agent)` that returns them.
        labels: (M,) the label of every example.
        num_agents: N, the number of agents that the run has.
        name: the name of the partition, unless `given` is a `Partition`, which has one.
        examples: indices of the examples to keep in the shards; None: all.

    Raises:
        UserError: `given` is none of these, has another number of agents, or its shards are no split.
    """
    if isinstance(given, Partition):
        made = given
    elif isinstance(given, Mapping):
        made = Partition(tuple(map(_indices, given.values())), check_labels(labels), name, tuple(map(str, given)))
    elif isinstance(given, Partitioner):
        parts = getattr(given, "num_partitions", num_agents)
        _check_count(name, parts, num_agents)
        shards = tuple(_indices(given.load_partition(agent)) for agent in range(num_agents))
        made = Partition(shards, check_labels(labels), name)
    elif isinstance(given, Sequence | np.ndarray):
        made = Partition(tuple(map(_indices, given)), check_labels(labels), name)
    else:
        raise UserError(
            f"partition: {name} is {type(given).__name__}; give a mapping from the agents' names to the indices of "
            "their examples, a list of such indices, or an object with load_partition(agent)."
        )
    _check_count(made.name, len(made.shards), num_agents, made.names)
    if examples is None:
        return made
    return replace(made, shards=tuple(np.intersect1d(shard, examples) for shard in made.shards))


def named_alike(
    schedule: Schedule, given: Partition | Own | Given, labels: ArrayLike
) -> tuple[Schedule, Partition | Own]:
    """Gives a schedule and a partition the same names of agents, in the same order.

    If only one of the two has names, the other takes them. If both have names, the agents are in the partition's order.

    Args:
        schedule: the graph of every exchange.
        given: what `as_partition` takes, or the examples of one agent, which are returned as they are.
        labels: (M,) the label of every example.

    Returns:
        The schedule and the partition, with one order of agents.

    Raises:
        UserError: the two name different agents, or `given` is no partition.
    """
    if isinstance(given, Own):
        return schedule, given
    made = given if isinstance(given, Partition) else as_partition(given, labels, schedule.num_agents)
    names = made.names or schedule.names
    if not names or schedule.num_agents != made.num_agents:
        return schedule, made
    return schedule.arranged(names), replace(made, names=names)


def _indices(given: Any) -> Indices:
    try:
        return frozen(given)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"partition: the examples of an agent are given as {type(given).__name__}, not as the numbers of its rows "
            f"({error})."
        ) from error


def _check_count(name: str, found: int, num_agents: int, names: Sequence[str] = ()) -> None:
    if found != num_agents:
        called = f" ({listed(names, 10)})" if names else ""
        raise UserError(
            f"partition: {name} has {found} agents{called} but the run has {num_agents}; use {found} agents."
        )


def read_indices(path: Path) -> dict[str, Any] | list[Any]:
    """The shards in a file: a mapping from the names of the agents, or a list in the order of the agents.

    Args:
        path: a .json file, {"alice": [0, 2], "bob": [1]} or [[0, 2], [1]]; or a .npz file with an array for each agent.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        given = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"partition: there is no file {path}.") from None
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(f"partition: {path} cannot be read ({error}); write it as .json or .npz.") from error
    if not isinstance(given, dict | list):
        raise UserError(f'partition: {path} must hold {{"alice": [0, 2], "bob": [1]}} or [[0, 2], [1]].')
    return given

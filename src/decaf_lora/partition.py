"""Which examples does each agent hold?

Labels in, index arrays out: no data set is touched. Every rule deals all examples (or all of the subset
`examples`) to exactly one agent each, leaves no agent empty, and is a pure function of its arguments and the
seed. `parse` reads the names of the command line, `KINDS` lists them.

`shots` is the IID set-up of the DeCAF paper (arXiv 2505.21382): 40 a class in all, 4 for each of 10 agents.
The paper does not publish its non-IID rule. `dirichlet` is the usual label skew (Yurochkin et al., ICML 2019,
arXiv 1905.12022: every class is split by proportions of its own); `by_class` is the harshest one.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UserError, unknown
from .randomness import numpy_generator

Indices = NDArray[np.int64]

REDRAWS = 100  # of Dirichlet proportions, until every shard has its least size


@dataclass(frozen=True, eq=False)
class Partition:
    """The shards of all agents, checked when made: none empty, none shares an example with another.

    Attributes:
        shards: for every agent the indices (n_i,) of its examples, int64, ascending, read-only.
        labels: (M,) of all examples, also of those in no shard.
        name: the rule; what `parse` reads.

    Raises:
        UserError: names the agents and the example at fault.
    """

    shards: tuple[Indices, ...]
    labels: NDArray[Any]
    name: str = "custom"

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _check_labels(self.labels))
        object.__setattr__(self, "shards", tuple(_frozen(shard) for shard in self.shards))
        if not self.shards:
            raise UserError("partition: there is no shard; give at least one agent.")
        owner = np.full(len(self.labels), -1)
        for agent, shard in enumerate(self.shards):
            _claim(shard, agent, owner)

    @property
    def num_agents(self) -> int:
        """N."""
        return len(self.shards)

    def shard(self, agent: int) -> Indices:
        """The examples of an agent, ascending."""
        return self.shards[agent]

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
        """All dealt examples, ascending."""
        return np.sort(np.concatenate(self.shards))

    def label_table(self, labels: ArrayLike | None = None) -> Indices:
        """(N, C) how many examples of each class each agent holds.

        Args:
            labels: (M,) other labels of the same examples, for instance coarser ones; None: its own. The
                columns are their distinct values, ascending.
        """
        classes, ranks = np.unique(self.labels if labels is None else _check_labels(labels), return_inverse=True)
        return np.stack([np.bincount(ranks[shard], minlength=len(classes)) for shard in self.shards])


@dataclass(frozen=True, eq=False)
class Own:
    """What one agent of a mesh knows of the partition: its own examples.

    Attributes:
        agent: its number, from 0.
        num_agents: N, the agents of the whole run.
        indices: (n_i,) of its examples, int64, ascending, read-only.
        labels: (M,) of the examples on its machine.
        name: what tables call it.

    Raises:
        UserError: the agent is not among the N, or its indices do not fit the labels.
    """

    agent: int
    num_agents: int
    indices: Indices
    labels: NDArray[Any]
    name: str = "own"

    def __post_init__(self) -> None:
        if not 0 <= self.agent < self.num_agents:
            raise UserError(f"partition: agent {self.agent} is not one of {self.num_agents}; they are numbered from 0.")
        object.__setattr__(self, "labels", _check_labels(self.labels))
        object.__setattr__(self, "indices", _frozen(self.indices))
        _claim(self.indices, self.agent, np.full(len(self.labels), -1))

    def shard(self, agent: int) -> Indices:
        """The agent's own examples; nobody else's are known."""
        if agent != self.agent:
            raise ValueError(f"agent {self.agent} does not know the examples of agent {agent}")
        return self.indices

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


# --- the rules ----------------------------------------------------------------------------------------------


def few_shot(labels: ArrayLike, shots: int, seed: int, *, allow_fewer: bool = False) -> Indices:
    """Choose `shots` examples of every class at random.

    Args:
        labels: (M,).
        shots: of each class, at least 1.
        seed: of the choice.
        allow_fewer: take all of a class that has fewer than `shots`, instead of refusing.

    Returns:
        The chosen indices, ascending; for `examples` of the rules below.

    Raises:
        UserError: a class has fewer examples than `shots`.
    """
    names, ranks = np.unique(_check_labels(labels), return_inverse=True)
    if shots < 1:
        raise UserError(f"partition: {shots} shots; take at least 1 example of every class.")
    counts = np.bincount(ranks)
    if not allow_fewer and counts.min() < shots:
        scarce = counts.argmin()
        raise UserError(
            f"partition: class {names[scarce].item()!r} has {counts[scarce]} examples, fewer than {shots} "
            f"shots; use at most {counts[scarce]} shots, or take what there is (up-to:{shots}; allow_fewer=True)."
        )
    generator = numpy_generator(seed, "partition", "few-shot")
    piles = _shuffled_by_class(ranks, np.arange(len(ranks)), generator)
    return np.sort(np.concatenate([members[:shots] for members in piles]))


def iid(labels: ArrayLike, agents: int, seed: int, *, examples: Indices | None = None) -> Partition:
    """Shuffled and stratified: shard sizes differ by at most 1, and so do the counts of every class.

    Args:
        labels: (M,).
        agents: N.
        seed: of the shuffle.
        examples: which examples to deal; None: all.

    Raises:
        UserError: there are more agents than examples.
    """
    labels, ranks, examples = _prepare(labels, agents, examples)
    generator = numpy_generator(seed, "partition", "iid")
    piles = _shuffled_by_class(ranks, examples, generator)
    # Dealt like cards, one class after the other. Classes and agents in random order, or else classes with
    # fewer examples than agents would always go to the same ones.
    deck = np.concatenate([piles[rank] for rank in generator.permutation(len(piles))])
    seats = generator.permutation(agents)
    shards = [np.array([], dtype=np.int64)] * agents
    for place, agent in enumerate(seats):
        shards[agent] = deck[place::agents]
    return Partition(tuple(shards), labels, "iid")


def shots(labels: ArrayLike, agents: int, shots: int, seed: int, *, allow_fewer: bool = False) -> Partition:
    """`shots` examples a class in all (not per agent), dealt evenly: `few_shot`, then `iid`."""
    chosen = few_shot(labels, shots, seed, allow_fewer=allow_fewer)
    return replace(iid(labels, agents, seed, examples=chosen), name=f"shots:{shots}")


def dirichlet(
    labels: ArrayLike,
    agents: int,
    alpha: float,
    seed: int,
    least: int = 1,
    *,
    examples: Indices | None = None,
) -> Partition:
    """Label skew: every class is split over the agents in proportions drawn from Dirichlet(alpha).

    Proportions are drawn anew until every shard has `least` examples. The last of 100 draws is mended: the
    smallest shard takes one example of the largest shard's most numerous class, until none is short.

    Args:
        labels: (M,).
        agents: N.
        alpha: above 0; 0.1 leaves an agent a few classes, 100 is nearly IID.
        seed: of proportions and shuffle.
        least: the smallest shard size, at least 1.
        examples: which examples to deal; None: all.

    Raises:
        UserError: `alpha` is not positive and finite, or there are fewer than `agents * least` examples.
    """
    labels, ranks, examples = _prepare(labels, agents, examples)
    if not 0 < alpha < math.inf:
        raise UserError(f"partition: alpha is {alpha:g}; it must be above 0 and finite, for instance 0.1.")
    if least < 1:
        raise UserError(f"partition: least is {least}; every agent needs at least 1 example.")
    if agents * least > len(examples):
        raise UserError(
            f"partition: {agents} agents with at least {least} examples each need {agents * least} but "
            f"there are only {len(examples)}; lower least to {len(examples) // agents} or use fewer agents."
        )
    generator = numpy_generator(seed, "partition", "dirichlet")
    piles = _shuffled_by_class(ranks, examples, generator)
    totals = np.array([len(members) for members in piles])
    for _ in range(REDRAWS):
        counts = _dirichlet_counts(totals, agents, alpha, generator)
        if counts.sum(axis=0).min() >= least:
            break
    sizes = counts.sum(axis=0)
    # Ends: the sum is at least N * least, so while one is short the largest has more than `least` to give.
    while sizes.min() < least:
        poor, rich = sizes.argmin(), sizes.argmax()
        rank = counts[:, rich].argmax()
        counts[rank, rich] -= 1
        counts[rank, poor] += 1
        sizes[rich] -= 1
        sizes[poor] += 1
    dealt = [np.split(members, np.cumsum(row)[:-1]) for members, row in zip(piles, counts, strict=True)]
    shards = tuple(np.concatenate(pieces) for pieces in zip(*dealt, strict=True))
    return Partition(shards, labels, f"dirichlet:{alpha:g}")


def by_class(labels: ArrayLike, agents: int, *, examples: Indices | None = None) -> Partition:
    """Every class wholly on agent `class mod N`; classes are numbered in the order of their labels.

    Args:
        labels: (M,).
        agents: N.
        examples: which examples to deal; None: all. The numbers of the classes stay those of all labels.

    Raises:
        UserError: an agent would hold no class.
    """
    labels, ranks, examples = _prepare(labels, agents, examples)
    owners = ranks[examples] % agents
    if (idle := np.setdiff1d(np.arange(agents), owners)).size:
        num_classes = len(np.unique(ranks[examples]))
        raise UserError(
            f"partition: by-class deals {num_classes} classes to {agents} agents and leaves agent {idle[0]} "
            f"without any; use at most {num_classes} agents, or dirichlet:0.1."
        )
    return Partition(tuple(examples[owners == agent] for agent in range(agents)), labels, "by-class")


# --- their parts --------------------------------------------------------------------------------------------


def _check_labels(labels: ArrayLike) -> NDArray[Any]:
    """(M,) the labels as an array of their own, read-only."""
    array = np.array(labels)
    if array.ndim != 1:
        raise UserError(f"partition: the labels have shape {array.shape}, not (M,); give every example one.")
    if array.size == 0:
        raise UserError("partition: there are no labels; give at least one example.")
    array.flags.writeable = False
    return array


def _claim(shard: Indices, agent: int, owner: Indices) -> None:
    """Notes in `owner` (M,) that the examples of `shard` are the agent's; UserError for one that it cannot have."""
    if shard.size == 0:
        raise UserError(f"partition: agent {agent} holds no example; use fewer agents or more data.")
    if shard[0] < 0 or shard[-1] >= owner.size:
        stray = shard[0] if shard[0] < 0 else shard[-1]
        raise UserError(f"partition: agent {agent} holds example {stray}; the examples are 0 to {owner.size - 1}.")
    # Of two equal neighbours in an ascending shard the second is a repetition.
    taken = (owner[shard] >= 0) | (np.diff(shard, prepend=-1) == 0)
    if taken.any():
        example = shard[taken][0]
        other = owner[example]
        holders = f"agents {other} and {agent} both hold" if other >= 0 else f"agent {agent} holds twice"
        raise UserError(f"partition: {holders} example {example}; shards must be disjoint.")
    owner[shard] = agent


def _frozen(indices: ArrayLike) -> Indices:
    """The indices ascending, int64, read-only."""
    array = np.asarray(indices)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise UserError(
            f"partition: indices have shape {array.shape} and type {array.dtype}; they must be (n,) integers."
        )
    array = np.sort(array).astype(np.int64)
    array.flags.writeable = False
    return array


def _prepare(labels: ArrayLike, agents: int, examples: ArrayLike | None) -> tuple[NDArray[Any], Indices, Indices]:
    """The labels (M,), their ranks among the distinct labels (M,), and the examples to deal, ascending."""
    array = _check_labels(labels)
    if agents < 1:
        raise UserError(f"partition: {agents} agents; use at least 1.")
    chosen = np.arange(len(array)) if examples is None else _frozen(examples)
    if agents > len(chosen):
        raise UserError(
            f"partition: {agents} agents but only {len(chosen)} examples; use at most {len(chosen)} agents "
            "or more data."
        )
    return array, np.unique(array, return_inverse=True)[1], chosen


def _shuffled_by_class(ranks: Indices, examples: Indices, generator: np.random.Generator) -> list[Indices]:
    """The examples of every class that has some, in random order."""
    mixed = generator.permutation(examples)
    order = ranks[mixed].argsort(kind="stable")
    borders = np.flatnonzero(np.diff(ranks[mixed][order])) + 1
    return np.split(mixed[order], borders)


def _dirichlet_counts(totals: Indices, agents: int, alpha: float, generator: np.random.Generator) -> Indices:
    """(C, N) how many of the `totals` (C,) examples of each class every agent gets."""
    shares = generator.dirichlet(np.full(agents, alpha), size=len(totals))
    borders = np.rint(np.cumsum(shares, axis=1) * totals[:, None]).astype(np.int64)
    borders[:, -1] = totals
    counts = np.diff(borders, axis=1, prepend=0)
    # Rounding favours some places in the row, the same ones in every class when alpha is large, so places are
    # assigned at random. The Dirichlet is symmetric: its distribution stays what it was.
    return generator.permuted(counts, axis=1)


# --- the names of the command line --------------------------------------------------------------------------

KINDS: dict[str, str] = {
    "iid": "shuffled, equal shares of every class",
    "shots:40": "so many examples a class in all, equal shares; shots:40/RULE splits them by another rule",
    "up-to:40": "the same, with all examples of a class that has fewer (they are counted in a warning)",
    "dirichlet:0.1": "label skew, the stronger the smaller the number",
    "by-class": "every class on one agent",
}


def parse(spec: str, labels: ArrayLike, agents: int, seed: int) -> Partition:
    """The partition that a command line or a recipe names.

    Args:
        spec: "iid", "shots:40", "up-to:40", "dirichlet:0.1" or "by-class" ("_" reads as "-"), or shots split by
            another rule: "shots:40/dirichlet:0.1".
        labels: (M,).
        agents: N.
        seed: of every choice.

    Raises:
        UserError: the name is unknown or unreadable, or the rule refuses the labels.
    """
    first, slash, rule = spec.strip().lower().replace("_", "-").partition("/")
    name, argument = _split(first)
    examples, chosen = None, ""
    if name in ("shots", "up-to"):
        number = _number(first, argument, int, f"{name}:40")
        chosen = f"{name}:{number}"
        examples = few_shot(labels, number, seed, allow_fewer=name == "up-to")
        if name == "up-to":
            _warn_of_scarce_classes(labels, number)
        name, argument = _split(rule) if slash else ("iid", "")
        if name in ("shots", "up-to"):
            raise UserError(f"partition: {spec} chooses shots twice; write it as {chosen}.")
    elif slash:
        raise UserError(f"partition: {spec} is not readable; only shots can come before the slash.")

    if name == "dirichlet":
        alpha = _number(rule or first, argument, float, "dirichlet:0.1")
        partition = dirichlet(labels, agents, alpha, seed, examples=examples)
    elif name not in ("iid", "by-class"):
        raise unknown("partition", name, KINDS)
    elif argument:
        raise UserError(f"partition: {name} takes no number; write {name} instead of {name}:{argument}.")
    elif name == "iid":
        partition = iid(labels, agents, seed, examples=examples)
    else:
        partition = by_class(labels, agents, examples=examples)
    if examples is None:
        return partition
    return replace(partition, name=chosen + (f"/{partition.name}" if name != "iid" else ""))


def _warn_of_scarce_classes(labels: ArrayLike, shots: int) -> None:
    counts = np.unique(_check_labels(labels), return_counts=True)[1]
    if scarce := int((counts < shots).sum()):
        warnings.warn(
            f"partition: {scarce} of {len(counts)} classes have fewer than {shots} examples (at least {counts.min()}); "
            "all of these are taken.",
            stacklevel=3,
        )


def _split(rule: str) -> tuple[str, str]:
    name, _, argument = (part.strip() for part in rule.partition(":"))
    return name, argument


def _number(rule: str, argument: str, convert: Callable[[str], Any], example: str) -> Any:
    try:
        return convert(argument)
    except ValueError:
        raise UserError(f"partition: {rule} is not readable; write it as {example}.") from None

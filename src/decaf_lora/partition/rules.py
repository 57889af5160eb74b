"""Which examples does a rule give to each agent? Labels in, shards out."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from decaf_lora.errors import UserError
from decaf_lora.randomness import numpy_generator

from .shards import Indices, Partition, check_labels, frozen

REDRAWS = 100  # draws of Dirichlet proportions at most, until every shard has its least size


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
    names, ranks = np.unique(check_labels(labels), return_inverse=True)
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
    """IID split, shuffled and stratified: shard sizes differ by at most 1, and so do the counts of every class.

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
    # Examples are dealt like cards, class after class. Classes and agents are in random order: otherwise the same
    # agents would always get the examples of classes that have fewer examples than there are agents.
    deck = np.concatenate([piles[rank] for rank in generator.permutation(len(piles))])
    seats = generator.permutation(agents)
    shards = [np.array([], dtype=np.int64)] * agents
    for place, agent in enumerate(seats):
        shards[agent] = deck[place::agents]
    return Partition(tuple(shards), labels, "iid")


def shots(labels: ArrayLike, agents: int, shots: int, seed: int, *, allow_fewer: bool = False) -> Partition:
    """IID split of `shots` examples of every class, in all (not per agent): `few_shot`, then `iid`.

    Args:
        labels: (M,).
        agents: N.
        shots: of each class, at least 1.
        seed: of the choice and of the shuffle.
        allow_fewer: take all of a class that has fewer than `shots`, instead of refusing.

    Raises:
        UserError: a class has fewer examples than `shots`, or there are more agents than examples.
    """
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

    Proportions are drawn again until every shard has `least` examples, at most 100 times. If the last draw still leaves
    a shard short, examples move one by one: the smallest shard takes one of the largest shard's most numerous class.

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
    """Gives every class wholly to agent `class mod N`; classes are numbered in the order of their labels.

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


def _prepare(labels: ArrayLike, agents: int, examples: ArrayLike | None) -> tuple[NDArray[Any], Indices, Indices]:
    """The labels (M,), their ranks among the distinct labels (M,), and the examples to deal, ascending."""
    array = check_labels(labels)
    if agents < 1:
        raise UserError(f"partition: {agents} agents; use at least 1.")
    chosen = np.arange(len(array)) if examples is None else frozen(examples)
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
    # Rounding favours some places of a row and, when alpha is large, the same places in every class. So each class's
    # counts are shuffled over the agents. The Dirichlet is symmetric: the distribution of the shares stays the same.
    return generator.permuted(counts, axis=1)

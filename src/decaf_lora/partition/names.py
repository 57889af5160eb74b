"""Which partition does a name of the command line mean?"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind, Table, call

from .given import as_partition, by_value, read_indices
from .rules import by_class, dirichlet, few_shot, iid
from .shards import Indices, Partition, check_labels


class Deal(NamedTuple):
    """What a rule may use to split the examples."""

    labels: ArrayLike
    """(M,) the label of every example."""
    num_agents: int
    seed: int
    column: "Column"
    examples: Indices | None = None
    """Indices of the examples to split; None: all."""


class Column(Protocol):
    """A function that gives a column of the data by its name."""

    def __call__(self, name: str, split: Literal["train", "test"] = "train") -> ArrayLike:
        """(M,) values of a column of the training examples, or (T,) of the test examples; UserError without it."""


def no_columns(name: str, split: Literal["train", "test"] = "train") -> ArrayLike:
    """The `Column` of a task without columns: raises UserError."""
    raise UserError(
        f"partition: this task has no columns, so none called {name!r}; write a function that returns the shards "
        "(docs/own-partition.md)."
    )


def _iid(deal: Deal, argument: str) -> Partition:
    return iid(deal.labels, deal.num_agents, deal.seed, examples=deal.examples)


def _by_class(deal: Deal, argument: str) -> Partition:
    return by_class(deal.labels, deal.num_agents, examples=deal.examples)


def _dirichlet(deal: Deal, argument: str) -> Partition:
    alpha = _number(f"dirichlet:{argument}", argument, float, "dirichlet:0.1")
    return dirichlet(deal.labels, deal.num_agents, alpha, deal.seed, examples=deal.examples)


def _shots(deal: Deal, argument: str) -> Partition:
    return _chosen("shots", deal, argument)


def _up_to(deal: Deal, argument: str) -> Partition:
    return _chosen("up-to", deal, argument)


def _chosen(name: str, deal: Deal, argument: str) -> Partition:
    """Chooses examples of every class, then splits the chosen ones by the rule after the slash, or IID."""
    first, slash, rule = argument.partition("/")
    number = _number(f"{name}:{first}", first, int, f"{name}:40")
    chosen = f"{name}:{number}"
    if KINDS.written(rule.partition(":")[0].strip()) in ("shots", "up-to"):
        raise UserError(f"partition: {name}:{argument} chooses shots twice; write it as {chosen}.")
    examples = few_shot(deal.labels, number, deal.seed, allow_fewer=name == "up-to")
    if name == "up-to":
        _warn_of_scarce_classes(deal.labels, number)
    made = _dealt(rule if slash else "iid", deal._replace(examples=examples))
    return replace(made, name=chosen if made.name == "iid" else f"{chosen}/{made.name}")


def _column(deal: Deal, argument: str) -> Partition:
    made = by_value(deal.labels, deal.column(argument), f"column:{argument}")
    try:
        values = np.array([str(value) for value in np.asarray(deal.column(argument, "test")).tolist()])
        made = replace(made, tests=tuple(np.flatnonzero(values == name) for name in made.names))
    except UserError:
        pass  # the test examples lack this column, so they belong to no agent
    return as_partition(made, deal.labels, deal.num_agents, examples=deal.examples)


def _files(deal: Deal, argument: str) -> Partition:
    return replace(_column(deal, "site"), name=f"files:{argument}")


def _indices(deal: Deal, argument: str) -> Partition:
    given, name = read_indices(Path(argument).expanduser()), f"indices:{argument}"
    return as_partition(given, deal.labels, deal.num_agents, name, examples=deal.examples)


_BUILT_IN = {
    "iid": Kind(_iid, "shuffled, equal shares of every class"),
    "shots": Kind(
        _shots,
        "so many examples a class in all, equal shares; shots:40/RULE splits them by another rule",
        "shots:40",
        True,
    ),
    "up-to": Kind(
        _up_to,
        "like shots, but takes all examples of a class that has fewer (a warning counts such classes)",
        "up-to:40",
        True,
    ),
    "dirichlet": Kind(_dirichlet, "label skew, the stronger the smaller the number", "dirichlet:0.1", True),
    "by-class": Kind(_by_class, "every class on one agent"),
    "column": Kind(_column, "one agent for every value of a column, named by the value", "column:hospital", True),
    "files": Kind(_files, "one agent for every file of a folder, named by the file", "files:sites", True),
    "indices": Kind(_indices, "the rows of each agent, from a .json or .npz file", "indices:sites.json", True),
}


def _own(function: Callable[..., Any], name: str) -> Kind:
    """The kind of a user's function, which may have parameters `labels`, `num_agents`, `seed` and `column`."""

    def build(deal: Deal, argument: str) -> Partition:
        supplied = {
            "labels": check_labels(deal.labels),
            "num_agents": deal.num_agents,
            "seed": deal.seed,
            "column": lambda name, split="train": np.asarray(deal.column(name, split)),
        }
        made = call(function, name, argument, "partition", supplied)
        return as_partition(made, deal.labels, deal.num_agents, name, examples=deal.examples)

    return Kind(build, "a function of your own", "mine.py:by_hospital")


KINDS: Table[Kind] = Table("partition", "decaf_lora.partitions", _BUILT_IN, _own)
"""The partitions by name. `build` takes a `Deal` and the text after the colon."""


def parse(spec: str, labels: ArrayLike, agents: int, seed: int, column: Column = no_columns) -> Partition:
    """The partition that a command line or a recipe names.

    Args:
        spec: a name of `KINDS` with its argument ("iid", "dirichlet:0.1", "column:hospital"; "_" reads as "-"),
            shots split by another rule ("shots:40/dirichlet:0.1"), or a function of the user's ("mine.py:by_hospital"),
            see `kinds`.
        labels: (M,) the label of every example.
        agents: N, the number of agents.
        seed: the seed of every random choice.
        column: gives the columns of the data to the kinds that split by one, such as `Task.column`.

    Raises:
        UserError: the name is unknown or unreadable, or the rule refuses the labels.
    """
    return _dealt(spec, Deal(labels, agents, seed, column))


def _dealt(spec: str, deal: Deal) -> Partition:
    first, slash, _ = spec.partition("/")
    if slash and ":" not in first and KINDS.written(first.strip()) in KINDS:
        raise UserError(f"partition: {spec} is not readable; only shots can come before the slash.")
    _, kind, argument = KINDS.find(spec)
    return kind.build(deal, argument)


def _warn_of_scarce_classes(labels: ArrayLike, shots: int) -> None:
    counts = np.unique(check_labels(labels), return_counts=True)[1]
    if scarce := int((counts < shots).sum()):
        warnings.warn(
            f"partition: {scarce} of {len(counts)} classes have fewer than {shots} examples (at least {counts.min()}); "
            "all of these are taken.",
            stacklevel=3,
        )


def _number(rule: str, argument: str, convert: Callable[[str], Any], example: str) -> Any:
    try:
        return convert(argument)
    except ValueError:
        raise UserError(f"partition: {rule} is not readable; write it as {example}.") from None

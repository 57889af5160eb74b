"""The contract of an algorithm: what is sent, and how are messages combined?

A rule is a NamedTuple of pure functions, in the manner of optax. A transform is another NamedTuple of pure functions,
which lies over any rule. `transforms.chain` makes an algorithm of one rule and any number of transforms. Neither ever
sees a model, an engine or a network. Every tensor has the agents of this process on its leading axis n: N in a
simulation, a share of N under torchrun, 1 in a mesh. A state is a dict of such tensors by name, so it can be
checkpointed, moved between processes and compared without knowing what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import ALL_FACTORS, Adapter, Factor
from decaf_lora.adapters.names import Tensors, factor_and_layer
from decaf_lora.algorithms.inbox import Inbox

Topology = Literal["graph", "server", "none", "pooled"]
Order = Literal["adapt-combine", "combine-adapt"]


class Round(NamedTuple):
    """One round of a run, and its place in the period of the graphs."""

    number: int
    """From 1."""
    period: int = 1
    """Rounds in a period: 1 on a graph that stays the same, else the rounds until a schedule starts again. A random
    schedule never does; its period is the number of rounds until every message has reached all agents, and is computed
    only for algorithms that need it (`Rule.periodic`), else 1."""

    @property
    def opens(self) -> bool:
        """Whether this is the first round of a period."""
        return (self.number - 1) % self.period == 0

    @property
    def closes(self) -> bool:
        """Whether this is the last round of a period."""
        return self.number % self.period == 0


@dataclass(frozen=True)
class Setting:
    """What an algorithm may know of its run before the first round."""

    agents: Sequence[int]
    """Numbers of the n agents of this process, ascending: the leading axis of every tensor."""
    num_agents: int
    """N, the agents of the whole run."""
    seed: int = 0
    """Of the run; noise that is drawn by name (`randomness.py`) is the same in every process."""
    period: int = 1
    """`Round.period`."""
    neighbours: Sequence[int] = ()
    """In a mesh, the numbers of all agents with which the one agent of this process ever exchanges. It may miss some of
    them in an exchange, so a state that both ends of an edge must share is kept by neighbour. Empty where agents keep
    step."""
    measure_sigma_2: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    """Computes `sigma_2`, only when it is asked for: few rules need it, and it takes long for many agents."""

    @cached_property
    def sigma_2(self) -> float:
        """The share of the agents' disagreement that a round leaves: 0 is an exact average, at 1 nothing is mixed."""
        return self.measure_sigma_2()


class Combined(NamedTuple):
    """What `Rule.combine` returns."""

    adapter: Adapter
    state: Tensors
    rest: Mapping[str, Tensor] = MappingProxyType({})
    """`A/layer` (n, q, d_in), `B/layer` (n, d_out, q): the products that truncation cut off, at the rank q of
    `Inbox.carried`. Empty unless something was carried."""


NO_FACTORS: frozenset[Factor] = frozenset()


def _no_state(adapter: Adapter, setting: Setting) -> Tensors:
    return {}


def _train_all(round_: Round) -> frozenset[Factor]:
    return ALL_FACTORS


def _no_message(adapter: Adapter, state: Tensors, round_: Round) -> Tensors:
    return {}


def _keep(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> Combined:
    return Combined(adapter, state)


def _keep_moments(state: Tensors, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
    return first, second


def reset_moments(state: Tensors, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
    """`Rule.moments` that sets the moments of A and B to 0 after every mixing; the optimizer's step count goes on."""

    def zeros(moments: Tensors) -> Tensors:
        return {k: t if factor_and_layer(k)[0] == "extras" else torch.zeros_like(t) for k, t in moments.items()}

    return zeros(first), zeros(second)


class Rule(NamedTuple):
    """A decentralized LoRA rule: what agents train, send, and make of the messages.

    `state` is the rule's own. Tensors are named as in `Adapter.tensors()`.
    """

    name: str
    topology: Topology = "graph"
    """Who talks: "graph" (the run's mixing matrix), "server" (the complete graph with sample-size weights), "none"
    (nobody), "pooled" (one agent that holds all data)."""
    order: Order = "adapt-combine"
    """What comes first in a round: "adapt-combine" trains, then mixes; "combine-adapt" mixes, then trains."""
    init: Callable[[Adapter, Setting], Tensors] = _no_state
    """(adapter, setting) -> state."""
    trains: Callable[[Round], frozenset[Factor]] = _train_all
    """round -> the factors that the local steps may change."""
    message: Callable[[Adapter, Tensors, Round], Tensors] = _no_message
    """(adapter, state, round) -> the agents' messages, name -> (n, ...)."""
    combine: Callable[[Adapter, Tensors, Inbox, Round], Combined] = _keep
    """(adapter, state, inbox, round) -> new adapter and state."""
    moments: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]] = _keep_moments
    """(state, first, second) -> the optimizer's moments to go on with after `combine`. SGD passes its momentum as
    `first` and an empty `second`."""
    turn: Callable[[Adapter, Inbox, Adapter], Tensors] | None = None
    """(old adapter, inbox, new adapter) -> layer -> P (n, r, r), orthogonal, which turns the plain average A, B of the
    factors to the new factors: A' ~ P A, B' ~ B P^T. None: the new factors have the frame of that average."""
    relay: Callable[[Adapter, Inbox, Round], tuple[Tensors, Tensor]] | None = None
    """With several exchanges in a round, the message of the next one: (adapter, inbox, round) -> the message, and the
    norms (n,) of what it leaves out. None: nothing is left out; the exchanges are made as one (`graphs.compose`)."""
    stacks: frozenset[str] = frozenset()
    """Tensors that `combine` must receive unmixed, by the first part of their names. With several exchanges in a round
    these are forwarded as they are; all others are averaged at every hop."""
    periodic: bool = False
    """Whether the rule depends on `Round.period`."""
    truncates: bool = False
    """Whether `combine` truncates: then it adds `Inbox.carried` to the products, and returns in `rest` what it cuts."""
    personal: frozenset[Factor] = NO_FACTORS
    """Trained factors that stay with their agent: never sent, not even to a neighbour that catches up."""
    alike: bool = False
    """Whether the agents must have one rank, one scale and one start, as where they share one model."""
    begin: Callable[[Adapter, Setting], Adapter] | None = None
    """(adapter, setting) -> the adapter to begin with, for rules that train in coordinates of their own. None: as it
    is."""
    fitted: Callable[[Setting], Rule] | None = None
    """setting -> this rule for one run, for rules whose `trains` depends on the graph. None: the same in all runs."""


@dataclass(frozen=True)
class Change:
    """What combining did to the adapters, for `Transform.after`."""

    old: Adapter
    new: Adapter
    rest: Mapping[str, Tensor]
    """`Combined.rest`."""
    turn: Callable[[], Tensors]
    """Computes `frames`."""

    @cached_property
    def frames(self) -> Tensors:
        """layer -> (n, r, r): the result of `Rule.turn`, computed once for all transforms; empty without a `turn`."""
        return self.turn()


def _starts_empty(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
    return {}


def _any_rule(rule: Rule) -> None:
    return None


class Transform(NamedTuple):
    """An option that lies over any rule, such as gradient tracking or int8 messages.

    `state` is the transform's own; the states of the rule and of other transforms are out of its sight. A function that
    is None changes nothing. Steering, sending and moments go through the transforms in the order of the chain,
    receiving in the opposite order.
    """

    name: str
    """Key of the transform's state, and first part of the names of the tensors that the transform adds to a message:
    `tracking/A/layer`."""
    init: Callable[[Adapter, Tensors, Tensors, Setting], Tensors] = _starts_empty
    """(adapter, trained, message, setting) -> state. `trained` are the tensors that local steps change; `message` is
    the first round's, from the rule and the transforms before this one."""
    steer: Callable[[Tensors, Tensors, Round], tuple[Tensors, Tensors]] | None = None
    """(state, gradients, round) -> (gradients, state). Called before every optimizer step."""
    send: Callable[[Adapter, Tensors, Tensors, Round], tuple[Tensors, Tensors]] | None = None
    """(adapter, state, message, round) -> (message, state). Called once an exchange."""
    receive: Callable[[Adapter, Tensors, Inbox, Round], tuple[Inbox, Tensors]] | None = None
    """(adapter, state, inbox, round) -> (inbox, state). Undoes what `send` did: the inbox returned holds no tensor of
    this transform."""
    relayed: Callable[[Adapter, Tensors, Inbox, Round], Tensors] | None = None
    """(adapter, state, inbox, round) -> state. Called after each exchange of a round but the last."""
    after: Callable[[Tensors, Change, Round], Tensors] | None = None
    """(state, change, round) -> state. Called after the rule has combined."""
    moments: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]] | None = None
    """(state, first, second) -> (first, second), the optimizer's moments. Called after `Rule.moments`."""
    penalty: Callable[[Tensors, Tensors, Round], Tensors] | None = None
    """(state, values, round) -> the gradient of a penalty on the trained tensors, by name. Called before every
    optimizer step, with the tensors' values; it is added to the gradients."""
    personal: frozenset[Factor] = NO_FACTORS
    """As `Rule.personal`."""
    check: Callable[[Rule], None] = _any_rule
    """Raises UserError for a rule that the transform cannot lie over."""
    same_factors: bool = False
    """Whether the rule must train the same factors in all rounds."""
    stacks: frozenset[str] = frozenset()
    """As `Rule.stacks`."""
    periodic: bool = False
    """As `Rule.periodic`."""
    suffix: str = ""
    """Ending that the transform adds to the algorithm's name: `_tracked`."""


def turned(tensors: Tensors, frames: Tensors) -> Tensors:
    """Factors, or gradients of factors, turned into another frame: P A and B P^T.

    Args:
        tensors: name -> (n, ...); the names end as in `Adapter.tensors()`.
        frames: layer -> P (n, r, r). Layers without one, and extras, stay as they are.
    """
    out = {}
    for key, tensor in tensors.items():
        group, layer = factor_and_layer(key)
        if group == "A" and layer in frames:
            tensor = frames[layer] @ tensor
        elif group == "B" and layer in frames:
            tensor = tensor @ frames[layer].mT
        out[key] = tensor
    return out

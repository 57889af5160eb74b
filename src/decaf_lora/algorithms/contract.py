"""The contract: what is sent, and what becomes of what arrives?

A rule is a NamedTuple of pure functions, in the manner of optax; a transform is another that lies over any rule.
`transforms.chain` makes an algorithm of one rule and some transforms. None of them ever sees a model, an engine or a
network. Every tensor has the agents of this process on its leading axis n: N in a simulation, a share of N under
torchrun, 1 in a mesh. A state is a dict of such tensors by name, so it can be checkpointed, moved between processes and
compared without knowing what it means.
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
from decaf_lora.errors import UserError

Topology = Literal["graph", "server", "none", "pooled"]
Order = Literal["adapt-combine", "combine-adapt"]


class Round(NamedTuple):
    """One round of a run, and where it lies in the schedule of graphs."""

    number: int
    """From 1."""
    period: int = 1
    """Rounds until what every agent sends has reached all others, or on a schedule until it starts again: 1 on a graph
    that stays the same. On random schedules it is known only to those who say that they need it (`periodic`)."""

    @property
    def opens(self) -> bool:
        """Whether it is the first round of a period."""
        return (self.number - 1) % self.period == 0

    @property
    def closes(self) -> bool:
        """Whether it is the last round of a period."""
        return self.number % self.period == 0


@dataclass(frozen=True)
class Setting:
    """What an algorithm may know of its run before the first round."""

    agents: Sequence[int]
    """Numbers of the n agents of this process, ascending: the leading axis of every tensor."""
    num_agents: int
    """N, the agents of the whole run."""
    seed: int = 0
    """For noise that is drawn by name (`randomness.py`), the same whoever draws it."""
    period: int = 1
    """`Round.period`."""
    neighbours: Sequence[int] = ()
    """Numbers of the agents with which the one agent of this process ever exchanges, where it may miss some of them:
    what must be the same at both ends of an edge is kept for each. Empty where agents keep step."""
    measure_sigma_2: Callable[[], float] = field(default=lambda: 0.0, repr=False)
    """Computes `sigma_2`, which takes long for many agents and which few rules need."""

    @cached_property
    def sigma_2(self) -> float:
        """What a round leaves of the agents' disagreement, from 0 (exact average) to 1 (nothing is mixed)."""
        return self.measure_sigma_2()


class Combined(NamedTuple):
    """What a rule makes of what arrived."""

    adapter: Adapter
    state: Tensors
    rest: Mapping[str, Tensor] = MappingProxyType({})
    """`A/layer` (n, q, d_in), `B/layer` (n, d_out, q): what the rule had to leave out of the products, at the rank of
    `Inbox.carried`; empty unless something was carried."""


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
    """The moments of A and B start at 0 again after every mixing; the optimizer's step count goes on."""

    def zeros(moments: Tensors) -> Tensors:
        return {k: t if factor_and_layer(k)[0] == "extras" else torch.zeros_like(t) for k, t in moments.items()}

    return zeros(first), zeros(second)


class Rule(NamedTuple):
    """A decentralized LoRA rule. `state` is the rule's own; names of tensors are those of `Adapter.tensors()`."""

    name: str
    topology: Topology = "graph"
    """Who talks: "graph" (the run's mixing matrix), "server" (the complete graph with sample-size weights), "none"
    (nobody), "pooled" (one agent that holds all data)."""
    order: Order = "adapt-combine"
    """Of a round: "adapt-combine" trains, then mixes; "combine-adapt" mixes, then trains."""
    init: Callable[[Adapter, Setting], Tensors] = _no_state
    """(adapter, setting) -> state."""
    trains: Callable[[Round], frozenset[Factor]] = _train_all
    """round -> the factors that the local steps may change."""
    message: Callable[[Adapter, Tensors, Round], Tensors] = _no_message
    """(adapter, state, round) -> name -> (n, ...): what every agent sends."""
    combine: Callable[[Adapter, Tensors, Inbox, Round], Combined] = _keep
    """(adapter, state, inbox, round) -> new adapter and state."""
    moments: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]] = _keep_moments
    """(state, first, second) -> what becomes of the optimizer's moments after `combine`. SGD passes its momentum as
    `first` and an empty `second`."""
    turn: Callable[[Adapter, Inbox, Adapter], Tensors] | None = None
    """(old adapter, inbox, new adapter) -> layer -> (n, r, r) the orthogonal P that takes the frame of the plain factor
    average to that of the new factors, A' ~ P A, B' ~ B P^T. None: the new frame is that of the average."""
    relay: Callable[[Adapter, Inbox, Round], tuple[Tensors, Tensor]] | None = None
    """(adapter, inbox, round) -> the message of the next of several exchanges in a round, and (n,) the norm of what it
    leaves out. None: nothing is left out, and the exchanges are done as one (`graphs.compose`)."""
    stacks: frozenset[str] = frozenset()
    """First parts of the names of those tensors that `combine` must receive unmixed. With several exchanges in a round
    these are forwarded as they are; all others are averaged at every hop."""
    periodic: bool = False
    """Whether anything depends on `Round.period`."""
    truncates: bool = False
    """Whether `combine` adds `Inbox.carried` to what it mixes, and returns as `rest` what it cuts off."""


@dataclass(frozen=True)
class Change:
    """What an exchange did to the adapters."""

    old: Adapter
    new: Adapter
    rest: Mapping[str, Tensor]
    """`Combined.rest`."""
    turn: Callable[[], Tensors]
    """Computes `frames`."""

    @cached_property
    def frames(self) -> Tensors:
        """layer -> (n, r, r): `Rule.turn`, computed once for all transforms; empty where the frame is the average's."""
        return self.turn()


def _starts_empty(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
    return {}


def _any_rule(rule: Rule) -> None:
    return None


class Transform(NamedTuple):
    """An option that lies over any rule. `state` is the transform's own, and all that it sees of a state.

    What is None is left as it is. Steering, sending and moments go through the transforms in the order of the chain,
    receiving in the opposite one.
    """

    name: str
    """Names the transform's state. What it adds to a message has names that start with it: `tracking/A/layer`."""
    init: Callable[[Adapter, Tensors, Tensors, Setting], Tensors] = _starts_empty
    """(adapter, trained, message, setting) -> state; `trained` are the tensors that local steps change, `message` is
    what the parts before it send in the first round."""
    steer: Callable[[Tensors, Tensors, Round], tuple[Tensors, Tensors]] | None = None
    """(state, gradients, round) -> (gradients, state), before every optimizer step."""
    send: Callable[[Adapter, Tensors, Tensors, Round], tuple[Tensors, Tensors]] | None = None
    """(adapter, state, message, round) -> (message, state). Called once an exchange."""
    receive: Callable[[Adapter, Tensors, Inbox, Round], tuple[Inbox, Tensors]] | None = None
    """(adapter, state, inbox, round) -> (inbox, state): takes its own part out and undoes what `send` did."""
    relayed: Callable[[Adapter, Tensors, Inbox, Round], Tensors] | None = None
    """(adapter, state, inbox, round) -> state, after each exchange of a round but the last."""
    after: Callable[[Tensors, Change, Round], Tensors] | None = None
    """(state, change, round) -> state, after the rule has combined."""
    moments: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]] | None = None
    """(state, first, second) -> the optimizer's moments after the rule's own change of them."""
    check: Callable[[Rule], None] = _any_rule
    """Raises UserError for a rule that the transform cannot lie over."""
    stacks: frozenset[str] = frozenset()
    """As `Rule.stacks`."""
    periodic: bool = False
    """As `Rule.periodic`."""
    suffix: str = ""
    """What the algorithm's name says of it: `_tracked`."""


def check_factors(rule: Rule, field: str) -> None:
    """UserError for a transform, set by `field`, over a rule that does not train the same factors in all rounds."""
    first = rule.trains(Round(1))
    if other := next((number for number in range(2, 100) if rule.trains(Round(number)) != first), None):
        raise UserError(
            f"{field}: {rule.name} trains other factors in round {other} than in round 1; it needs the same in all. "
            "Leave it out."
        )


def turned(tensors: Tensors, frames: Tensors) -> Tensors:
    """Factors (n, ...), or gradients of factors, in the frame that `frames`, layer -> (n, r, r), turn to.

    Names end as in `Adapter.tensors()`.
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

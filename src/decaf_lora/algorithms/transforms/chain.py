"""How do one rule and the transforms over it become an algorithm?

message   rule -> first transform -> ... -> last transform -> neighbours
inbox     neighbours -> last transform -> ... -> first transform -> rule
state     {"rule": ..., "tracking": ..., "int8": ...}: every part sees its own alone
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from decaf_lora.adapters.adapter import ALL_FACTORS, Adapter, Factor
from decaf_lora.adapters.names import Tensors, owner
from decaf_lora.algorithms.contract import Change, Order, Round, Rule, Setting, Topology, Transform
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError

MOST_ASKED = 1_000_000
"""Rounds about which a rule is asked before a run; asking takes below a second."""

State = dict[str, Tensors]
"""Part of the chain ("rule", or a transform's name) -> its state."""


class Mixed(NamedTuple):
    """What `Algorithm.combine` returns."""

    adapter: Adapter
    state: State
    inbox: Inbox
    """What arrived, as the rule saw it: decoded, and without the tensors of transforms."""


@dataclass(frozen=True)
class Algorithm:
    """A rule with transforms over it: `algorithms.decaf() | algorithms.tracking() | algorithms.int8()`.

    Args:
        rule: what agents train, send and combine.
        transforms: the options over the rule, the first one next to the rule.

    Raises:
        UserError: a transform is there twice, or cannot lie over the rule. What a rule trains is asked of a hundred
            rounds here, of all rounds when a run begins.
    """

    rule: Rule
    transforms: tuple[Transform, ...] = ()

    def __post_init__(self) -> None:
        for place, transform in enumerate(self.transforms):
            if transform.name in ("rule", *(other.name for other in self.transforms[:place])):
                raise UserError(f"algorithm: {transform.name} lies over {self.rule.name} twice; leave one out.")
            transform.check(self.rule)
            if transform.same_factors:
                self.trained(rounds=100)

    def __or__(self, transform: Transform) -> Algorithm:
        """This algorithm with one more transform around it."""
        return replace(self, transforms=(*self.transforms, transform))

    @property
    def name(self) -> str:
        """The rule's name, and what transforms add to it."""
        return self.rule.name + "".join(transform.suffix for transform in self.transforms)

    @property
    def topology(self) -> Topology:
        """`Rule.topology`."""
        return self.rule.topology

    @property
    def order(self) -> Order:
        """`Rule.order`."""
        return self.rule.order

    @property
    def stacks(self) -> frozenset[str]:
        """`stacks` of the rule and of all transforms."""
        return self.rule.stacks.union(*(transform.stacks for transform in self.transforms))

    @property
    def periodic(self) -> bool:
        """Whether anything depends on the period of the schedule."""
        return self.rule.periodic or any(transform.periodic for transform in self.transforms)

    @property
    def personal(self) -> frozenset[Factor]:
        """The factors that never leave their agent."""
        return self.rule.personal.union(*(transform.personal for transform in self.transforms))

    @property
    def penalizes(self) -> bool:
        """Whether `steer` needs the values of the trained tensors."""
        return any(transform.penalty is not None for transform in self.transforms)

    @property
    def relays(self) -> bool:
        """Whether several exchanges in a round are made one by one, with `relay` between two of them."""
        return self.rule.relay is not None

    def trains(self, round_: Round) -> frozenset[Factor]:
        """The factors that the local steps of a round may change.

        Raises:
            UserError: they are others than in round 1, and a transform needs the same in all.
        """
        factors = self.rule.trains(round_)
        needs = next((transform.name for transform in self.transforms if transform.same_factors), None)
        if needs and factors != self.rule.trains(Round(1, round_.period)):
            raise UserError(
                f"algorithm.{needs}: {self.rule.name} trains other factors in round {round_.number} than in round 1; "
                "it needs the same in all. Leave it out."
            )
        return factors

    def trained(self, rounds: int, period: int = 1) -> frozenset[Factor]:
        """The factors that the local steps of a run may change, in one round or another.

        Args:
            rounds: of the run; of a longer run than `MOST_ASKED` its first ones.
            period: `Round.period`.

        Raises:
            UserError: as for `trains`, of any of these rounds.
        """
        found, same = frozenset[Factor](), any(transform.same_factors for transform in self.transforms)
        for number in range(1, min(rounds, MOST_ASKED) + 1):
            found |= self.trains(Round(number, period))
            if found == ALL_FACTORS and not same:
                break
        return found

    def fitted(self, setting: Setting) -> Algorithm:
        """This algorithm for one run; see `Rule.fitted`."""
        return self if self.rule.fitted is None else replace(self, rule=self.rule.fitted(setting))

    def begin(self, adapter: Adapter, setting: Setting) -> Adapter:
        """The adapter to begin with; see `Rule.begin`."""
        return adapter if self.rule.begin is None else self.rule.begin(adapter, setting)

    def init(self, adapter: Adapter, setting: Setting) -> State:
        """The state before the first round."""
        first = Round(1, setting.period)
        trained = adapter.tensors(self.rule.trains(first))
        state = {"rule": self.rule.init(adapter, setting)}
        message = self.rule.message(adapter, state["rule"], first)
        for transform in self.transforms:
            own = transform.init(adapter, trained, message, setting)
            state[transform.name] = own
            if transform.send is not None and transform is not self.transforms[-1]:
                message, _ = transform.send(adapter, own, message, first)
        return state

    def steer(
        self, state: State, gradients: Tensors, round_: Round, values: Tensors | None = None
    ) -> tuple[Tensors, State]:
        """(gradients, state) for an optimizer step; the very same gradients if no transform steers.

        Args:
            state: of the parts.
            gradients: of the trained tensors, name -> (n, ...).
            round_: the round.
            values: the trained tensors that the gradients belong to; may be left out unless `penalizes`.
        """
        for transform in self.transforms:
            if transform.penalty is not None:
                assert values is not None
                added = transform.penalty(state[transform.name], values, round_)
                gradients = {name: g + added[name] if name in added else g for name, g in gradients.items()}
            if transform.steer is not None:
                gradients, own = transform.steer(state[transform.name], gradients, round_)
                state = {**state, transform.name: own}
        return gradients, state

    def send(self, adapter: Adapter, state: State, round_: Round) -> tuple[Tensors, State]:
        """The message of an exchange, name -> (n, ...), and the state to go on with once the exchange is made."""
        message = self.rule.message(adapter, state["rule"], round_)
        for transform in self.transforms:
            if transform.send is not None:
                message, own = transform.send(adapter, state[transform.name], message, round_)
                state = {**state, transform.name: own}
        return message, state

    def relay(self, adapter: Adapter, inbox: Inbox, round_: Round) -> tuple[Tensors, Tensor]:
        """The message of the next exchange of a round, and the norms (n,) of what it leaves out; see `Rule.relay`."""
        if self.rule.relay is None:
            raise RuntimeError(f"{self.name} relays nothing")
        names = {transform.name for transform in self.transforms}
        own = {name: t for name, t in inbox.tensors.items() if owner(name) not in names}
        message, cut = self.rule.relay(adapter, replace(inbox, tensors=own), round_)
        return message | inbox.averages(name for name in inbox.tensors if name not in own), cut

    def relayed(self, adapter: Adapter, state: State, inbox: Inbox, round_: Round) -> State:
        """The state after an exchange that is not the last of its round."""
        for transform in self.transforms:
            if transform.relayed is not None:
                state = {**state, transform.name: transform.relayed(adapter, state[transform.name], inbox, round_)}
        return state

    def combine(self, adapter: Adapter, state: State, inbox: Inbox, round_: Round) -> Mixed:
        """The new adapters and state. `state` must be the one that `send` returned."""
        for transform in reversed(self.transforms):
            if transform.receive is not None:
                inbox, own = transform.receive(adapter, state[transform.name], inbox, round_)
                state = {**state, transform.name: own}
        new, rule_state, rest = self.rule.combine(adapter, state["rule"], inbox, round_)
        state = {**state, "rule": rule_state}
        read, turn = inbox, self.rule.turn
        change = Change(adapter, new, rest, lambda: {} if turn is None else turn(adapter, read, new))
        for transform in self.transforms:
            if transform.after is not None:
                state = {**state, transform.name: transform.after(state[transform.name], change, round_)}
        return Mixed(new, state, inbox)

    def moments(self, state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        """The optimizer's moments to go on with after `combine`; the very same objects if all parts keep them."""
        first, second = self.rule.moments(state["rule"], first, second)
        for transform in self.transforms:
            if transform.moments is not None:
                first, second = transform.moments(state[transform.name], first, second)
        return first, second


def chain(rule: Rule, *transforms: Transform) -> Algorithm:
    """The algorithm of `rule` with `transforms` over it, the first one next to the rule."""
    return Algorithm(rule, transforms)

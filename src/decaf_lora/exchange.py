"""The exchange of a round: send the message, receive the neighbours', combine them, and count the bytes.

No task, model or trainer is needed, so a run, a plan and a test of theory all make their exchanges here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, factor_and_layer, owner
from decaf_lora.algorithms.contract import Round, Rule, Setting
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.chain import Algorithm, State
from decaf_lora.engines.base import Engine, Pending, Sizes
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, Schedule
from decaf_lora.timing import Phases, unwatched


def exchanges_of_round(schedule: Schedule, gossip_steps: int | Literal["period"]) -> int:
    """The number of exchanges in a round.

    Args:
        schedule: the graph of every exchange.
        gossip_steps: the number itself, or "period" for the length of the schedule's period.

    Raises:
        UserError: "period", and the schedule has none.
    """
    if gossip_steps != "period":
        return gossip_steps
    if schedule.period is None:
        raise UserError(f"gossip_steps: {schedule.name} never starts again, so it has no period; give a number.")
    return schedule.period


def rounds_to_reach_all(schedule: Schedule, gossip_steps: int) -> int:
    """Rounds until every agent has heard from all others (see `Round.period`).

    With a periodic schedule: until a round begins together with a period of the schedule.
    """
    if schedule.period is not None:
        return math.lcm(schedule.period, gossip_steps) // gossip_steps
    return math.ceil(schedule.pace / gossip_steps)


def refuse_alone(algorithm: Algorithm, schedule: Schedule, steps: int) -> None:
    """Checks that agents on machines of their own, which talk to neighbours only, can run an algorithm.

    Args:
        algorithm: what the agents are to run.
        schedule: the graph of every exchange.
        steps: exchanges in a round.

    Raises:
        UserError: the algorithm needs a server or pooled data, the schedule never repeats, or an option needs agents
            that reach more than their neighbours or never miss one.
    """
    if algorithm.topology == "server":
        raise UserError(f"algorithm: {algorithm.name} needs a server; use decaf on the complete graph.")
    if algorithm.topology == "pooled":
        raise UserError(f"algorithm: {algorithm.name} needs all data in one place; use decaf on the complete graph.")
    if algorithm.topology == "none":
        return
    if schedule.period is None:
        raise UserError(
            f"graph: {schedule.name} never starts again, so an agent cannot know whom to connect to; give one graph, "
            "or a schedule that repeats."
        )
    if steps > 1 and not algorithm.relays:
        coded = any(transform.name == "int8" for transform in algorithm.transforms)
        raise UserError(
            f"gossip_steps: {steps} exchanges a round need algorithm.relay_rank here, as messages go to neighbours only"
            + (", and algorithm.messages int8 cannot be combined with it; use full messages, or 1." if coded else ".")
        )
    if algorithm.periodic and (rounds := rounds_to_reach_all(schedule, steps)) > 1:
        raise UserError(
            f"algorithm.tracking: over the {rounds} rounds of {schedule.name} it needs agents that never miss one; use "
            "a graph that stays the same, or leave tracking out."
        )


def refuse_start(
    rule: Rule, uniform: bool, common_start: bool, adapters: Sequence[str | PathLike[str] | None] | None
) -> None:
    """Checks that a rule allows how the agents start.

    Args:
        rule: what the agents are to run.
        uniform: whether they have one rank and scale.
        common_start: whether they start with one random A.
        adapters: where the adapters are that they start from instead, one for each; None: nowhere.

    Raises:
        UserError: the rule begins with factors of its own, or needs agents that are alike.
    """
    if rule.begin is not None and adapters is not None:
        raise UserError(f"init_adapters: {rule.name} begins with factors of its own; leave them out, or use decaf.")
    found = ""
    if not uniform:
        found = "lora.ranks: the agents differ in rank or scale"
    elif adapters is not None and len(set(map(str, adapters))) > 1:
        found = "init_adapters: the agents start from different adapters"
    elif adapters is None and not common_start:
        found = "start: the agents start apart"
    if rule.alike and found:
        raise UserError(f"{found}, but {rule.name} needs them alike; make them so, or use decaf.")


def _neighbours(schedule: Schedule, agent: int) -> tuple[int, ...]:
    """All agents with which `agent` ever exchanges, on a schedule that repeats."""
    return tuple(sorted({j for round_ in range(schedule.period or 1) for j in schedule.at(round_).neighbours(agent)}))


class Templates(NamedTuple):
    """What the messages of a run look like. Only names, shapes and dtypes count, not the values."""

    hops: list[tuple[Tensors, Sizes]]
    """For each exchange of a round: a message, name -> (n, ...), and what of it travels."""
    held: Tensors
    """Tensors as `Engine.hold` gets them."""


class Started(NamedTuple):
    """A round whose first exchange has been started."""

    round: Round
    message: Tensors
    sizes: Sizes
    state: State
    """The state to go on with once the exchange has been made. Until then the state before it counts."""
    pending: Pending[Inbox]


class Exchanged(NamedTuple):
    """The result of the exchanges of a round."""

    round: Round
    """The round that took place: the one that was started, or a later one where the neighbours were ahead."""
    adapter: Adapter
    state: State
    inbox: Inbox
    """What arrived in the last exchange, as the rule saw it."""
    cut: Tensor | None
    """(n,) norm of what was cut off between the exchanges of a round; None for rules that cut nothing there."""
    bytes_sent: float
    """Bytes that an agent sent, mean over the agents reported."""
    wire_bytes: float | None
    """The part of these bytes that crossed between processes, as the engine counts it; None in one process."""


class _Costs(NamedTuple):
    """The bytes of `Exchanged`."""

    bytes_sent: float = 0.0
    wire_bytes: float | None = None


class Exchange:
    """Makes the exchanges of an algorithm on a schedule of graphs.

    Args:
        algorithm: one whose topology is "graph" or "server".
        schedule: the graph of every exchange.
        engine: where the agents live.
        rounds: of the run. The rule is asked what it trains in each.
        gossip_steps: exchanges in a round.
        seed: of the run.
        ranks: layer -> rank of each of the N agents, where agents differ. An agent sends no more than its own rank.
        phase: gives the context managers in which the phases "exchange" and "combine" run.

    Raises:
        UserError: the rule trains other factors in some round than a transform allows.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        schedule: Schedule,
        engine: Engine,
        *,
        rounds: int = 100,
        gossip_steps: int = 1,
        seed: int = 0,
        ranks: Mapping[str, Sequence[int]] | None = None,
        phase: Phases = unwatched,
    ) -> None:
        self.schedule, self.engine = schedule, engine
        self.gossip_steps, self.phase = gossip_steps, phase
        self._ranks = ranks or {}
        # The period of a random schedule takes long to find, and some never reach all agents. So it is computed only
        # for algorithms that depend on it.
        known = schedule.period is not None or algorithm.periodic
        period = rounds_to_reach_all(schedule, gossip_steps) if known else 1
        self.setting = Setting(
            tuple(engine.agents),
            engine.num_agents,
            seed,
            period,
            () if len(engine.reports) == engine.num_agents else _neighbours(schedule, engine.agents[0]),
            lambda: schedule.sigma_2_per_round**gossip_steps,
        )
        self.algorithm = algorithm.fitted(self.setting)
        """The algorithm as it is in this run."""
        self.rounds, self.trained = rounds, self.algorithm.trained(rounds, period)
        """The factors that the local steps may change in some round."""
        self._windows = functools.lru_cache(maxsize=64)(schedule.window)

    def round(self, number: int) -> Round:
        """Round `number`, from 1."""
        return Round(number, self.setting.period)

    def begin(self, adapter: Adapter) -> Adapter:
        """The adapter to begin with (`Rule.begin`)."""
        return self.algorithm.begin(adapter, self.setting)

    def init(self, adapter: Adapter) -> State:
        """The algorithm's state before the first round."""
        return self.algorithm.init(adapter, self.setting)

    def templates(self, adapter: Adapter) -> Templates:
        """The templates of all messages, which a mesh needs before the first one arrives.

        Raises:
            UserError: the rule sends other tensors in some round than in the first.
        """
        state = self.init(adapter)
        message, _ = self.algorithm.send(adapter, state, self.round(1))
        for number in range(2, min(self.rounds, 100) + 1):
            self._refuse_another(adapter, state, self.round(number))
        hops, everybody = [(message, self._own_sizes(message))], list(self.setting.agents)
        for _ in self._hops(1)[1:]:
            inbox = Inbox.from_weights(hops[-1][0], np.eye(self.setting.num_agents), everybody, everybody)
            hops.append((self.algorithm.relay(adapter, inbox, self.round(1))[0], {}))
        return Templates(hops, self._held(adapter))

    def bytes_per_round(self, adapter: Adapter) -> float:
        """Bytes that an agent will send in a round, mean over the rounds of a period and the agents reported.

        No message is sent. Of a schedule that never repeats, the mean is over the first 8 rounds.
        """
        if self.algorithm.topology not in ("graph", "server"):
            return 0.0
        period, templates = self.schedule.period, self.templates(adapter)
        rounds = 8 if period is None else math.lcm(period, self.gossip_steps) // self.gossip_steps
        return (
            sum(
                self._bytes_of(message, graph, sizes)
                for number in range(1, rounds + 1)
                for (message, sizes), graph in zip(templates.hops, self._hops(number), strict=True)
            )
            / rounds
        )

    def start(self, adapter: Adapter, state: State, number: int) -> Started:
        """Sends the message of round `number`. `adapter` and `state` must not change until `finish`."""
        round_ = self.round(number)
        self._refuse_unasked(adapter, state, round_)
        with self.phase("exchange"):
            message, state = self.algorithm.send(adapter, state, round_)
            sizes = self._own_sizes(message)
            pending = self._start(message, number, 0, sizes)
        return Started(round_, message, sizes, state, pending)

    def _refuse_unasked(self, adapter: Adapter, state: State, round_: Round) -> None:
        """UserError for a rule that does in a late round what it did not say when it was asked."""
        if new := self.algorithm.trains(round_) - self.trained:
            raise UserError(
                f"algorithm: {self.algorithm.name} trains {sorted(new)[0]} for the first time in round "
                f"{round_.number}; the rounds about which it was asked ({self.rounds}) train "
                f"{', '.join(sorted(self.trained))} alone."
            )
        if len(self.engine.reports) < self.engine.num_agents:
            self._refuse_another(adapter, state, round_)

    def _refuse_another(self, adapter: Adapter, state: State, round_: Round) -> None:
        """UserError for a rule whose message is not made up as in round 1: neighbours in a mesh would reject it."""
        rule = self.algorithm.rule
        first, now = (_made_up(rule.message(adapter, state["rule"], r)) for r in (self.round(1), round_))
        if first != now:
            other = sorted(dict(first ^ now))[0]
            raise UserError(
                f"algorithm: {rule.name} sends another {other} in round {round_.number} than in round 1; between sites "
                "a message has the same tensors in every round. Send them all, or run it in one process."
            )

    def finish(self, adapter: Adapter, started: Started) -> Exchanged:
        """Waits for the started exchange, makes the further exchanges of the round, and combines."""
        with self.phase("exchange"):
            round_, state, inbox, cut, costs = self._make(adapter, started)
        if not inbox.senders:
            # The message came too late: this agent takes part again in a later round, if there is one.
            number, adapter, state = self.meet(adapter, state, round_.number)
            self.hold(adapter)
            return Exchanged(self.round(number - 1), adapter, state, inbox, None, *costs)
        with self.phase("combine"):
            new, state, read = self.algorithm.combine(adapter, state, inbox, round_)
        self.hold(new)
        return Exchanged(round_, new, state, read, cut, *costs)

    def meet(self, adapter: Adapter, state: State, number: int) -> tuple[int, Adapter, State]:
        """The round to take part in next; to be asked before `start`.

        Agents that are late, or come back, take the neighbours' average for their adapter, and a fresh state.

        Args:
            adapter: of the agents as they are.
            state: likewise.
            number: their next round.

        Returns:
            `number`, or the number of a later round if the neighbours are there already; adapter and state.
        """
        exchange, late = self.engine.current(self._first(number))
        if late:
            with self.phase("exchange"):
                inbox = self.engine.catch_up(self._held(adapter))
            exchange, round_ = inbox.exchange, self.round(self._number(inbox.exchange))
            with self.phase("combine"):
                rule = self.algorithm.rule
                adapter = rule.combine(adapter, self.init(adapter)["rule"], inbox, round_).adapter
                state = self.init(adapter)
        return self._number(exchange), adapter, state

    def hold(self, adapter: Adapter) -> None:
        """Hands the adapters to the engine, which gives them to neighbours that catch up."""
        self.engine.hold(self._held(adapter))

    def _held(self, adapter: Adapter) -> Tensors:
        """The tensors that the rule trains in some round and does not keep to the agent, and so may combine."""
        return adapter.message(self.trained - self.algorithm.personal)

    def _make(self, adapter: Adapter, started: Started) -> tuple[Round, State, Inbox, Tensor | None, _Costs]:
        """Makes all exchanges of a round. If the neighbours have gone on meanwhile, starts again with their round."""
        pending, costs = started.pending, _Costs()
        while True:
            inbox, cut, state = pending.wait(), None, started.state
            number = self._number(inbox.exchange)
            if not inbox.senders:
                return self.round(number), state, inbox, cut, costs
            first, *others = self._hops(number)
            costs = self._plus(costs, started.message, first, started.sizes)
            for hop, graph in enumerate(others, start=1):
                state = self.algorithm.relayed(adapter, state, inbox, self.round(number))
                message, left_out = self.algorithm.relay(adapter, inbox, self.round(number))
                cut = torch.zeros(()).hypot(left_out) if cut is None else cut.hypot(left_out)
                # A forwarded message is a mixture, so no agent's own sizes apply to it.
                inbox = self._start(message, number, hop, {}).wait()
                costs = self._plus(costs, message, graph, {})
                if inbox.exchange != self._first(number) + hop:
                    pending = self._start(started.message, self._number(inbox.exchange), 0, started.sizes)
                    break
            else:
                return self.round(number), state, inbox, cut, costs

    def _start(self, message: Tensors, number: int, hop: int, sizes: Sizes) -> Pending[Inbox]:
        return self.engine.start(message, self._hops(number)[hop], self._first(number) + hop, sizes)

    def _first(self, number: int) -> int:
        """The first exchange of a round."""
        return (number - 1) * self.gossip_steps

    def _number(self, exchange: int) -> int:
        """The round that begins with `exchange`, or with the next one that begins a round."""
        return math.ceil(exchange / self.gossip_steps) + 1

    def _hops(self, number: int) -> tuple[Graph, ...]:
        """The graphs of a round's exchanges; for rules that do not relay, the one composed graph of all."""
        first = self._first(number)
        graph = self._windows(first % self.schedule.period if self.schedule.period else first, self.gossip_steps)
        return graph.hops if graph.hops and self.algorithm.relays else (graph,)

    def _plus(self, costs: _Costs, message: Tensors, graph: Graph, sizes: Sizes) -> _Costs:
        """`costs` with those of one more exchange added."""
        told = self.engine.wire_bytes(message, graph, sizes)
        wire_bytes = costs.wire_bytes if told is None else (costs.wire_bytes or 0.0) + told
        return _Costs(costs.bytes_sent + self._bytes_of(message, graph, sizes), wire_bytes)

    def _own_sizes(self, message: Tensors) -> Sizes:
        """What of a message travels where agents differ in rank: as many rows of A and columns of B as the own rank."""
        sizes = {}
        for name, tensor in message.items():
            factor, layer = factor_and_layer(name)
            if factor in ("A", "B") and tensor.dim() == 3 and layer in self._ranks:
                sizes[name] = (1 if factor == "A" else 2, self._ranks[layer])
        return sizes

    def _bytes_of(self, message: Tensors, graph: Graph, sizes: Sizes) -> float:
        """Bytes that an agent sends in an exchange, mean over the agents reported. To a server a message goes once.

        In a composed exchange, averaged tensors go to all receivers of each hop. Stacked tensors are forwarded whole;
        since all agents know the schedule, every agent's stacked tensors reach each other agent once.
        """
        stacks, (whole, averaged) = self.algorithm.stacks, np.zeros((2, self.engine.num_agents))
        for name, tensor in message.items():
            size: float | np.ndarray = tensor[0].numel() * tensor.element_size()
            if name in sizes:
                axis, own = sizes[name]
                size = size * np.asarray(own) / tensor.shape[axis]
            if owner(name) in stacks:
                whole += size
            else:
                averaged += size
        if graph.is_server:
            return float(np.mean((whole + averaged)[self.engine.reports]))
        receivers = np.asarray(graph.degrees)
        hops = sum(np.asarray(hop.degrees) for hop in graph.hops) if graph.hops else receivers
        return float(np.mean((whole * receivers + averaged * hops)[self.engine.reports]))


def _made_up(message: Tensors) -> frozenset[tuple[str, tuple[torch.dtype, torch.Size]]]:
    """Name, dtype and shape of every tensor of a message."""
    return frozenset((name, (t.dtype, t.shape)) for name, t in message.items())

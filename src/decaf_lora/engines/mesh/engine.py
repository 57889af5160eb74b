"""The mesh as an engine: one agent in this process, its neighbours anywhere, and no server.

Two threads call the protocol (peer.py): that of the run and that of the link. A lock makes them take turns.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.engines.base import Pending, Sizes
from decaf_lora.engines.mesh.edge import Saved, Verdict
from decaf_lora.engines.mesh.frames import PART, Frame
from decaf_lora.engines.mesh.link import Link
from decaf_lora.engines.mesh.outcome import Limits, Outcome, Phase, RejectionError
from decaf_lora.engines.mesh.payload import LARGEST, Template, norm, own_part, pack
from decaf_lora.engines.mesh.peer import Peer
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, Schedule

T = TypeVar("T")

AT_LEAST = 60.0
"""The least seconds of patience, where patience follows from how long the own rounds take."""


class WaitedOutError(UserError):
    """This agent has waited for neighbours as long as it may.

    Attributes:
        exit_code: 3, the exit code of a command that ends with this error.
        alone: whether no neighbour was in reach; else some were, and none answered.
        missing: names of the neighbours that the agent waited for.
    """

    exit_code = 3

    def __init__(self, seconds: float, alone: bool, missing: list[str]) -> None:
        how = "none was in reach" if alone else "none answered"
        super().__init__(f"neighbours: waited {seconds:.0f} s for {', '.join(missing)}; {how}. Start again to go on.")
        self.alone, self.missing = alone, missing


class StoppedError(Exception):
    """The agent was asked to stop while it waited for neighbours."""


class Mesh:
    """The engine of one agent.

        mesh = Mesh(agent, schedule, rounds)
        run = Run(..., engine=lambda num_agents: mesh)                          # perhaps run.restore(...)
        mesh.connect(*run.exchange.templates(run.adapter), links, facts)
        links.start(mesh)
        for record in run.train(): ...                                          # with a checkpoint after each
        mesh.finish()

    Args:
        agent: number of this agent.
        schedule: the graph of every exchange.
        rounds: number of rounds of the run.
        gossip_steps: exchanges in a round.
        names: of all agents, for messages to people; None: "agent 0" and so on.
        limits: how long to wait and how much to accept; None: the defaults.
        own_pace: whether patience follows from the own rounds: 3 times their median duration, and at least `AT_LEAST`.
            None: it does if no `limits` are given.
        clock: seconds, ascending.
    """

    is_main = True

    def __init__(
        self,
        agent: int,
        schedule: Schedule,
        rounds: int,
        *,
        gossip_steps: int = 1,
        names: Sequence[str] | None = None,
        limits: Limits | None = None,
        own_pace: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own_pace = limits is None if own_pace is None else own_pace
        self.num_agents, self.agents, self.reports = schedule.num_agents, [agent], [agent]
        self.agent, self.schedule, self.gossip_steps = agent, schedule, gossip_steps
        self.last = rounds * gossip_steps
        self.names = list(names) if names is not None else [f"agent {i}" for i in range(self.num_agents)]
        self.limits, self.clock = limits, clock
        self.peer: Peer
        self._lock = threading.Condition()
        self._templates: list[Template] = []
        self._norms: list[float] = []
        self._held = b""
        """Bytes of the adapter after the last exchange, with which a late neighbour begins."""
        self._held_template: Template
        self._saved, self._closed = dict[int, Saved](), 0
        self._open: tuple[int, Tensors] | None = None
        """The exchange (from 1) that was started and not yet waited for, and this agent's message in it."""
        self._stopped = False
        self._began, self._durations = clock(), deque[float](maxlen=25)

    # Neighbours

    def connect(
        self,
        templates: Sequence[tuple[Tensors, Sizes]],
        held: Tensors,
        link: Link,
        facts: bytes = b"",
        differs: Callable[[bytes], str | None] = lambda facts: None,
    ) -> None:
        """Makes the protocol ready, from the checkpoint if one was restored. Start the link afterwards.

        Args:
            templates: for each exchange of a round, a message of this agent, and what of it travels; the values do not
                matter.
            held: the agent's tensors as for `hold`.
            link: to the neighbours; tells this engine what happens (`link.Events`).
            facts: what both ends of an edge must agree on besides their messages.
            differs: says in words what is different in a neighbour's facts, which are of the same length; None: nothing
                that it can name.
        """
        self._differs, self._facts = differs, facts
        self._templates = [Template(message, sizes) for message, sizes in templates]
        # A neighbour's first message may arrive before this agent's own exists for comparison. The norm of a template
        # is then too small, since gradients are 0 in it.
        self._norms = [LARGEST * norm(message) for message, _ in templates]
        self._held_template, self._began = Template(held, {}), self.clock()
        self.hold(held)
        largest = max(len(pack(message, {}, self.agent)) for message in (held, *(m for m, _ in templates)))
        limits = replace(self.limits or Limits(), most_parts=1 + math.ceil(largest / PART))
        own = facts + b"".join(template.facts() for template in self._templates)
        rows = [frozenset(self._graph(e).neighbours(self.agent)) for e in range(1, (self.schedule.period or 1) + 1)]
        self.peer = Peer(
            self.agent,
            frozenset().union(*rows),
            lambda e: rows[(e - 1) % len(rows)],
            self.last,
            link=link,
            owner=self,
            clock=self.clock,
            life=secrets.randbits(64),
            hops=self.gossip_steps,
            limits=limits,
            closed=self._closed,
            saved=self._saved,
            restarted=True,  # a first start waits for one neighbour, too: the run may have begun without this agent
            facts=own,
        )

    def template(self, hop: int = 0) -> Template:
        """The template of the messages of one exchange of a round; hop: its place in the round, from 0."""
        return self._templates[hop]

    def _graph(self, exchange: int) -> Graph:
        return self.schedule.at(exchange - 1)

    def on_up(self, peer: int, connection: int) -> None:
        """A connection is up; see `link.Events`."""
        with self._lock:
            self.peer.on_up(peer, connection)
            self._lock.notify_all()

    def on_frame(self, peer: int, connection: int, frame: Frame) -> None:
        """A frame has arrived; see `link.Events`."""
        with self._lock:
            self.peer.on_frame(peer, connection, frame)
            self._lock.notify_all()

    def on_down(self, peer: int, connection: int) -> None:
        """A connection is down; see `link.Events`."""
        with self._lock:
            self.peer.on_down(peer, connection)
            self._lock.notify_all()

    # What the protocol asks

    def agree(self, peer: int, facts: bytes) -> None:
        """Checks that a neighbour belongs to the same run and sends the same kind of messages; see `Owner.agree`."""
        if facts == self.peer.facts:
            return
        given = facts[: len(self._facts)]
        named = self._differs(given) if len(given) == len(self._facts) and given != self._facts else None
        raise RejectionError(named or "its messages have other names, shapes or types, or it runs another federation")

    def check(self, peer: int, exchange: int, payload: bytes) -> Tensors:
        """Reads and checks a neighbour's message; see `Owner.check`."""
        hop = (exchange - 1) % self.gossip_steps
        return self._templates[hop].unpack(payload, peer, self._norms[hop])

    def check_adapter(self, peer: int, payload: bytes) -> Tensors:
        """Reads and checks a neighbour's adapter; see `Owner.check_adapter`."""
        return self._held_template.unpack(payload, peer, norm(self._held_template.message))

    def adapter(self) -> bytes:
        """The adapter with which a late neighbour begins, as bytes; see `Owner.adapter`."""
        return self._held

    # The contract

    def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """Sends this agent's message (name -> (1, ...)) to the neighbours of an exchange; see `Engine.start`."""
        with self._lock:
            if self._open is not None:
                return Pending(self._wait)  # the exchange was started before, and then given up
            number, hop = exchange + 1, exchange % self.gossip_steps
            if self.peer.phase is not Phase.IDLE or (hop and number != self.peer.closed + 1):
                inbox = self._by_itself(message, exchange) if hop else self._without_senders(self.last)
                return Pending(lambda: inbox)
            payload = pack(message, sizes or {}, self.agent)
            self._norms[hop] = max(norm(message), self._norms[hop] / 2)
            self._open = number, message
            self.peer.open(max(number, self.peer.closed + 1), payload)
            self._lock.notify_all()
        return Pending(self._wait)

    def current(self, exchange: int) -> tuple[int, bool]:
        """The exchange to take part in, and whether to catch up first; see `Engine.current`.

        At the start of the process it waits for one neighbour, since the run may have gone on without this agent.
        """
        with self._lock:
            if self._open is not None:
                return self._open[0] - 1, False
            if self.peer.phase is not Phase.IDLE:
                return self.last, False
            plan = self._until(self.peer.plan)
            return max(exchange, plan.exchange - 1), plan.catch_up

    def catch_up(self, tensors: Tensors) -> Inbox:
        """The adapters of the neighbours that are ahead; see `Engine.catch_up`."""
        with self._lock:
            self.peer.catch_up()
            caught = self._until(lambda: self.peer.caught_up)
            self._keep(caught.exchange - 1, self.peer.saved())
        weights = np.zeros((self.num_agents, self.num_agents))
        for j in caught.contents:
            weights[self.agent, j] = 1 / len(caught.contents)
        weights[self.agent, self.agent] = 0 if caught.contents else 1
        return self._inbox(tensors, caught.contents, weights, caught.exchange - 1)

    def hold(self, tensors: Tensors) -> None:
        """Keeps the adapter as it is between two exchanges, for neighbours that catch up."""
        with self._lock:
            self._held = pack(tensors, {}, self.agent)

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """Bytes that this agent sends: its message, once for each neighbour."""
        size = sum(t.numel() * t.element_size() for t in own_part(message, sizes or {}, self.agent).values())
        return float(size * graph.degree(self.agent))

    def gather(self, tensors: Tensors) -> Tensors:
        """`tensors` as they are: this process reports on its own agent alone."""
        return tensors

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """`tensors` as they are: this process reports on its own agent alone."""
        return Pending(lambda: tensors)

    def scatter(self, tensors: Tensors) -> Tensors:
        """`tensors` as they are: this process holds its own agent alone."""
        return tensors

    def anyone_stops(self, asked: bool) -> bool:
        """`asked` as it is: no other process keeps step with this one."""
        return asked

    def snapshot(self) -> dict[str, Any]:
        """The last exchange that is over (`closed`), and what was kept of each edge after it (`edges`)."""
        edges = {
            str(j): {"record": saved.record.hex(), "used": [saved.used[0], saved.used[1].hex()], "misses": saved.misses}
            for j, saved in self._saved.items()
        }
        return {"closed": self._closed, "edges": edges}

    def restore(self, values: dict[str, Any]) -> None:
        """Goes back to a snapshot. Call it before `connect`, which tells neighbours at once what is closed.

        Raises:
            RuntimeError: `connect` was called before.
        """
        if self._templates:
            raise RuntimeError("a mesh is restored before it is connected")
        self._closed = int(values.get("closed", 0))
        self._saved = {
            int(j): Saved(
                bytes.fromhex(e["record"]), (int(e["used"][0]), bytes.fromhex(e["used"][1])), int(e["misses"])
            )
            for j, e in values.get("edges", {}).items()
        }

    def finish(self) -> None:
        """Call it once the result is on disk: tells the neighbours, and serves late ones until none needs this agent.

        Raises:
            StoppedError: `stop` was called.
        """
        with self._lock:
            if self.peer.phase is Phase.CLOSED_ALL:
                self.peer.finish()
            self._until(lambda: self.peer.phase is Phase.LEFT or None)

    def status(self) -> dict[str, Any]:
        """Phase and round of this agent and of its neighbours, in JSON's types. May be called from any thread.

        `rejected` has a line for each message refused since the last exchange.
        """
        with self._lock:
            peer = self.peer
            neighbours = {
                self.names[j]: {"up": edge.heard, "round": self._round(edge.next), "missed": edge.saved.misses}
                for j, edge in peer.edges.items()
            }
            waits_for = [self.names[j] for j in peer.waits_for()]
            return {
                "phase": peer.phase.value,
                "round": self._round(peer.closed + 1),
                "waits_for": waits_for,
                "neighbours": neighbours,
                "rejected": [f"{self.names[j]}: {reason}" for j, reason in peer.rejections],
            }

    def _round(self, exchange: int) -> int:
        return max(exchange - 1, 0) // self.gossip_steps + 1

    def stop(self) -> None:
        """Ends whatever waits for neighbours with a `StoppedError`. May be called from any thread, or a signal."""
        with self._lock:
            self._stopped = True
            self._lock.notify_all()

    # Waiting

    def _until(self, found: Callable[[], T | None]) -> T:
        """Waits until `found` returns something, and returns that. The caller holds the lock; waiting releases it.

        Raises:
            WaitedOutError: the protocol has given up.
            StoppedError: `stop` was called.
        """
        began = self.clock()
        while (it := found()) is None:
            if self._stopped:
                raise StoppedError
            if (failure := self.peer.failure) is not None:
                raise WaitedOutError(self.clock() - began, failure.alone, [self.names[j] for j in failure.missing])
            pause = self.peer.deadline() - self.clock()
            self._lock.wait(max(pause, 0.0) if math.isfinite(pause) else None)
            self.peer.tick()
        return it

    def _wait(self) -> Inbox:
        with self._lock:
            outcome = self._until(self.peer.take)
            assert self._open is not None
            (asked, message), self._open = self._open, None
            rejected = self._new_rejections()
            self._keep(outcome.exchange, outcome.edges)
            self._time_round(asked)
        if not outcome.took_part:
            # An agent that leaves a round after its first exchange ends the round there, with all weight on itself. The
            # round still counts: the neighbours of its earlier exchanges have mixed with it.
            if (asked - 1) % self.gossip_steps:
                return replace(self._by_itself(message, asked - 1), missed=_missed(outcome))
            return replace(self._without_senders(outcome.exchange), missed=_missed(outcome))
        weights = self._graph(outcome.exchange).weights
        return self._inbox(
            message,
            outcome.contents,
            weights,
            outcome.exchange - 1,
            forget=outcome.emptied,
            waited=outcome.waited,
            missed=_missed(outcome),
            rejected=rejected,
        )

    def _new_rejections(self) -> tuple[str, ...]:
        new = list(self.peer.rejections)
        self.peer.rejections.clear()
        return tuple(f"{self.names[peer]}: {reason}" for peer, reason in new)

    def _keep(self, closed: int, edges: dict[int, Saved]) -> None:
        self._closed, self._saved = closed, edges

    def _time_round(self, number: int) -> None:
        """Notes how long a round took and sets patience by it, if patience follows from the own rounds."""
        if self._own_pace and (number - 1) % self.gossip_steps == 0:
            now = self.clock()
            self._durations.append(now - self._began)
            self._began = now
            self.peer.be_patient(max(AT_LEAST, 3 * median(self._durations)))

    def _by_itself(self, message: Tensors, exchange: int) -> Inbox:
        return self._inbox(message, {}, np.eye(self.num_agents), exchange)

    def _without_senders(self, exchange: int) -> Inbox:
        """The inbox for a message that came too late: the agent takes part in a later exchange, or the run is over."""
        return Inbox({}, (), 1, exchange=exchange)

    def _inbox(
        self,
        message: Tensors,
        contents: dict[int, Tensors],
        weights: np.ndarray,
        exchange: int,
        *,
        forget: frozenset[int] = frozenset(),
        waited: Mapping[int, float] | None = None,
        missed: Mapping[int, Mapping[int, str]] | None = None,
        rejected: tuple[str, ...] = (),
    ) -> Inbox:
        """The inbox of this agent: its own message and those that arrived, in ascending order of agents."""
        everybody = {**contents, self.agent: message}
        senders = sorted(everybody)
        tensors = {name: torch.cat([everybody[j][name].to(t.device) for j in senders]) for name, t in message.items()}
        inbox = Inbox.from_weights(tensors, weights, senders, [self.agent], exchange)
        return replace(inbox, forget=forget, waited=waited or {}, missed=missed or {}, rejected=rejected)


def _missed(outcome: Outcome) -> dict[int, dict[int, str]]:
    """Exchange, from 0 -> neighbour that was not used in it -> the verdict."""
    everything = {**outcome.left, **({outcome.exchange: outcome.verdicts} if outcome.took_part else {})}
    found = {
        exchange - 1: {j: verdict.value for j, verdict in verdicts.items() if verdict is not Verdict.USED}
        for exchange, verdicts in everything.items()
    }
    return {exchange: missed for exchange, missed in found.items() if missed}

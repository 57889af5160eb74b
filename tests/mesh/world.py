"""A network in memory and in virtual time: agents that train on vectors, links that break, processes that crash.

One heap of events decides what happens when, so a seed (or a script of faults) gives one history. Nothing here knows
the protocol's rules but for `audit.py`, which looks at what the agents did.
"""

from __future__ import annotations

import copy
import heapq
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from decaf_lora.engines.mesh.edge import Saved
from decaf_lora.engines.mesh.frames import Frame
from decaf_lora.engines.mesh.outcome import Limits, Outcome, Phase
from decaf_lora.engines.mesh.peer import Peer

PING = 15.0
"""Seconds of silence after which a link takes its connection for down."""


@dataclass
class Wire:
    """One connection of an edge, as far as it has got at each end."""

    number: int
    alive: bool = True
    told: dict[int, bool] = field(default_factory=dict)
    """End -> whether it holds the connection: it has been told that it is up, and not yet that it is down."""
    arrives: dict[int, float] = field(default_factory=dict)
    """Receiver -> when the last frame to it arrives; frames keep their order."""
    cut: dict[int, float] = field(default_factory=dict)
    """Receiver -> frames that arrive after this time are lost."""


@dataclass
class Closing:
    """One exchange that one life of an agent closed: what `audit` works on."""

    exchange: int
    agent: int
    life: int
    own: Any
    """Identity of the agent's own message."""
    outcome: Outcome
    row: dict[int, float]
    """Weights that the agent mixed with."""


class Node:
    """A process: trains (sleeps), exchanges vectors, tracks, checkpoints."""

    def __init__(self, world: World, agent: int) -> None:
        self.world, self.agent = world, agent
        self.life, self.peer, self.stalled, self.crashed = -1, None, 0.0, False
        self.checkpoints: list[tuple] = []
        self.messages, self.tick_at, self.wants_plan = 0, float("inf"), False
        self.ended: str | None = None
        self.left: list[tuple[int, int, dict]] = []
        """(exchange, life, verdicts) of exchanges that were opened and left."""

    def start(self, lag: int = 0) -> None:
        """Starts the process, from its newest checkpoint but `lag`."""
        world = self.world
        self.life += 1
        self.crashed, self.tick_at, self.wants_plan = False, float("inf"), False
        saved: dict[int, Saved] = {}
        if self.checkpoints:
            self.checkpoints = self.checkpoints[: len(self.checkpoints) - lag] or self.checkpoints[:1]
            self.closed, self.x, self.c, self.f, saved = copy.deepcopy(self.checkpoints[-1])
        else:
            self.closed, self.x, self.c, self.f = 0, float(self.agent), 0.0, dict.fromkeys(world.edges[self.agent], 0.0)
            self.checkpoints = [copy.deepcopy((0, self.x, self.c, self.f, {}))]
        self.peer = Peer(
            self.agent,
            world.edges[self.agent],
            lambda e: world.row(self.agent, e),
            world.last,
            link=self,
            owner=self,
            clock=lambda: world.now,
            life=self.agent * 1000 + self.life,
            hops=world.hops,
            limits=world.limits,
            closed=self.closed,
            saved=saved,
            restarted=self.life > 0,
        )
        self.train()

    # What the protocol asks for

    def agree(self, peer: int, facts: bytes) -> None:
        pass

    def check(self, peer: int, exchange: int, payload: bytes) -> Any:
        return self.world.check(self, peer, exchange, pickle.loads(payload))

    def check_adapter(self, peer: int, payload: bytes) -> Any:
        return pickle.loads(payload)

    def adapter(self) -> bytes:
        return pickle.dumps(self.x)

    def up(self, peer: int) -> bool:
        wire = self.world.wires.get(frozenset((self.agent, peer)))
        return wire is not None and wire.told.get(self.agent, False)

    def send(self, peer: int, frame: Frame) -> None:
        self.world.send(self.agent, peer, frame)

    def close(self, peer: int, reason: str) -> None:
        self.world.cut(self.agent, peer)

    # The round

    def train(self) -> None:
        if self.peer.phase is Phase.IDLE:
            hop = self.closed % self.world.hops
            self.world.later(0.0 if hop else self.world.steps_take(self.agent), self, self.steps_done)

    def steps_done(self) -> None:
        if self.peer.phase is not Phase.IDLE or self.peer.closed != self.closed:
            return
        self.wants_plan = True

    def pump(self) -> None:
        """After every event: takes what the protocol has for its owner."""
        peer = self.peer
        while True:
            if self.wants_plan and (plan := peer.plan()) is not None:
                self.wants_plan = False
                if plan.catch_up:
                    peer.catch_up()
                else:
                    self.open(plan.exchange)
            elif (outcome := peer.take()) is not None:
                self.combine(outcome)
            elif peer.caught_up is not None:
                self.land()
            else:
                break
        if peer.phase is Phase.LEFT:
            self.end("done")
        elif peer.failure is not None:
            self.end("alone" if peer.failure.alone else "slow")
        elif (due := peer.deadline()) < self.tick_at:
            self.tick_at = due
            self.world.at(due, self, self.tick)

    def tick(self) -> None:
        self.tick_at = float("inf")
        self.peer.tick()

    def open(self, exchange: int) -> None:
        round_ = (exchange - 1) // self.world.hops
        self.g = random.Random(f"{self.agent}/{round_}").uniform(-1, 1)
        self.messages += 1
        self.own = (self.agent, self.life, self.messages)
        self.d = self.g + self.c
        self.hop = (exchange - 1) % self.world.hops
        self.peer.open(exchange, pickle.dumps((self.own, self.hop, self.x, self.d)))

    def combine(self, outcome: Outcome) -> None:
        world, me = self.world, self.agent
        self.left += [(e, self.life, v) for e, v in outcome.left.items()]
        row = {j: world.weight(me, j, outcome.exchange) for j in sorted(outcome.contents)}
        for j in outcome.emptied:
            self.c -= self.f[j]
            self.f[j] = 0.0
        x, c = self.x, self.c
        for j, w in row.items():
            _, hop, xj, dj = outcome.contents[j]
            assert hop == self.hop == (outcome.exchange - 1) % world.hops, "a message made for another hop"
            x += w * (xj - self.x)
            f = w * (dj - self.d)
            c += f
            self.f[j] += f
        self.x, self.c, self.closed = x, c, outcome.exchange
        row[me] = 1.0 - sum(row.values())
        if outcome.verdicts or not world.row(me, outcome.exchange):
            world.closings.append(Closing(outcome.exchange, me, self.life, self.own, outcome, row))
        self.checkpoints.append(copy.deepcopy((self.closed, self.x, self.c, self.f, outcome.edges)))
        self.go_on()

    def land(self) -> None:
        caught, self.peer.caught_up = self.peer.caught_up, None
        if caught.contents:
            self.x = sum(caught.contents.values()) / len(caught.contents)
        self.c, self.f = 0.0, dict.fromkeys(self.f, 0.0)  # fresh, also if nobody is ahead any more
        self.closed = caught.exchange - 1
        self.world.catch_ups += 1
        saved = {j: copy.copy(e.saved) for j, e in self.peer.edges.items()}
        self.checkpoints.append(copy.deepcopy((self.closed, self.x, self.c, self.f, saved)))
        if self.peer.phase is Phase.IDLE and not caught.contents:
            self.wants_plan = True
        else:
            self.go_on()

    def go_on(self) -> None:
        if self.peer.phase is Phase.CLOSED_ALL:
            if self.world.saves_first:
                self.world.later(self.world.rng.uniform(0, 0.2), self, self.peer.finish)
            else:
                self.peer.finish()
        else:
            self.train()

    def end(self, how: str) -> None:
        if self.ended is None:
            self.ended = how
            for j in self.world.edges[self.agent]:
                self.world.cut(self.agent, j, flush=True)


class World:
    """Agents, edges, links and time.

    Args:
        edges: pairs of agents that are neighbours.
        last: the last exchange.
        hops: exchanges a round.
        delay: (low, high) seconds that a frame takes.
        steps: (low, high) seconds that the local steps of a round take.
        schedule: exchange -> the pairs of agents in it; all of `edges` if None.
    """

    def __init__(
        self,
        num_agents: int,
        edges: list[tuple[int, int]],
        last: int,
        *,
        hops: int = 1,
        seed: int = 0,
        delay: tuple[float, float] = (0.01, 0.1),
        steps: tuple[float, float] = (0.5, 1.5),
        limits: Limits | None = None,
        duplicates: float = 0.0,
        schedule: Callable[[int], list[tuple[int, int]]] | None = None,
    ) -> None:
        self.num_agents, self.last, self.hops = num_agents, last, hops
        self.pairs = [frozenset(pair) for pair in edges]
        self.schedule = None if schedule is None else lambda e: [frozenset(p) for p in schedule(e)]
        self.edges = {i: sorted(j for p in self.pairs if i in p for j in p - {i}) for i in range(num_agents)}
        self.limits = limits or Limits(patience=20.0, give_up=5000.0, linger=500.0)
        self.rng = random.Random(seed)
        self.delay, self.steps, self.duplicates = delay, steps, duplicates
        self.now, self.count, self.catch_ups, self.saves_first = 0.0, 0, 0, True
        self.heap: list[tuple[float, int, Node | None, int, Callable[[], None]]] = []
        self.wires: dict[frozenset[int], Wire] = {}
        self.blocked: dict[frozenset[int], float] = {}
        """Edge -> when a connection is possible again."""
        self.closings: list[Closing] = []
        self.faults = {"breaks": 0, "crashes": 0}
        self.tap: Callable[[int, int, Frame], bool] | None = None
        """(sender, receiver, frame) -> whether the network carries it; scripts lose frames with it."""
        self.check: Callable[[Node, int, int, Any], Any] = lambda node, peer, exchange, content: content
        self.slow: dict[int, float] = {}
        """Agent -> seconds that its local steps take."""
        self.nodes = [Node(self, i) for i in range(num_agents)]
        degree = {i: len(self.edges[i]) for i in range(num_agents)}
        self.weights = {p: 1.0 / (1 + max(degree[i] for i in p)) for p in self.pairs}

    def row(self, agent: int, exchange: int) -> frozenset[int]:
        if self.schedule is None:
            return frozenset(self.edges[agent])
        return frozenset(j for p in self.schedule(exchange) if agent in p for j in p - {agent})

    def weight(self, i: int, j: int, exchange: int) -> float:
        return 0.5 if self.schedule is not None else self.weights[frozenset((i, j))]

    def steps_take(self, agent: int) -> float:
        return self.slow.get(agent, self.rng.uniform(*self.steps))

    # Time

    def at(self, time: float, node: Node | None, do: Callable[[], None]) -> None:
        self.count += 1
        life = -1 if node is None else node.life
        heapq.heappush(self.heap, (max(time, self.now), self.count, node, life, do))

    def later(self, seconds: float, node: Node | None, do: Callable[[], None]) -> None:
        self.at(self.now + seconds, node, do)

    def step(self) -> None:
        """Handles the next event."""
        time, _, node, life, do = heapq.heappop(self.heap)
        self.now = max(self.now, time)
        if node is None:
            do()
            return
        if node.life != life or node.crashed or node.ended is not None:
            return
        if node.stalled > self.now:
            self.at(node.stalled, node, do)
            return
        do()
        if not node.crashed:
            node.pump()

    def run(self, until: float = 100_000.0, stop: Callable[[], bool] | None = None) -> World:
        """Until all have ended, or `stop` says so; what still runs at `until` is a deadlock."""
        if self.now == 0 and self.nodes[0].peer is None:
            for node in self.nodes:
                node.start()
            for pair in self.pairs:
                self.later(0.0, None, lambda p=pair: self.dial(p))
        while self.heap and not (stop is not None and stop()):
            if all(n.ended is not None for n in self.nodes):
                return self
            self.step()
            assert self.now < until, self.state()
        assert stop is not None or all(n.ended is not None for n in self.nodes), self.state()
        return self

    def state(self) -> str:
        """What every agent is at: for a failure's message."""
        lines = [f"t={self.now:.1f}"]
        for n in self.nodes:
            p = n.peer
            edges = {j: (e.heard, e.next, e.usable, e.declined, e.message is not None) for j, e in p.edges.items()}
            lines.append(f"{n.agent}: {n.ended} crashed={n.crashed} {p.phase} closed={p.closed} {edges}")
        return "\n".join(lines)

    # The network

    def dial(self, pair: frozenset[int]) -> None:
        """Connects the edge if both ends run and the network lets them; tries again later if not."""
        wire = self.wires.get(pair)
        if wire is not None and wire.alive:
            return
        dialler = min(pair)
        ends = [self.nodes[i] for i in pair]
        if any(n.ended is not None for n in ends):
            return
        held = wire is not None and wire.told.get(dialler, False)
        if held or self.blocked.get(pair, 0.0) > self.now or any(n.crashed or n.stalled > self.now for n in ends):
            self.later(0.3, None, lambda: self.dial(pair))
            return
        new = Wire(0 if wire is None else wire.number + 1)
        self.wires[pair] = new
        for node in ends:
            self.later(self.rng.uniform(*self.delay), node, lambda n=node: self.come_up(new, n, pair))

    def come_up(self, wire: Wire, node: Node, pair: frozenset[int]) -> None:
        if wire.alive and self.wires[pair] is wire:
            wire.told[node.agent] = True
            (other,) = pair - {node.agent}
            node.peer.on_up(other, wire.number)

    def send(self, sender: int, receiver: int, frame: Frame) -> None:
        wire = self.wires.get(frozenset((sender, receiver)))
        if wire is None or not wire.alive or not wire.told.get(sender, False):
            return
        if self.tap is not None and not self.tap(sender, receiver, frame):
            return
        again = 1 + (self.rng.random() < self.duplicates)
        for _ in range(again):
            when = max(wire.arrives.get(receiver, 0.0), self.now + self.rng.uniform(*self.delay))
            wire.arrives[receiver] = when
            node = self.nodes[receiver]
            self.at(when, node, lambda w=when, n=node: self.deliver(wire, sender, n, frame, w))

    def deliver(self, wire: Wire, sender: int, node: Node, frame: Frame, when: float) -> None:
        if when > wire.cut.get(node.agent, float("inf")):
            return
        if not wire.told.get(node.agent, False):
            if wire.alive:  # it comes before the end was told of the connection
                self.later(0.01, node, lambda: self.deliver(wire, sender, node, frame, when))
            return
        node.peer.on_frame(sender, wire.number, frame)

    def break_(self, pair: tuple[int, int] | frozenset[int], down: float = 0.0, lost: bool = True) -> None:
        """Breaks the connection of an edge: of what is in flight a suffix is lost, in each direction on its own."""
        pair = frozenset(pair)
        self.blocked[pair] = max(self.blocked.get(pair, 0.0), self.now + down)
        wire = self.wires.get(pair)
        if wire is None or not wire.alive:
            return
        wire.alive = False
        self.faults["breaks"] += 1
        for agent in pair:
            wire.cut[agent] = self.now if lost else self.now + self.rng.uniform(0, self.delay[1])
            node = self.nodes[agent]
            self.later(self.rng.uniform(0, 1.0), node, lambda n=node: self.notice(wire, n, pair))
        self.later(0.0, None, lambda: self.dial(pair))

    def notice(self, wire: Wire, node: Node, pair: frozenset[int]) -> None:
        if wire.told.get(node.agent, False):
            wire.told[node.agent] = False
            (other,) = pair - {node.agent}
            node.peer.on_down(other, wire.number)

    def cut(self, agent: int, peer: int, flush: bool = False) -> None:
        """An end closes its connection; with `flush` what it has sent still arrives."""
        pair = frozenset((agent, peer))
        wire = self.wires.get(pair)
        if wire is None:
            return
        wire.told[agent] = False
        if wire.alive:
            self.faults["breaks"] += not flush
            wire.alive = False
            wire.cut[agent] = self.now
            wire.cut[peer] = wire.arrives.get(peer, 0.0) if flush else self.now
            self.at(
                max(wire.cut[peer], self.now) + 0.05,
                self.nodes[peer],
                lambda: self.notice(wire, self.nodes[peer], pair),
            )
            self.later(0.1, None, lambda: self.dial(pair))

    def crash(self, agent: int, back: float, lag: int = 0) -> None:
        """SIGKILL, and a restart after `back` seconds from the newest checkpoint but `lag`."""
        node = self.nodes[agent]
        if node.crashed or node.ended is not None:
            return
        self.faults["crashes"] += 1
        if node.peer.phase in (Phase.CLOSED_ALL, Phase.SERVING):
            lag = 0 if node.peer.phase is Phase.SERVING else lag
        node.crashed = True
        for peer in self.edges[agent]:
            pair = frozenset((agent, peer))
            self.break_(pair)
            if pair in self.wires:
                self.wires[pair].told[agent] = False

        def restart() -> None:
            node.start(lag)

        self.later(back, None, restart)

    def stall(self, agent: int, seconds: float) -> None:
        """SIGSTOP: the process does nothing for a while; links take it for down when it has been silent too long."""
        node = self.nodes[agent]
        if node.crashed or node.ended is not None:
            return
        node.stalled = max(node.stalled, self.now + seconds)
        if seconds > PING:
            for peer in self.edges[agent]:
                self.later(PING, None, lambda p=peer: self.break_((agent, p)))

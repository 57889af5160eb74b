"""Peers on a bench: a script delivers frames one by one, moves the clock, breaks links and restarts processes."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from decaf_lora.engines.mesh.edge import Saved
from decaf_lora.engines.mesh.frames import Frame
from decaf_lora.engines.mesh.outcome import Limits, Outcome, RejectionError
from decaf_lora.engines.mesh.peer import Peer

LIMITS = Limits(patience=10.0, give_up=1000.0, linger=100.0)


class Process:
    """Link and owner of one peer: frames wait in the bench's queues, payloads are kept as they are."""

    def __init__(self, bench: Bench, agent: int) -> None:
        self.bench, self.agent = bench, agent
        self.cut: list[tuple[int, str]] = []
        """Connections that the peer has closed, and why."""
        self.bad: set[bytes] = set()
        """Payloads that the check refuses."""
        self.facts = b""

    def up(self, peer: int) -> bool:
        return frozenset((self.agent, peer)) in self.bench.connected

    def send(self, peer: int, frame: Frame) -> None:
        edge = frozenset((self.agent, peer))
        if edge in self.bench.connected:
            self.bench.queues[self.agent, peer].append((self.bench.numbers[edge], frame))

    def close(self, peer: int, reason: str) -> None:
        self.cut.append((peer, reason))

    def agree(self, peer: int, facts: bytes) -> None:
        if facts != self.facts:
            raise RejectionError("facts differ")

    def check(self, peer: int, exchange: int, payload: bytes) -> bytes:
        if payload in self.bad:
            raise RejectionError("not finite")
        return payload

    def check_adapter(self, peer: int, payload: bytes) -> bytes:
        return self.check(peer, 0, payload)

    def adapter(self) -> bytes:
        return b"adapter of %d" % self.agent


class Bench:
    """Peers, the queues between them and a clock.

    edges: pairs of agents. row: (agent, exchange) -> its neighbours, if not all of them.
    """

    def __init__(
        self,
        edges: list[tuple[int, int]],
        last: int = 8,
        hops: int = 1,
        limits: Limits = LIMITS,
        row: Callable[[int, int], frozenset[int]] | None = None,
    ) -> None:
        self.now, self.last, self.hops, self.limits, self.given_row = 0.0, last, hops, limits, row
        self.edges = [frozenset(edge) for edge in edges]
        self.numbers: dict[frozenset[int], int] = {}
        self.connected: set[frozenset[int]] = set()
        self.queues: dict[tuple[int, int], deque[tuple[int, Frame]]] = defaultdict(deque)
        self.processes: dict[int, Process] = {}
        self.peers: dict[int, Peer] = {}
        self.lives: dict[int, int] = defaultdict(int)
        for agent in sorted(set().union(*self.edges)):
            self.start(agent)
        for edge in self.edges:
            self.connect(*edge)
        self.settle()

    def start(self, agent: int, closed: int = 0, saved: dict[int, Saved] | None = None, again: bool = False) -> Peer:
        """Starts a process; with `again` after a crash, through `closed` of its checkpoint."""
        neighbours = frozenset(j for edge in self.edges if agent in edge for j in edge - {agent})
        self.processes[agent] = process = Process(self, agent)
        self.lives[agent] += 1
        self.peers[agent] = Peer(
            agent,
            neighbours,
            lambda e: neighbours if self.given_row is None else self.given_row(agent, e),
            self.last,
            link=process,
            owner=process,
            clock=lambda: self.now,
            life=100 * agent + self.lives[agent],
            hops=self.hops,
            limits=self.limits,
            closed=closed,
            saved=saved,
            restarted=again,
        )
        return self.peers[agent]

    def connect(self, *pair: int) -> None:
        """A new connection: both ends are told; what is in flight on an old one stays in flight."""
        edge = frozenset(pair)
        self.numbers[edge] = self.numbers.get(edge, -1) + 1
        self.connected.add(edge)
        for agent in pair:
            (other,) = edge - {agent}
            self.peers[agent].on_up(other, self.numbers[edge])

    def break_(self, *pair: int) -> None:
        """The connection goes down, is noticed at once, and what is in flight is lost."""
        edge = frozenset(pair)
        self.connected.discard(edge)
        for agent in pair:
            (other,) = edge - {agent}
            self.queues[agent, other].clear()
            self.peers[agent].on_down(other, self.numbers[edge])

    def crash(self, agent: int) -> None:
        """The process is gone; its neighbours notice at once."""
        for edge in list(self.connected):
            if agent in edge:
                self.break_(*edge)

    def deliver(self, sender: int, receiver: int, *kinds: type) -> list[Frame]:
        """Delivers what is in flight on one way; of the given kinds alone, if any are given: the rest is lost."""
        delivered = []
        while self.queues[sender, receiver]:
            number, frame = self.queues[sender, receiver].popleft()
            if not kinds or isinstance(frame, kinds):
                self.peers[receiver].on_frame(sender, number, frame)
                delivered.append(frame)
        return delivered

    def settle(self) -> None:
        """Delivers everything, and what follows from it."""
        while any(self.queues.values()):
            for way in list(self.queues):
                self.deliver(*way)

    def wait(self, seconds: float) -> None:
        """Time passes; everybody is woken when it is due."""
        until = self.now + seconds
        while True:
            due = min(peer.deadline() for peer in self.peers.values())
            self.now = min(due, until)
            for peer in self.peers.values():
                peer.tick()
            if due >= until:
                return

    def open(self, agent: int, payload: bytes | None = None) -> int:
        """Opens what the plan of an agent says, which must not be to catch up."""
        plan = self.peers[agent].plan()
        assert plan is not None
        assert not plan.catch_up
        made = b"%d in %d, life %d" % (agent, plan.exchange, self.lives[agent])
        self.peers[agent].open(plan.exchange, made if payload is None else payload)
        return plan.exchange

    def take(self, agent: int) -> Outcome:
        """The exchange that an agent has closed."""
        outcome = self.peers[agent].take()
        assert outcome is not None, f"{agent} has closed nothing; it is at {self.peers[agent].exchange}"
        return outcome

    def round(self, *agents: int) -> dict[int, Outcome]:
        """All of `agents` open an exchange, and all is delivered."""
        for agent in agents:
            self.open(agent)
        self.settle()
        return {agent: self.take(agent) for agent in agents}

"""The protocol of an exchange at one agent: what is sent, who is waited for, and whose message is used?

An exchange has two phases. Every agent sends its message to its neighbours; then it answers `have` to each sound one
that arrives. A neighbour is used only if its message and its `have` are both here, so without faults both ends use an
edge or neither does. A neighbour that takes too long is left out, and its weight goes to this agent itself.

`Peer` is a state machine without input, output or threads. A link calls `on_up`, `on_frame` and `on_down`; the owner
calls `plan`, `open`, `catch_up`, `finish`, and `tick` no later than `deadline`. The rules are verified in `model/`.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from decaf_lora.engines.mesh.account import EMPTY, digest, extended
from decaf_lora.engines.mesh.course import Course, Plan
from decaf_lora.engines.mesh.edge import Edge, Kept, Saved, Verdict
from decaf_lora.engines.mesh.frames import At, Closed, Data, Frame, Get, Have, Hello, Last, adapter_frames, fault, split
from decaf_lora.engines.mesh.link import Link
from decaf_lora.engines.mesh.outcome import CaughtUp, Failure, Limits, Outcome, Owner, Phase, RejectionError


class Peer:
    """One agent's side of the exchanges 1 to `last`, over all of its edges.

    Args:
        agent: number of this agent.
        neighbours: numbers of all agents with which it ever exchanges.
        row: exchange -> the neighbours in it.
        last: the last exchange of the run.
        hops: exchanges in a round. An agent that is late comes back with the first of a round.
        life: 64 random bits, new at each start of the process.
        closed: the last exchange in the checkpoint; 0 without one.
        saved: neighbour -> what the checkpoint holds of its edge.
        restarted: whether others may be ahead, so that `plan` first waits to hear of one neighbour.
        facts: bytes in the hello that both ends of an edge must agree on.
    """

    def __init__(
        self,
        agent: int,
        neighbours: Iterable[int],
        row: Callable[[int], frozenset[int]],
        last: int,
        *,
        link: Link,
        owner: Owner,
        clock: Callable[[], float],
        life: int,
        hops: int = 1,
        limits: Limits | None = None,
        closed: int = 0,
        saved: Mapping[int, Saved] | None = None,
        restarted: bool = False,
        facts: bytes = b"",
    ) -> None:
        self.agent, self.life = agent, life
        self.limits = limits or Limits()
        self.course = Course(row, last, hops, self.limits.catch_up)
        self.closed = closed
        """Every exchange up to this one is over for this agent."""
        self.edges = {
            j: Edge(j, self.limits.patience, replace((saved or {}).get(j, Saved())), changed=clock())
            for j in sorted(neighbours)
        }
        self.phase = Phase.SERVING if closed >= last else Phase.IDLE
        self.failure: Failure | None = None
        self.caught_up: CaughtUp | None = None
        self.rejections: deque[tuple[int, str]] = deque(maxlen=100)
        """(neighbour, why) for what was refused; the owner empties it."""
        self._link, self._owner, self._clock, self.facts = link, owner, clock, facts
        self._restarted = restarted and closed < last
        self._told = self.next
        self._payload, self._content, self._opened, self._looked = b"", b"", 0.0, clock()
        self._due, self._woke = math.inf, -math.inf
        self._outcome: Outcome | None = None
        self._left: dict[int, dict[int, Verdict]] = {}
        self._asked: dict[int, float] = {}
        self._adapters: dict[int, Any] = {}

    @property
    def next(self) -> int:
        """The lowest exchange that this agent may still close, as it tells its neighbours.

        The last exchange counts as closed only once its result is on disk, since neighbours then stop waiting for it.
        """
        return self.course.last if self.phase is Phase.CLOSED_ALL else self.closed + 1

    @property
    def exchange(self) -> int | None:
        """The open exchange; None if none is."""
        return self.closed + 1 if self.phase is Phase.OPEN else None

    # What the owner asks

    def plan(self) -> Plan | None:
        """What to do once the local steps are done; None while that depends on a neighbour that is not up yet."""
        if self._restarted and not self._heard():
            return None
        restarted, self._restarted = self._restarted, False
        return self.course.plan(self.edges.values(), self.closed + 1, restarted)

    def open(self, exchange: int, payload: bytes) -> None:
        """Opens the next exchange, or the one that `plan` named, with this agent's message; all below it are closed."""
        assert self.phase is Phase.IDLE
        assert self._outcome is None
        assert exchange == self.closed + 1 or (
            self.closed < exchange <= self.course.last and self.course.hop(exchange) == 0
        )
        self._payload, self._content, self._left = payload, hashlib.sha256(payload).digest(), {}
        self._open(exchange)
        self._advance()

    def catch_up(self) -> None:
        """Asks the neighbours that are ahead for their adapters; `caught_up` holds them once they are here."""
        assert self.phase is Phase.IDLE
        self.phase, self.caught_up = Phase.CATCHING_UP, None
        self._asked, self._adapters = {}, {}
        for edge in self._heard():
            self._ask(edge)
        self._advance()

    def finish(self) -> None:
        """The result of the last exchange is on disk: neighbours may be told that this agent is done."""
        assert self.phase is Phase.CLOSED_ALL
        self.phase = Phase.SERVING
        self._announce()
        self._advance()

    def take(self) -> Outcome | None:
        """The exchange that is over, returned once; None if none is."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def saved(self) -> dict[int, Saved]:
        """Neighbour -> what of its edge goes into a checkpoint made now."""
        return {j: replace(edge.saved) for j, edge in self.edges.items()}

    def be_patient(self, seconds: float) -> None:
        """Sets patience, D, in seconds; it may follow from how long the own rounds take."""
        for edge in self.edges.values():
            if edge.patience == self.limits.patience:
                edge.patience = seconds
            edge.patience = min(edge.patience, seconds)
        self.limits = replace(self.limits, patience=seconds)

    def waits_for(self) -> list[int]:
        """Neighbours without whom the open exchange does not end yet; where any one would do, all of them."""
        return [edge.peer for edge in self._waited_for() or self._row()] if self.phase is Phase.OPEN else []

    def tick(self) -> None:
        """Does what has become due; call it no later than `deadline`."""
        self._advance()

    def deadline(self) -> float:
        """When `tick` is due, if nothing happens before."""
        times = [self._ends_alone()]
        if self.phase is Phase.OPEN:
            times += [self._expires(e) for e in self._waited_for()]
            times += [self._hangs(e) for e in self._row() if e.owes(self.closed + 1)]
            times.append(self._after(self.limits.give_up, self._opened))
        if self.phase is Phase.CATCHING_UP:
            times += self._asked.values()
        if self.phase is Phase.SERVING:
            times += [self._after(self.limits.linger, e.changed) for e in self.edges.values() if not e.heard]
        # Whatever was due at the last look has been done; what has become due since has not.
        return min((t for t in times if t > self._looked), default=math.inf)

    # What the link tells

    def on_up(self, peer: int, connection: int) -> None:
        """A new connection, which supersedes older ones at once."""
        edge = self.edges[peer]
        if connection <= edge.latest:
            return
        self._lost(edge)
        edge.latest = connection
        if edge.mute and self._clock() < self._expires(edge):
            self._link.close(peer, "it has not answered")
            return
        edge.connection, edge.mute = connection, False
        self._send(edge, Hello(self.next, self.life, self.facts))
        self._advance()

    def on_down(self, peer: int, connection: int) -> None:
        """A connection is gone."""
        edge = self.edges[peer]
        if connection == edge.connection:
            self._lost(edge)
            self._advance()

    def on_frame(self, peer: int, connection: int, frame: Frame) -> None:
        """A frame has arrived; it is dropped unread unless its connection is the newest."""
        edge = self.edges[peer]
        if connection != edge.connection:
            return
        wrong = fault(frame, self.course.last, self.limits.most_parts)
        if wrong is None and not edge.heard and not isinstance(frame, Hello):
            wrong = "the first frame is no hello"
        if wrong is not None:
            self._cut(edge, wrong)
        elif isinstance(frame, Hello):
            if not edge.heard:
                self._hello(edge, frame)
        else:
            edge.next = max(edge.next, frame.next)
            self._read(edge, frame)
        self._advance()

    def _read(self, edge: Edge, frame: Frame) -> None:
        try:
            if isinstance(frame, Data):
                self._data(edge, frame)
            elif isinstance(frame, Last):
                self._last(edge, frame)
        except ValueError as error:
            self._cut(edge, str(error))
        if isinstance(frame, Have | Closed) and frame.exchange == self.exchange and frame.digest == edge.sent:
            if isinstance(frame, Have):
                edge.had = True
            else:
                edge.declined = True
        if isinstance(frame, Get) and edge.served != (edge.connection, self.next):
            edge.served = (edge.connection, self.next)
            for piece in adapter_frames(self.next, self._owner.adapter()):
                self._send(edge, piece)

    def _hello(self, edge: Edge, frame: Hello) -> None:
        try:
            self._owner.agree(edge.peer, frame.facts)
        except RejectionError as error:
            self.rejections.append((edge.peer, str(error)))
            self._cut(edge, str(error))
            return
        if frame.life != edge.life:
            edge.forget_life()
            edge.life = frame.life
        now = self._clock()
        edge.next, edge.heard, edge.changed, edge.patience = frame.next, True, now, self.limits.patience
        if self.exchange is not None and edge.peer in self.course.row(self.exchange):
            if not edge.greeted:
                edge.since, edge.greeted = now, True
            self._send_message(edge)
        if self.phase is Phase.CATCHING_UP:
            self._ask(edge)

    def _data(self, edge: Edge, frame: Data) -> None:
        """A part of a message: kept until all parts are here; the message is then checked and answered."""
        whole = frame.part == frame.parts - 1
        if frame.exchange <= self.closed:
            if whole:
                known = edge.saved.used == (frame.exchange, frame.digest)
                self._answer(edge, frame, Have if known else Closed)
            return
        if edge.holds(frame.digest):
            if whole:
                self._answer(edge, frame, Have)
            return
        if edge.newest is not None and self.exchange != frame.exchange < edge.newest.exchange:
            return  # its sender has closed that exchange meanwhile
        received = edge.receive(frame)
        if edge.fresh and frame.exchange == self.exchange:
            edge.since = self._clock()
        if received is None:
            return
        payload, content = received
        assert edge.life is not None
        try:
            if digest(frame.exchange, edge.life, frame.record, content) != frame.digest:
                raise RejectionError("a message does not have the hash that names it")
            kept = Kept(
                frame.exchange, frame.digest, frame.record, self._owner.check(edge.peer, frame.exchange, payload)
            )
        except RejectionError as error:
            self._answer(edge, frame, Closed)
            self._reject(edge, str(error))
            return
        edge.rejected = 0
        if frame.exchange == self.exchange:
            edge.message = kept
        else:
            edge.newest = kept
        self._answer(edge, frame, Have)

    def _last(self, edge: Edge, frame: Last) -> None:
        """A part of an adapter that was asked for."""
        if edge.peer not in self._asked:
            return
        received = edge.receive_adapter(frame)
        if edge.fresh:
            self._asked[edge.peer] = self._clock() + self.limits.patience
        if received is None:
            return
        payload, content = received
        del self._asked[edge.peer]
        try:
            if content != frame.digest:
                raise RejectionError("an adapter does not have the hash that names it")
            self._adapters[edge.peer] = self._owner.check_adapter(edge.peer, payload)
        except RejectionError as error:
            self._reject(edge, str(error))

    # What is sent

    def _send(self, edge: Edge, frame: Frame) -> None:
        self._link.send(edge.peer, frame)

    def _answer(self, edge: Edge, frame: Data, kind: type[Have] | type[Closed]) -> None:
        self._send(edge, kind(self.next, frame.exchange, frame.digest))

    def _ask(self, edge: Edge) -> None:
        if edge.peer not in self._adapters and self.course.leads(edge, self.closed + 1):
            edge.adapter = None
            self._asked[edge.peer] = self._clock() + self.limits.patience
            self._send(edge, Get(self.next))

    def _send_message(self, edge: Edge) -> None:
        assert self.exchange is not None
        parts = list(split(self._payload))
        for part, piece in enumerate(parts):
            self._send(edge, Data(self.next, self.exchange, part, len(parts), edge.sent, edge.sent_record, piece))

    def _announce(self) -> None:
        """Tells a new `next` on every connection, also before the other end's hello."""
        if self.next != self._told:
            self._told = self.next
            for edge in self.edges.values():
                if edge.connection is not None:
                    self._send(edge, At(self.next))

    def _lost(self, edge: Edge) -> None:
        if edge.heard:
            edge.heard, edge.changed = False, self._clock()
        edge.connection = None

    def _cut(self, edge: Edge, reason: str) -> None:
        self._lost(edge)
        self._link.close(edge.peer, reason)

    def _reject(self, edge: Edge, reason: str) -> None:
        edge.rejected += 1
        self.rejections.append((edge.peer, reason))
        if edge.rejected >= self.limits.rejections:
            self._cut(edge, reason)

    def _heard(self) -> list[Edge]:
        return [edge for edge in self.edges.values() if edge.heard]

    # Opening and closing

    def _open(self, exchange: int) -> None:
        self.closed, self.phase, self._opened = exchange - 1, Phase.OPEN, self._clock()
        for edge in self.edges.values():
            edge.opened(exchange, self._opened)
        self._announce()
        for peer in sorted(self.course.row(exchange)):
            edge = self.edges[peer]
            edge.sent_record = edge.saved.record
            edge.sent = digest(exchange, self.life, edge.sent_record, self._content)
            if edge.heard:
                self._send_message(edge)

    def _row(self) -> list[Edge]:
        """Edges of the open exchange."""
        assert self.exchange is not None
        return [self.edges[peer] for peer in sorted(self.course.row(self.exchange))]

    def _expires(self, edge: Edge) -> float:
        assert self.exchange is not None
        return edge.expires(self.exchange, self.limits.down)

    def _hangs(self, edge: Edge) -> float:
        """When a neighbour that owes an answer counts as hanging."""
        return max(edge.since, edge.changed) + self.limits.answer * self.limits.patience

    def _waited_for(self) -> list[Edge]:
        """Edges that, at the last look, were not settled and whose neighbours had patience left."""
        assert self.exchange is not None
        return [
            edge
            for edge in self._row()
            if not edge.usable and not edge.refuses(self.exchange) and self._looked < self._expires(edge)
        ]

    def _after(self, seconds: float, since: float) -> float:
        """When something has lasted so long; after a standstill, neighbours first have time to be heard again."""
        return max(since + seconds, self._woke + min(self.limits.patience, seconds))

    def _ends_alone(self) -> float:
        """When this agent, which cannot go on without a neighbour and has none in reach, gives up."""
        waits = self.phase in (Phase.OPEN, Phase.CATCHING_UP) or (self.phase is Phase.IDLE and self._restarted)
        if not waits or not self.edges or self._heard():
            return math.inf
        return self._after(self.limits.linger, max(edge.changed for edge in self.edges.values()))

    def _advance(self) -> None:
        """Does what the present state allows."""
        now = self._looked = self._clock()
        if now > self._due + self.limits.down:
            self._woke = now
        while self.phase is Phase.OPEN and self._close_or_relabel():
            pass
        if self.phase is Phase.CATCHING_UP:
            self._land()
        if self.phase is Phase.SERVING and all(
            e.next > self.course.last or (not e.heard and now >= self._after(self.limits.linger, e.changed))
            for e in self.edges.values()
        ):
            self.phase = Phase.LEFT
        if now >= self._ends_alone() and not (self.phase is Phase.OPEN and self._waited_for()):
            self._give_up(alone=True, missing=list(self.edges))
        self._due = self.deadline()

    def _give_up(self, alone: bool, missing: list[int]) -> None:
        self.phase, self.failure = Phase.GAVE_UP, Failure(alone, missing)

    def _close_or_relabel(self) -> bool:
        """Ends the open exchange, or moves its message to a later one; false if neither is possible yet."""
        exchange, now = self.exchange, self._looked
        assert exchange is not None
        row = self._row()
        for edge in row:
            if edge.settled is None and (edge.usable or edge.refuses(exchange)):
                edge.settled = now
            if edge.owes(exchange) and now >= self._hangs(edge):
                self._cut(edge, "it does not answer")  # and stays so until its patience has ended
                edge.mute = True
        if self._waited_for():
            return False
        verdicts = {edge.peer: edge.verdict(exchange) for edge in row}
        # On a schedule, an agent without today's partners goes on to where others wait for it. On a fixed graph there
        # are no others. No agent trains rounds alone: it would pull the others along by its higher number.
        others = [e for e in self._heard() if e.peer not in verdicts and e.next >= exchange]
        if not row or Verdict.USED in verdicts.values():
            self._close(row, verdicts)
        elif ahead := self.course.ahead(self.edges.values(), exchange):
            self._leave(ahead, verdicts)
        elif others:
            self._close(row, verdicts)
        elif now >= self._after(self.limits.give_up, self._opened):
            self._give_up(alone=False, missing=list(verdicts))
        else:
            return False
        return True

    def _close(self, row: list[Edge], verdicts: dict[int, Verdict]) -> None:
        exchange, now = self.closed + 1, self._clock()
        contents, emptied = dict[int, Any](), set[int]()
        for edge in row:
            saved = edge.saved
            if verdicts[edge.peer] is Verdict.USED:
                kept = edge.message
                assert kept is not None
                contents[edge.peer] = kept.content
                # Both ends compare the two records that were sent, so both empty the account or neither does.
                if kept.record != edge.sent_record:
                    emptied.add(edge.peer)
                    saved.record = EMPTY
                low, high = (edge.sent, kept.digest) if self.agent < edge.peer else (kept.digest, edge.sent)
                saved.record = extended(saved.record, exchange, low, high)
                saved.used, saved.misses = (exchange, kept.digest), 0
                edge.patience = min(2 * edge.patience, self.limits.patience)
            else:
                saved.misses += 1
                edge.patience /= 2
                if saved.misses == self.limits.misses:
                    emptied.add(edge.peer)
                    saved.record = EMPTY
        waited = {edge.peer: (now if edge.settled is None else edge.settled) - self._opened for edge in row}
        self._pass(exchange)
        gone = frozenset(emptied)
        self._outcome = Outcome(exchange, True, verdicts, contents, gone, waited, self._left, self.saved())

    def _leave(self, ahead: int, verdicts: dict[int, Verdict]) -> None:
        """Gives up the open exchange for the one that the neighbours are at."""
        exchange, target = self.closed + 1, self.course.first(ahead)
        first = self.course.hop(exchange) == 0
        late = first and ahead - exchange >= self.limits.catch_up
        self._left[exchange] = verdicts
        if first and not late and target <= self.course.last:
            self._open(target)
        else:  # the message is too old, or was made for a later hop, or the run is over
            self._restarted = late  # so that the next plan is to catch up
            self._pass(self.course.first(exchange + 1) - 1 if late else min(target - 1, self.course.last))
            self._outcome = Outcome(self.closed, False, {}, {}, frozenset(), {}, self._left, self.saved())

    def _pass(self, exchange: int) -> None:
        """Everything up to `exchange` is over for this agent."""
        self.closed, self._payload = exchange, b""
        self.phase = Phase.CLOSED_ALL if exchange >= self.course.last else Phase.IDLE
        for edge in self.edges.values():
            edge.message = None
            edge.passed(exchange)
        self._announce()

    def _land(self) -> None:
        """Ends catching up once every neighbour that was asked has answered, or has taken too long."""
        now, number = self._clock(), self.closed + 1
        self._asked = {j: until for j, until in self._asked.items() if now < until}
        if self._asked:
            return
        if not self._adapters:
            for edge in self._heard():
                self._ask(edge)
            if self._asked or not self._heard():
                return
        target = self.course.first(max(self.course.ahead(self.edges.values(), number), number))
        adapters = self._adapters if target > number else {}
        for edge in self.edges.values():  # the algorithm's state starts afresh, so all accounts are empty
            edge.saved.record, edge.saved.misses = EMPTY, 0
        if target > number:
            self._pass(target - 1)
        else:
            self.phase = Phase.IDLE
        self.caught_up = CaughtUp(target, adapters)

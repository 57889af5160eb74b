"""Links between agents that are threads of one process: frames in queues, connections that tests break."""

from __future__ import annotations

import queue
import threading

from decaf_lora.engines.mesh.frames import Frame
from decaf_lora.engines.mesh.link import Events


class Switchboard:
    """Where the links of all agents meet. An edge is connected once both of its ends have started."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ends: dict[int, QueueLink] = {}
        self.numbers: dict[frozenset[int], int] = {}
        self.up: set[frozenset[int]] = set()
        self.blocked: set[frozenset[int]] = set()
        self.frames: list[tuple[int, int, Frame]] = []
        """All that was ever sent: sender, receiver, frame."""

    def connect(self, *pair: int) -> None:
        edge = frozenset(pair)
        with self.lock:
            if edge in self.up or edge in self.blocked or not all(i in self.ends for i in pair):
                return
            self.numbers[edge] = self.numbers.get(edge, -1) + 1
            self.up.add(edge)
            for end, other in (pair, pair[::-1]):
                self.ends[end].tell("on_up", other, self.numbers[edge])

    def disconnect(self, *pair: int, for_good: bool = False) -> None:
        edge = frozenset(pair)
        with self.lock:
            if for_good:
                self.blocked.add(edge)
            if edge in self.up:
                self.up.discard(edge)
                for end, other in (pair, pair[::-1]):
                    if end in self.ends:
                        self.ends[end].tell("on_down", other, self.numbers[edge])

    def mend(self, *pair: int) -> None:
        self.blocked.discard(frozenset(pair))
        self.connect(*pair)


class QueueLink:
    """One agent's link; its events are told by a thread of its own, one after another."""

    def __init__(self, board: Switchboard, agent: int, neighbours: list[int]) -> None:
        self.board, self.agent, self.neighbours = board, agent, neighbours
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.failure: BaseException | None = None

    def start(self, owner: Events) -> QueueLink:
        self.owner = owner
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        with self.board.lock:
            self.board.ends[self.agent] = self
        for other in self.neighbours:
            self.board.connect(self.agent, other)
        return self

    def stop(self) -> None:
        with self.board.lock:
            del self.board.ends[self.agent]
        for other in self.neighbours:
            self.board.disconnect(self.agent, other)
        self.events.put(None)
        self.thread.join(10)

    def settled(self) -> None:
        """Returns once all that has been told so far is dealt with."""
        done = threading.Event()
        self.events.put(("", done))
        assert done.wait(10)

    def tell(self, what: str, *arguments: object) -> None:
        self.events.put((what, arguments))

    def _run(self) -> None:
        while (event := self.events.get()) is not None:
            what, arguments = event
            if not what:
                arguments.set()
                continue
            try:
                getattr(self.owner, what)(*arguments)
            except BaseException as error:
                self.failure = error
                raise

    def up(self, peer: int) -> bool:
        return frozenset((self.agent, peer)) in self.board.up

    def send(self, peer: int, frame: Frame) -> None:
        edge = frozenset((self.agent, peer))
        with self.board.lock:
            self.board.frames.append((self.agent, peer, frame))
            if edge in self.board.up and peer in self.board.ends:
                self.board.ends[peer].tell("on_frame", self.agent, self.board.numbers[edge], frame)

    def close(self, peer: int, reason: str) -> None:
        self.board.disconnect(self.agent, peer, for_good=True)

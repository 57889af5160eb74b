"""The protocol over real sockets and TLS: agents that average vectors, compared with powers of the mixing matrix."""

import contextlib
import math
import threading
import time

import numpy as np
import pytest

from decaf_lora import graphs
from decaf_lora.engines.links import Links, Neighbour, Timing
from decaf_lora.engines.mesh.edge import Verdict
from decaf_lora.engines.mesh.link import dialler
from decaf_lora.engines.mesh.outcome import Limits, Phase
from decaf_lora.engines.mesh.peer import Peer
from endpoints import PATIENCE, Proxy, own

NAMES = ("alice", "bob", "carol", "dave")
TIMING = Timing(lost=20.0, first_retry=0.02, last_retry=0.1)


class Agent:
    """One agent that mixes a vector for `last` exchanges in a thread, over `Links`.

    The link's thread and the agent's own take turns at the protocol by a lock.
    """

    def __init__(self, number, graph, links, last, value, limits):
        self.number, self.graph, self.links, self.last = number, graph, links, last
        self.value = value
        self.misses = 0
        self.lock = threading.Condition()
        self.peer = Peer(
            number,
            graph.neighbours(number),
            lambda exchange: frozenset(graph.neighbours(number)),
            last,
            link=links,
            owner=self,
            clock=time.monotonic,
            life=number + 1,
            limits=limits,
            facts=b"the same",
        )
        self.thread = threading.Thread(target=self.train)

    def agree(self, peer, facts):
        assert facts == b"the same"

    def check(self, peer, exchange, payload):
        return np.frombuffer(payload)

    def check_adapter(self, peer, payload):
        return np.frombuffer(payload)

    def adapter(self):
        return self.value.tobytes()

    def on_up(self, *event):
        self.told("on_up", event)

    def on_down(self, *event):
        self.told("on_down", event)

    def on_frame(self, *event):
        self.told("on_frame", event)

    def told(self, what, event):
        with self.lock:
            getattr(self.peer, what)(*event)
            self.lock.notify_all()

    def until(self, condition):
        """Waits for what the neighbours do; the lock is held."""
        while not condition():
            assert self.peer.phase is not Phase.GAVE_UP
            pause = min(self.peer.deadline() - time.monotonic(), PATIENCE)
            self.lock.wait(max(pause, 0.001) if math.isfinite(pause) else PATIENCE)
            self.peer.tick()

    def train(self):
        with self.lock:
            while self.peer.phase is Phase.IDLE:
                self.peer.open(self.peer.closed + 1, self.value.tobytes())
                outcomes = []
                self.until(lambda into=outcomes: into.append(self.peer.take()) or into[-1] is not None)
                self.mix(outcomes[-1])
            self.peer.finish()
            self.until(lambda: self.peer.phase is Phase.LEFT)

    def mix(self, outcome):
        weights = self.graph.weights[self.number]
        mean = weights[self.number] * self.value
        for peer, verdict in outcome.verdicts.items():
            used = verdict is Verdict.USED
            self.misses += not used
            mean = mean + weights[peer] * (outcome.contents[peer] if used else self.value)
        self.value = mean


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return [own(folder, name) for name in NAMES]


@contextlib.contextmanager
def agents(identities, graph, last, values, limits, between=None):
    """The agents of `graph`, each with its links; `between` (port -> port) stands before alice's listener."""
    everybody = frozenset(NAMES)
    made, ports = [], {}
    for number in range(graph.num_agents):  # whoever sorts first dials, so the last listens first
        number = graph.num_agents - 1 - number
        neighbours = []
        for other in graph.neighbours(number):
            dials = dialler(NAMES[number], NAMES[other], everybody) == NAMES[other]
            address = None if dials else f"127.0.0.1:{ports[other]}"
            neighbours.append(Neighbour(NAMES[other], identities[other].certificate, address, other, dials))
        links = Links(identities[number], neighbours, listen="127.0.0.1:0", timing=TIMING)
        agent = Agent(number, graph, links, last, values[number], limits)
        links.start(agent)
        ports[number] = between(links.port) if between else links.port
        made.append(agent)
    made.reverse()
    try:
        for agent in made:
            agent.thread.start()
        yield made
        for agent in made:
            agent.thread.join(PATIENCE)
            assert not agent.thread.is_alive()
            assert agent.links.failure is None
    finally:
        for agent in made:
            agent.links.stop()


@pytest.mark.parametrize("kind", ["ring", "complete", "line"])
def test_exchanges_are_powers_of_the_matrix(identities, kind):
    graph = graphs.as_schedule(graphs.parse(kind, 4, 0)).at(0)
    values = np.random.default_rng(0).normal(size=(4, 200_000))
    with agents(identities, graph, 5, values, Limits(linger=PATIENCE, patience=PATIENCE)) as made:
        pass
    truth = np.linalg.matrix_power(graph.weights, 5) @ values
    for agent in made:
        assert agent.misses == 0
        np.testing.assert_allclose(agent.value, truth[agent.number], atol=1e-12)


def test_links_that_break_in_the_middle_of_a_run(identities):
    """All end, and no exchange is lost: a message is sent again on the new connection."""
    graph = graphs.ring(3)
    values = np.random.default_rng(0).normal(size=(3, 300_000))
    proxies = []

    def between(port):
        proxies.append(Proxy(port))
        return proxies[-1].port

    limits = Limits(linger=PATIENCE, patience=PATIENCE, down=PATIENCE)
    with agents(identities, graph, 60, values, limits, between) as made:
        for cut in range(6):
            while made[0].peer.closed < 8 * (cut + 1):
                time.sleep(0.001)
            proxies[cut % 3].cut()
            proxies[cut % 3].mend()
    for proxy in proxies:
        proxy.stop()
    assert sum(agent.links.status(peer).connections for agent in made for peer in graph.neighbours(agent.number)) > 6
    assert sum(agent.misses for agent in made) == 0  # patience is above what a break takes
    truth = np.linalg.matrix_power(graph.weights, 60) @ values
    np.testing.assert_allclose([agent.value for agent in made], truth, atol=1e-12)

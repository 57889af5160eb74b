"""A mesh without a network: every agent is a run of its own in a thread, which knows its own examples alone."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from decaf_lora import partition
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.engines import InStep, Pending
from toy import Toy

PATIENCE = 120.0
"""Seconds after which a message that does not come is an error: a test must not hang."""


class Room:
    """Where agents leave messages for each other."""

    def __init__(self):
        self._changed, self._messages, self._broken = threading.Condition(), {}, False

    def leave(self, agent, exchange, message):
        with self._changed:
            assert (agent, exchange) not in self._messages, f"agent {agent} sends exchange {exchange} twice"
            self._messages[agent, exchange] = {name: t.clone() for name, t in message.items()}
            self._changed.notify_all()

    def fetch(self, agent, exchange):
        with self._changed:
            here = self._changed.wait_for(lambda: self._broken or (agent, exchange) in self._messages, PATIENCE)
            assert here, f"exchange {exchange} of agent {agent} does not come"
            assert not self._broken, "another agent has failed"
            return self._messages[agent, exchange]

    def fail(self):
        with self._changed:
            self._broken = True
            self._changed.notify_all()


class Peer(InStep):
    """The engine of one agent, which talks to its neighbours and reports on itself."""

    is_main = True

    def __init__(self, num_agents, agent, room):
        self.num_agents, self.agent, self.room = num_agents, agent, room
        self.agents = self.reports = [agent]

    def start(self, message, graph, exchange, sizes=None):
        self.room.leave(self.agent, exchange, message)

        def wait():
            senders = sorted({self.agent, *graph.neighbours(self.agent)})
            messages = [self.room.fetch(j, exchange) for j in senders]
            tensors = {name: torch.cat([m[name] for m in messages]) for name in messages[0]}
            return Inbox.from_weights(tensors, graph.weights, senders, [self.agent], exchange)

        return Pending(wait)

    def wire_bytes(self, message, graph, sizes=None):
        return None

    def gather(self, tensors):
        return tensors

    def collect(self, tensors):
        return Pending(lambda: tensors)

    def scatter(self, tensors):
        return tensors

    def anyone_stops(self, asked):
        return asked


class OwnToy(Toy):
    """The toy task on a machine that has the training examples `shard` (m,) of it and no others."""

    def __init__(self, shard, **options):
        super().__init__(**options)
        self.x, self.y = self.x[np.array(shard)], self.y[np.array(shard)]
        self.labels = self.y.numpy()


def train_alone(shards, make_run):
    """Runs every agent to the end, all at once; their runs and records, in the order of the agents.

    `make_run(task, own, engine)` builds the run of one.
    """
    agents, room = len(shards), Room()

    def build(agent):
        task = OwnToy(shards[agent], extras=True)
        own = partition.Own(agent, agents, range(len(shards[agent])), task.labels)
        return make_run(task, own, lambda count: Peer(count, agent, room))

    def train(run):
        try:
            return run, list(run.train())
        except BaseException:
            room.fail()
            raise

    runs = [build(agent) for agent in range(agents)]  # one by one: PEFT patches torch while it looks at a model
    with ThreadPoolExecutor(agents) as pool:
        return list(pool.map(train, runs))

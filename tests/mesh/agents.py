"""Agents of a mesh in threads of one process, on a small task of their own."""

from __future__ import annotations

import copy
import dataclasses
import threading

import torch

from decaf_lora import algorithms, graphs, partition
from decaf_lora.config import TrainingConfig
from decaf_lora.engines.mesh.engine import Mesh
from decaf_lora.engines.mesh.outcome import Limits
from decaf_lora.graphs import as_schedule
from decaf_lora.run import Run
from helpers.toy import Toy
from mesh.switchboard import QueueLink, Switchboard

LIMITS = Limits(patience=60.0, give_up=120.0, linger=60.0)
N = 4


def make_run(case, engine, part=None, rounds=3, graph=None):
    name, options, kind, gossip_steps, *ranks = case
    task = Toy(examples=60, tests=12, extras=True)
    training = TrainingConfig(steps=2, batch_size=4, learning_rate=0.02, agents_per_pass=1)
    shards = partition.dirichlet(task.labels, N, alpha=0.5, seed=1)
    values = {"rounds": rounds, "evaluate_every": 2, "gossip_steps": gossip_steps, "engine": engine}
    if ranks:
        values["lora"] = [dataclasses.replace(task.default_lora(), r=r, lora_alpha=r + 1) for r in ranks[0]]
    algorithm, schedule = algorithms.make(name, **options), graph or graphs.parse(kind, N, 0)
    return Run(task, algorithm, schedule, shards if part is None else part(shards), training, **values)


class Agent:
    """One agent of a mesh in a thread, which knows its own examples alone; `link` None: one of `board`."""

    def __init__(self, number, case, board=None, limits=LIMITS, rounds=3, link=None):
        steps = case[3]
        schedule = as_schedule(graphs.parse(case[2], N, 0))
        steps = schedule.period if steps == "period" else steps

        def part(shards):
            return partition.Own(number, N, shards.shard(number), shards.labels)

        self.mesh = Mesh(number, schedule, rounds, gossip_steps=steps, limits=limits)
        self.run = make_run(case, lambda n: self.mesh, part, rounds)
        self.neighbours = sorted({j for e in range(schedule.period) for j in schedule.at(e).neighbours(number)})
        self.link = QueueLink(board, number, self.neighbours) if link is None else link
        self.records, self.error, self.stops_after = [], None, None
        self.run.on_step = self._on_step
        self.thread = threading.Thread(target=self._work, daemon=True)

    def connect(self):
        self.mesh.connect(*self.run.exchange.templates(self.run.adapter), self.link)
        self.link.start(self.mesh)

    def start(self):
        self.connect()
        self.thread.start()

    def _work(self):
        try:
            while self.run.round < self.run.rounds:
                for record in self.run.train():
                    self.records.append(record)
                    self.checkpoint = copy.deepcopy(self.run.snapshot())  # as on disk: training goes on in place
            self.tensors = self.run.snapshot()[0]
            self.mesh.finish()
        except BaseException as error:
            self.error = error

    def _on_step(self, number, step, *_):
        if (number, step) == self.stops_after:
            self.run.stop()

    def join(self):
        self.thread.join(100)
        assert self.link.failure is None
        if self.error is not None:
            raise self.error
        assert not self.thread.is_alive()
        self.link.stop()


def equals_simulation(agents, simulated, records=None):
    """Each agent's tensors and records are, bit for bit, its rows of a simulation that is over."""
    expected = simulated.snapshot()[0]
    for number, agent in enumerate(agents):
        kept = {name: t for name, t in agent.tensors.items() if not name.startswith("state/tracking/f/")}
        assert kept.keys() == expected.keys()
        for name, tensor in kept.items():
            row = expected[name][number : number + 1]
            assert tensor.dtype == row.dtype
            assert torch.equal(tensor, row), name
        for own, every in zip(agent.records, records or [], strict=records is not None):
            assert own.round == every.round
            assert own.scores is None or own.scores == [every.scores[number]]
            assert own.losses is None or own.losses == [every.losses[number]]


def begin(agents, others=()):
    """Starts agents, once they and the `others`, which run already, have heard of each other.

    Where patience is short, a neighbour that is late would be missed.
    """
    for agent in agents:
        agent.connect()
    for _ in ("the connections", "the hellos"):
        for agent in (*agents, *others):
            agent.link.settled()
    for agent in agents:
        agent.thread.start()


def together(case, rounds=3, limits=LIMITS):
    board = Switchboard()
    agents = [Agent(i, case, board, limits, rounds) for i in range(N)]
    begin(agents)
    for agent in agents:
        agent.join()
    return agents

"""The round, written once: local steps, message, exchange, combine, evaluate, record.

`Run` joins a task, an algorithm, a graph and a partition and is iterated round by round. Engines supply only
where agents live and how messages travel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from decaf_lora import consensus
from decaf_lora.adapters import attach, load_peft
from decaf_lora.adapters.adapter import Adapter, Tensors, as_adapter
from decaf_lora.adapters.portable import config_values, write_adapter
from decaf_lora.algorithms.contract import Algorithm, State
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.batches import local_steps
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Engine, Pending, Simulate, Sizes
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, Schedule, as_schedule, complete
from decaf_lora.optimizers import learning_rate
from decaf_lora.partition import Partition
from decaf_lora.records import Record
from decaf_lora.tasks.base import Task
from decaf_lora.training import Trainer


class _Exchange(NamedTuple):
    """The first exchange of a round, on its way."""

    hops: tuple[Graph, ...]
    """The graphs of all exchanges of the round."""
    message: Tensors
    sizes: Sizes
    inbox: Pending[Inbox]


class Run:
    """Agents that train together.

    `graph` is a graph or a schedule of graphs over as many agents as `partition` has shards; algorithms
    without one (local, centralized, fedavg) ignore it. A round takes `gossip_steps` exchanges, each on the next
    graph of the schedule, or a whole "period" of it. `lora` is a `peft.LoraConfig`, the task's default if
    None, or one for each agent, which may differ in rank and alpha. With `common_start` all agents draw the same
    A_0. `init_adapters` are PEFT directories that agents start from instead, one for each agent (None: fresh), of
    any rank; centralized training starts from the average of all, at the largest rank. Every `evaluate_every`
    rounds, and in the last, all agents' models and the averaged model are scored on the test set; every
    `measure_every` rounds, and in the last, consensus distance, interference and truncation tail are measured.
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        graph: Graph | Schedule,
        partition: Partition,
        training: TrainingConfig | None = None,
        *,
        lora: LoraConfig | Sequence[LoraConfig] | None = None,
        rounds: int = 30,
        seed: int = 0,
        common_start: bool = True,
        init_adapters: Sequence[str | Path | None] | None = None,
        gossip_steps: int | Literal["period"] = 1,
        evaluate_every: int = 5,
        measure_every: int = 1,
        eval_batch_size: int = 256,
        engine: Callable[[int], Engine] = Simulate,
    ) -> None:
        training = training or TrainingConfig()
        shards = list(partition.shards)
        schedule = as_schedule(graph)
        for field, given in (("lora.ranks", lora), ("init_adapters", init_adapters)):
            if given is not None and not isinstance(given, LoraConfig) and len(given) != len(shards):
                raise UserError(f"{field}: {len(given)} given for {len(shards)} agents; give one for each.")
        if algorithm.topology == "graph" and schedule.num_agents != len(shards):
            raise UserError(
                f"graph: it joins {schedule.num_agents} agents but the partition has {len(shards)} shards; "
                "make both the same number of agents."
            )
        if algorithm.topology == "pooled":
            training = training.model_copy(update={"batch_size": training.batch_size * len(shards)})
            shards = [np.sort(np.concatenate(shards))]
        if algorithm.topology in ("graph", "server") and len(shards) < 2:
            raise UserError(
                f"agents: {algorithm.name} needs at least 2 agents, got 1; use local or centralized for one."
            )
        if algorithm.topology == "server":
            schedule = as_schedule(Graph.server([len(s) for s in shards]))
        elif algorithm.topology != "graph":
            schedule = as_schedule(complete(len(shards)))
        self.gossip_steps = _exchanges(schedule, gossip_steps) if algorithm.topology == "graph" else 1
        if algorithm.paced is not None:
            algorithm = algorithm.paced(_rounds_to_reach_all(schedule, self.gossip_steps))
        self.task, self.algorithm, self.schedule, self.partition = task, algorithm, schedule, partition
        self.training, self.rounds, self.seed = training, rounds, seed
        self.evaluate_every, self.measure_every = evaluate_every, measure_every
        self.engine = engine(len(shards))
        self.attached = attach(task.model, lora or task.default_lora())
        ranks = [sum(s.rank for s in self.attached.sites_of(i).values()) for i in range(len(partition.shards))]
        self._largest = int(np.argmax(ranks))
        task.on_attach([*self.attached.sites, *self.attached.modules])
        self.trainer = Trainer(
            task,
            self.attached,
            training,
            self.engine.agents,
            [shards[i] for i in self.engine.agents],
            seed,
            eval_batch_size,
            steps_in_round=int(local_steps(training, shards).max()),
        )
        try:
            self.adapter: Adapter = self._first_adapter(common_start, init_adapters)
            self.state: State = algorithm.init(self.adapter)
            self.trainer.prepare(self.adapter)
        except BaseException:
            self.close()  # so that the task can serve another run
            raise
        self.round = 0
        """Rounds done."""
        self.step_in_round = 0
        """Local steps done of the next round; above 0 only after a stop within a round."""
        self.stop_requested = False
        self.on_step: Callable[[int, int, int, Tensor], None] | None = None
        """Called after every local step with (round, step, steps of the round, sums of losses (n,))."""
        self._losses: Tensor | None = None
        self._seconds: dict[str, float] = {}
        self._measures: Tensors = {}
        self._bytes_sent = 0.0
        self._wire_bytes: float | None = None
        self._ahead: _Exchange | None = None
        """The next round's exchange, where it could start before the round."""
        self._collection: Pending[Tensors] | None = None
        """All adapters on their way to the main process."""

    def _first_adapter(self, common_start: bool, directories: Sequence[str | Path | None] | None) -> Adapter:
        pooled = self.algorithm.topology == "pooled"
        agents = self.engine.agents
        if pooled:  # one agent stands for all
            agents = [self._largest] if directories is None else list(range(len(directories)))
        adapter = self.attached.init(agents, self.seed, common_start)
        if directories is not None:
            chosen = [None if (path := directories[i]) is None else Path(path) for i in agents]
            adapter = load_peft(self.attached, adapter, chosen, agents)
        return consensus.averaged(adapter) if pooled and len(agents) > 1 else adapter

    def close(self) -> None:
        """Takes the adapters out of the task's model, which can then serve another run."""
        self.attached.detach()

    def stop(self) -> None:
        """Asks the run to end after the current local step; `train` then returns."""
        self.stop_requested = True

    def train(self) -> Iterator[Record]:
        """The rounds that are left, one record each; the first record (round 0) is of the start.

        Under an engine of several processes only the main one's records are whole.
        """
        # Each process may have calibrated another number of agents a pass: all take the main one's.
        passes = self.engine.gather({"passes": torch.full((len(self.engine.agents),), self.trainer.agents_per_pass)})
        self.trainer.agents_per_pass = int(passes["passes"][0])
        if self.step_in_round == 0:
            self._seconds = {}
            self._send_ahead()
            if self.round == 0:
                yield self._start()
        while self.round < self.rounds and not self.engine.any(self.stop_requested):
            record = self._one_round()
            if record is not None:
                yield record
        self._land()

    def _start(self) -> Record:
        self._collect()
        surveyed = self._survey(evaluated=True, measured=True)
        return Record(
            round=0,
            **surveyed,
            bytes_sent=0.0,
            learning_rate=learning_rate(self.training, 0.0),
            seconds=dict(self._seconds),
        )

    def _one_round(self) -> Record | None:
        """The next round; None if it was stopped within its local steps."""
        number, algorithm = self.round + 1, self.algorithm
        evaluated = number % self.evaluate_every == 0 or number == self.rounds
        measured = number % self.measure_every == 0 or number == self.rounds
        inbox = None
        if self.step_in_round == 0:
            self._seconds, self._losses, self._measures = {}, None, {}
            self._bytes_sent, self._wire_bytes = 0.0, None
        if algorithm.order == "combine-adapt" and self.step_in_round == 0:
            inbox = self._mix(number)
            if measured:
                self._measure(inbox)
        if not self._local_steps(number):
            return None
        if algorithm.order == "adapt-combine":
            inbox = self._mix(number)
        self.round, self.step_in_round = number, 0
        # From here on the agents stay as they are: what the next round sends, and what the main process needs of
        # the others, is under way while everybody measures and evaluates.
        self._send_ahead()
        if evaluated or measured:
            self._collect()
        if measured and algorithm.order == "adapt-combine":
            self._measure(inbox)
        assert self._losses is not None
        mean_losses = self._losses.cpu() / torch.from_numpy(self.trainer.local_steps)
        gathered = self.engine.gather({"losses": mean_losses, **self._measures})
        surveyed = self._survey(evaluated, measured)
        return Record(
            round=number,
            losses=gathered["losses"].tolist(),
            **surveyed,
            interference=_rms(gathered.get("interference")),
            tail=_rms(gathered.get("tail")),
            recompression=_rms(gathered.get("recompression")),
            bytes_sent=self._bytes_sent,
            wire_bytes=self._wire_bytes,
            learning_rate=learning_rate(self.training, (number - 1) / self.rounds),
            seconds=dict(self._seconds),
        )

    @property
    def _talks(self) -> bool:
        return self.algorithm.topology in ("graph", "server")

    def _local_steps(self, number: int) -> bool:
        """The round's local steps that are left; false if a stop was asked for before the last."""
        total = self.trainer.steps_in_round

        def on_step(done: int, losses: Tensor) -> bool:
            self.step_in_round = done
            if self.on_step is not None:
                self.on_step(number, done, total, losses)
            return done < total and self.engine.any(self.stop_requested)

        started = time.perf_counter()
        self.adapter, self.state, self._losses = self.trainer.train_round(
            self.adapter,
            self.algorithm,
            self.state,
            number,
            self.rounds,
            self.step_in_round,
            self._losses,
            on_step,
        )
        self._add_seconds("train", started)
        return self.step_in_round >= total

    def _send_ahead(self) -> None:
        """Starts the next round's exchange if it begins the round, so that its messages are known already."""
        if self.algorithm.order == "combine-adapt" and self._talks and self.round < self.rounds and not self._ahead:
            self._ahead = self._send(self.round + 1)

    def _send(self, number: int) -> _Exchange:
        """Message, and start of the (first) exchange of round `number`."""
        started = time.perf_counter()
        graph = self.schedule.window((number - 1) * self.gossip_steps, self.gossip_steps)
        hops = graph.hops if graph.hops and self.algorithm.relay is not None else (graph,)
        message = self.algorithm.message(self.adapter, self.state, number)
        sizes = self._own_sizes(message)
        exchange = _Exchange(hops, message, sizes, self.engine.start(message, hops[0], number, sizes))
        self._add_seconds("exchange", started)
        return exchange

    def _mix(self, number: int) -> Inbox | None:
        """Exchange (several where an algorithm relays) and combine; returns what arrived in the last."""
        if not self._talks:
            return None
        (hops, message, sizes, pending), self._ahead = self._ahead or self._send(number), None
        started = time.perf_counter()
        inbox = pending.wait()
        self._count(message, hops[0], sizes)
        for hop in hops[1:]:
            assert self.algorithm.relay is not None
            message, cut = self.algorithm.relay(self.adapter, inbox, number)
            self._measures["recompression"] = self._measures.get("recompression", torch.zeros(())).hypot(cut)
            inbox = self.engine.start(message, hop, number).wait()
            self._count(message, hop, {})  # what is forwarded is a mixture, and has no agent's own size
        started = self._add_seconds("exchange", started)
        self.adapter, self.state = self.algorithm.combine(self.adapter, self.state, inbox, number)
        self.trainer.moments_after(self.algorithm, self.state)
        self._add_seconds("combine", started)
        return inbox

    def _measure(self, inbox: Inbox | None) -> None:
        """Interference and tail of the messages that arrived."""
        started = time.perf_counter()
        if inbox is None:
            measured = None
        else:
            measured = consensus.interference_and_tail(self.adapter, self.algorithm.decode(inbox))
        if measured is not None:
            self._measures["interference"], self._measures["tail"] = measured
        self._add_seconds("measure", started)

    def _count(self, message: Tensors, graph: Graph, sizes: Sizes) -> None:
        """Counts the bytes of an exchange."""
        self._bytes_sent += self._bytes_of(message, graph, sizes)
        wire = self.engine.wire_bytes(message, graph, sizes)
        if wire is not None:
            self._wire_bytes = (self._wire_bytes or 0.0) + wire

    def _bytes_of(self, message: Tensors, graph: Graph, sizes: Sizes) -> float:
        """Bytes an agent sends in an exchange, mean over agents; to a server a message goes once.

        Of a composed exchange: what is averaged goes to all receivers in each hop; what is stacked is forwarded
        whole, and since all know the schedule everybody's reaches each agent once.
        """
        whole = averaged = np.zeros(self.engine.num_agents)
        for name, tensor in message.items():
            axis, own = sizes.get(name, (0, [1]))
            size = tensor[0].numel() * tensor.element_size() * np.asarray(own) / (tensor.shape[axis] if axis else 1)
            if name.split("/", 1)[0] in self.algorithm.stacks:
                whole = whole + size
            else:
                averaged = averaged + size
        if graph.is_server:
            return float(np.mean(whole + averaged))
        receivers = np.asarray(graph.degrees)
        hops = sum(np.asarray(hop.degrees) for hop in graph.hops) if graph.hops else receivers
        return float(np.mean(whole * receivers + averaged * hops))

    def _own_sizes(self, message: Tensors) -> Sizes:
        """Where agents differ in rank: of their factors they send as many rows or columns as their own."""
        if self.attached.uniform:
            return {}
        sizes: dict[str, tuple[int, list[int]]] = {}
        for name in message:
            *_, factor, layer = "", *name.split("/")
            if factor in ("A", "B"):
                ranks = [self.attached.sites_of(i)[layer].rank for i in range(self.engine.num_agents)]
                sizes[name] = (1 if factor == "A" else 2, ranks)
        return sizes

    def _collect(self) -> None:
        """Starts to bring all adapters to the main process."""
        self._collected()
        more = {f"scale/{k}": s for k, s in self.adapter.scale.items()}
        more |= {f"ranks/{k}": t for k, t in self.adapter.ranks.items()}
        self._collection = self.engine.collect({**self.adapter.tensors(), **more})

    def _collected(self) -> Tensors:
        """Ends the collection that is under way, if one is: all adapters in the main process."""
        collection, self._collection = self._collection, None
        return {} if collection is None else collection.wait()

    def _survey(self, evaluated: bool, measured: bool) -> dict[str, Any]:
        """Fields of the record: scores of all agents and of the averaged model, consensus distance, where due.

        Only the main process waits for the collected adapters; the others go on while theirs leave.
        """
        scores = averaged = distance = None
        started = time.perf_counter()
        if evaluated:
            scores = self.engine.gather({"scores": self.trainer.evaluate(self.adapter)})["scores"].tolist()
            started = self._add_seconds("evaluate", started)
        if self.engine.is_main and (evaluated or measured):
            adapters = as_adapter(self._collected())
            if measured:
                distance = consensus.distance(adapters) if adapters.num_agents > 1 else 0.0
            started = self._add_seconds("measure", started)
            if scores is not None:
                averaged = scores[0]
                if adapters.num_agents > 1:
                    averaged = float(self.trainer.evaluate(consensus.averaged(adapters))[0])
                self._add_seconds("evaluate", started)
        return {"scores": scores, "averaged_score": averaged, "consensus_distance": distance}

    def _land(self) -> None:
        """Waits for what is under way. An exchange that was started ahead is given up, to be repeated."""
        self._collected()
        if self._ahead is not None:
            self._ahead.inbox.wait()
            self._ahead = None

    def _add_seconds(self, phase: str, started: float) -> float:
        if self.trainer.device.type == "cuda":
            # Not the whole device: what is under way need not be done.
            torch.cuda.current_stream(self.trainer.device).synchronize()
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - started
        return now

    # What a run leaves behind

    def all_adapters(self) -> Adapter | None:
        """The adapters of all N agents of the run, in the main process; None in others."""
        self._collect()
        gathered = self._collected()
        return as_adapter(gathered) if gathered else None

    def save_adapter(self, directory: str | Path, agent: int | str = consensus.AVERAGED) -> None:
        """Writes one agent's adapter, or the averaged model, as a PEFT directory, with its tokenizer and a card."""
        consensus.check_agent(agent, self.engine.num_agents)
        adapters = self.all_adapters()
        if adapters is not None:
            made = {"algorithm": self.algorithm.name, "agents": len(self.partition.shards), "rounds": self.round}
            write_adapter(Path(directory), consensus.chosen(adapters, agent), agent, self.outline(), made)

    def outline(self) -> dict[str, Any]:
        """What an export needs beside the tensors, in JSON's types.

        task: `Task.describe`. configs: the adapter_config.json of every agent, or one for all. averaged: which of
        them is the averaged model's.
        """
        trained, task = list(self.attached.extras), dict(self.task.describe())
        pooled = self.algorithm.topology == "pooled"
        agents = [self._largest] if pooled or self.attached.uniform else range(self.engine.num_agents)
        configs = [config_values(self.attached.config_of(i), trained, task) for i in agents]
        return {"task": task, "configs": configs, "averaged": self._largest if len(configs) > 1 else 0}

    def snapshot(self) -> tuple[Tensors, dict[str, Any]]:
        """All that is needed to go on: named tensors with all N agents on the leading axis, and plain values.

        The tensors are for the main process, which writes them; others get none.
        """
        tensors = {f"adapter/{k}": t for k, t in self.adapter.tensors().items()}
        tensors |= {f"scale/{k}": t for k, t in self.adapter.scale.items()}
        tensors |= {f"ranks/{k}": t for k, t in self.adapter.ranks.items()}
        tensors |= {f"state/{k}": t for k, t in self.state.items()}
        for group, moments in self.trainer.moments.items():
            tensors[f"moments/{group}/first"] = moments.first
            tensors[f"moments/{group}/second"] = moments.second
            tensors[f"moments/{group}/steps"] = moments.steps
        tensors["steps_taken"] = torch.from_numpy(self.trainer.steps_taken.copy())
        if self.step_in_round and self._losses is not None:
            tensors["losses"] = self._losses
            tensors |= {f"measures/{k}": t for k, t in self._measures.items()}
        values = {
            "round": self.round,
            "step_in_round": self.step_in_round,
            "seconds": self._seconds if self.step_in_round else {},
            "bytes_sent": self._bytes_sent if self.step_in_round else 0.0,
            "wire_bytes": self._wire_bytes if self.step_in_round else None,
            "agents_per_pass": self.trainer.agents_per_pass,
            "outline": self.outline(),
        }
        return self.engine.collect({k: t.cpu() for k, t in tensors.items()}).wait(), values

    def restore(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Goes back to a snapshot of a run with the same configuration; the rest is then bit-equal.

        Every process passes the values, the main one the tensors; they need not have been as many at the snapshot.
        """
        self._land()
        device = self.trainer.device
        mine = {k: t.to(device, copy=True) for k, t in self.engine.scatter(tensors).items()}

        def part(prefix: str) -> Tensors:
            return {k.removeprefix(prefix): t for k, t in mine.items() if k.startswith(prefix)}

        self.adapter = self.adapter.with_tensors(part("adapter/"))
        self.state = part("state/")
        for group, moments in self.trainer.moments.items():
            moments.first = mine[f"moments/{group}/first"]
            moments.second = mine[f"moments/{group}/second"]
            moments.steps = mine[f"moments/{group}/steps"]
        self.trainer.steps_taken = mine["steps_taken"].cpu().numpy().copy()
        self._losses = mine.get("losses")
        self._measures = {k: t.cpu() for k, t in part("measures/").items()}
        self.round, self.step_in_round = int(values["round"]), int(values["step_in_round"])
        self._seconds = dict(values["seconds"])
        self._bytes_sent, self._wire_bytes = float(values.get("bytes_sent", 0.0)), values.get("wire_bytes")
        self.trainer.agents_per_pass = int(values["agents_per_pass"])


def _exchanges(schedule: Schedule, gossip_steps: int | Literal["period"]) -> int:
    if gossip_steps != "period":
        return gossip_steps
    if schedule.period is None:
        raise UserError(f"gossip_steps: {schedule.name} never starts again, so it has no period; give a number.")
    return schedule.period


def _rounds_to_reach_all(schedule: Schedule, gossip_steps: int) -> int:
    """Rounds until everybody has heard of everybody; of a periodic schedule, until it starts again with a round."""
    if schedule.period is not None:
        return math.lcm(schedule.period, gossip_steps) // gossip_steps
    return math.ceil(schedule.pace / gossip_steps)


def _rms(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().square().mean().sqrt())

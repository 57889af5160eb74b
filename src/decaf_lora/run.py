"""The round, written once: local steps, message, exchange, combine, evaluate, record.

`Run` joins a task, an algorithm, a graph and a partition and is iterated round by round. Engines supply only
where agents live and how messages travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from decaf_lora import consensus
from decaf_lora.adapters import attach, save_peft
from decaf_lora.algorithms.base import Adapter, Algorithm, State, Tensors
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Engine, Simulate
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph, Schedule, as_schedule, complete
from decaf_lora.optimizers import learning_rate
from decaf_lora.partition import Partition
from decaf_lora.records import Record
from decaf_lora.tasks.base import Task
from decaf_lora.training import Trainer

AVERAGED = "averaged"


class Run:
    """Agents that train together.

    `graph` is a graph or a schedule of graphs over as many agents as `partition` has shards; algorithms
    without one (local, centralized, fedavg) ignore it. `lora` is a `peft.LoraConfig`, the task's default if
    None. With `common_start` all agents draw the same A_0. Every `evaluate_every` rounds, and in the last,
    all agents' models and the averaged model are scored on the test set.
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        graph: Graph | Schedule,
        partition: Partition,
        training: TrainingConfig | None = None,
        *,
        lora: LoraConfig | None = None,
        rounds: int = 30,
        seed: int = 0,
        common_start: bool = True,
        evaluate_every: int = 5,
        eval_batch_size: int = 256,
        engine: Callable[[int], Engine] = Simulate,
    ) -> None:
        training = training or TrainingConfig()
        shards = list(partition.shards)
        schedule = as_schedule(graph)
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
        self.task, self.algorithm, self.schedule, self.partition = task, algorithm, schedule, partition
        self.training, self.rounds, self.seed, self.evaluate_every = training, rounds, seed, evaluate_every
        self.engine = engine(len(shards))
        self.attached = attach(task.model, lora or task.default_lora())
        task.attached(list(self.attached.sites))
        self.trainer = Trainer(
            task,
            self.attached,
            training,
            self.engine.agents,
            [shards[i] for i in self.engine.agents],
            seed,
            eval_batch_size,
        )
        self.adapter: Adapter = self.attached.init(self.engine.agents, seed, common_start)
        self.state: State = algorithm.init(self.adapter)
        self.trainer.prepare(self.adapter)
        self.round = 0
        """Rounds done."""
        self.step_in_round = 0
        """Local steps done of the next round; above 0 only after a stop within a round."""
        self.stop_requested = False
        self.on_step: Callable[[int, int, int, Tensor], None] | None = None
        """Called after every local step with (round, step, steps of the round, sums of losses (n,))."""
        self._losses: Tensor | None = None
        self._seconds: dict[str, float] = {}
        self._measures: tuple[Tensor, Tensor] | None = None

    def close(self) -> None:
        """Takes the adapters out of the task's model, which can then serve another run."""
        self.attached.detach()

    def stop(self) -> None:
        """Asks the run to end after the current local step; `train` then returns."""
        self.stop_requested = True

    def train(self) -> Iterator[Record]:
        """The rounds that are left, one record each; the first record (round 0) is of the start."""
        if self.round == 0 and self.step_in_round == 0:
            yield self._start()
        while self.round < self.rounds and not self.stop_requested:
            record = self._one_round()
            if record is not None:
                yield record

    def _start(self) -> Record:
        self._seconds = {}
        scores, averaged = self._evaluate()
        return Record(
            round=0,
            scores=scores,
            averaged_score=averaged,
            consensus_distance=self._consensus_distance(),
            bytes_sent=0.0,
            learning_rate=learning_rate(self.training, 0.0),
            seconds=dict(self._seconds),
        )

    def _one_round(self) -> Record | None:
        """The next round; None if it was stopped within its local steps."""
        number, algorithm = self.round + 1, self.algorithm
        if self.step_in_round == 0:
            self._seconds, self._losses, self._measures = {}, None, None
        bytes_sent = 0.0
        if algorithm.order == "combine-adapt" and self.step_in_round == 0:
            bytes_sent = self._mix(number)
        if not self._local_steps(number):
            return None
        if algorithm.order == "adapt-combine":
            bytes_sent = self._mix(number)
        elif self._talks:
            bytes_sent = self._bytes_sent(algorithm.message(self.adapter, self.state, number), number)
        self.round, self.step_in_round = number, 0
        assert self._losses is not None
        mean_losses = self._losses.cpu() / torch.from_numpy(self.trainer.local_steps)
        gathered = self.engine.gather({"losses": mean_losses, **self._measured()})
        scores = averaged = None
        if number % self.evaluate_every == 0 or number == self.rounds:
            scores, averaged = self._evaluate()
        return Record(
            round=number,
            losses=gathered["losses"].tolist(),
            scores=scores,
            averaged_score=averaged,
            consensus_distance=self._consensus_distance(),
            interference=_rms(gathered.get("interference")),
            tail=_rms(gathered.get("tail")),
            bytes_sent=bytes_sent,
            learning_rate=learning_rate(self.training, (number - 1) / self.rounds),
            seconds=dict(self._seconds),
        )

    @property
    def _talks(self) -> bool:
        return self.algorithm.topology in ("graph", "server")

    def _local_steps(self, number: int) -> bool:
        """The round's local steps that are left; false if a stop was asked for before the last."""
        total = int(self.trainer.local_steps.max())

        def on_step(done: int, losses: Tensor) -> bool:
            self.step_in_round = done
            if self.on_step is not None:
                self.on_step(number, done, total, losses)
            return self.stop_requested and done < total

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

    def _mix(self, number: int) -> float:
        """Message, exchange, combine; returns the bytes an agent sent (mean over agents)."""
        if not self._talks:
            return 0.0
        started = time.perf_counter()
        message = self.algorithm.message(self.adapter, self.state, number)
        inbox = self.engine.exchange(message, self.schedule.at(number - 1), number)
        started = self._add_seconds("exchange", started)
        self._measures = consensus.interference_and_tail(self.adapter, inbox)
        started = self._add_seconds("measure", started)
        self.adapter, self.state = self.algorithm.combine(self.adapter, self.state, inbox, number)
        self.trainer.moments_after(self.algorithm, self.state)
        self._add_seconds("combine", started)
        return self._bytes_sent(message, number)

    def _bytes_sent(self, message: Tensors, number: int) -> float:
        """Bytes of one agent's message times its receivers, mean over agents; to a server it goes once."""
        each = sum(t[0].numel() * t.element_size() for t in message.values())
        graph = self.schedule.at(number - 1)
        return each * (1.0 if graph.is_server else float(np.mean(graph.degrees)))

    def _measured(self) -> Tensors:
        if self._measures is None:
            return {}
        return {"interference": self._measures[0], "tail": self._measures[1]}

    def _consensus_distance(self) -> float | None:
        if self.engine.num_agents == 1:
            return 0.0
        started = time.perf_counter()
        result = consensus.distance(self.all_adapters())
        self._add_seconds("measure", started)
        return result

    def _evaluate(self) -> tuple[list[float | None], float]:
        """Scores of all agents, and of the averaged model."""
        started = time.perf_counter()
        scores = self.engine.gather({"scores": self.trainer.evaluate(self.adapter)})["scores"].tolist()
        averaged = scores[0]
        if self.engine.num_agents > 1:
            averaged = float(self.trainer.evaluate(consensus.averaged(self.all_adapters()))[0])
        self._add_seconds("evaluate", started)
        return scores, averaged

    def _add_seconds(self, phase: str, started: float) -> float:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - started
        return now

    # What a run leaves behind

    def all_adapters(self) -> Adapter:
        """The adapters of all N agents of the run."""
        gathered = self.engine.gather(
            {**self.adapter.tensors(), **{f"scale/{k}": s for k, s in self.adapter.scale.items()}}
        )
        parts: dict[str, Tensors] = {"A": {}, "B": {}, "scale": {}, "extras": {}}
        for key, tensor in gathered.items():
            group, name = key.split("/", 1)
            parts[group][name] = tensor
        return Adapter(parts["A"], parts["B"], parts["scale"], parts["extras"])

    def save_adapter(self, directory: str | Path, agent: int | str = AVERAGED) -> None:
        """Writes one agent's adapter, or the averaged model, as a PEFT directory."""
        adapters = self.all_adapters()
        if agent == AVERAGED:
            adapters, index = consensus.averaged(adapters), 0
        elif isinstance(agent, int) and 0 <= agent < adapters.num_agents:
            index = agent
        else:
            raise UserError(f"agent: {agent!r} is not in this run; use 0 to {adapters.num_agents - 1} or '{AVERAGED}'.")
        if self.engine.is_main:
            name = getattr(getattr(self.task.model, "config", None), "_name_or_path", None)
            save_peft(adapters, index, self.attached.config, Path(directory), name)

    def snapshot(self) -> tuple[Tensors, dict[str, Any]]:
        """All that is needed to go on: named tensors with the agents on the leading axis, and plain values."""
        tensors = {f"adapter/{k}": t for k, t in self.adapter.tensors().items()}
        tensors |= {f"state/{k}": t for k, t in self.state.items()}
        for group, moments in self.trainer.moments.items():
            tensors[f"moments/{group}/first"] = moments.first
            tensors[f"moments/{group}/second"] = moments.second
            tensors[f"moments/{group}/steps"] = moments.steps
        tensors["steps_taken"] = torch.from_numpy(self.trainer.steps_taken.copy())
        if self.step_in_round and self._losses is not None:
            tensors["losses"] = self._losses
            if self._measures is not None:
                tensors |= {f"measures/{k}": t for k, t in self._measured().items()}
        values = {
            "round": self.round,
            "step_in_round": self.step_in_round,
            "seconds": self._seconds if self.step_in_round else {},
            "agents_per_pass": self.trainer.agents_per_pass,
        }
        return self.engine.gather(tensors), values

    def restore(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Goes back to a snapshot of a run with the same configuration; the rest is then bit-equal."""
        rows = torch.tensor(self.engine.agents)
        device = self.trainer.device
        mine = {k: t[rows].to(device) for k, t in tensors.items()}

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
        measures = part("measures/")
        self._measures = (measures["interference"].cpu(), measures["tail"].cpu()) if measures else None
        self.round, self.step_in_round = int(values["round"]), int(values["step_in_round"])
        self._seconds = dict(values["seconds"])
        self.trainer.agents_per_pass = int(values["agents_per_pass"])


def _rms(values: Tensor | None) -> float | None:
    return None if values is None else float(values.double().square().mean().sqrt())

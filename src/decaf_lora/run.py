"""How does training go, round by round? A round is written once: local steps, exchange, survey, record.

`Run` joins a task, an algorithm, a graph and a partition. Engines decide only where agents live and how messages
travel; `exchange.py` makes the exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from decaf_lora import consensus
from decaf_lora.adapters import attach, load_peft
from decaf_lora.adapters.adapter import Adapter, as_adapter
from decaf_lora.adapters.names import Tensors, flattened, parted, put, take
from decaf_lora.adapters.portable import outline, write_adapter
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.chain import Algorithm, State
from decaf_lora.attackers import Honest
from decaf_lora.batches import local_steps
from decaf_lora.config import TrainingConfig
from decaf_lora.engines import Engine, Pending, Simulate
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange, Exchanged, Started, exchanges_of_round, refuse_alone, refuse_start
from decaf_lora.graphs import Graph, Schedule, as_schedule, complete
from decaf_lora.optimizers import learning_rate
from decaf_lora.partition import Given, Own, Partition, named_alike
from decaf_lora.privacy import Account, trainer_class
from decaf_lora.records import Record
from decaf_lora.tasks.base import Task
from decaf_lora.threats import AttackersConfig, PrivacyConfig
from decaf_lora.timing import Phases, Timer

if TYPE_CHECKING:
    from peft import LoraConfig


class Run:
    """Agents that train together. The end of a `with` block takes the adapters out of the task's model.

    Args:
        task: model, data, loss and score.
        algorithm: what agents send, and how they combine what they receive.
        graph: a graph, or a schedule of graphs, over as many agents as the partition has. Algorithms that use no graph
            (local, centralized, fedavg) ignore it.
        partition: the examples of all agents, or what `partition.as_partition` takes; `partition.Own` in a process
            that knows one agent's examples only. If it names agents, the graph must have the same names, in any order.
        training: local steps, optimizer and learning rate; None: the defaults.
        lora: a `peft.LoraConfig`, or one for each agent, which may differ in rank and alpha; None: the task's.
        rounds: number of rounds of the whole run.
        seed: the seed of every random choice.
        common_start: whether all agents start with the same random A.
        init_adapters: PEFT directories that agents start from, one for each (None: a fresh start), of any rank.
            Centralized training starts from their average, at the largest rank.
        gossip_steps: exchanges in a round, each on the next graph of the schedule; "period": a whole period.
        test: which test examples score an agent's model: all, the agent's own (`Partition.tests`), both, or
            all and those of the classes that the agent holds, in its shares (alike).
        evaluate_every: number of rounds from one evaluation of the agents' models and of the averaged model to the
            next. The last round is always evaluated.
        measure_every: the same for consensus distance, interference and truncation tail.
        eval_batch_size: the most test examples in a forward pass, over all agents in it.
        attackers: agents that lie, in a simulation; they are not scored, and are no part of the averaged model.
        privacy: differential privacy of every example; training losses are then not recorded.
        engine: makes, from the number of agents, the engine that they live in.
        phases: gives a context manager for each phase, "train", "exchange", "combine", "measure" and "evaluate", which
            is open while the phase lasts; None: the timer that fills the records' `seconds`.

    Raises:
        UserError: two arguments do not fit together; names the field.
    """

    def __init__(
        self,
        task: Task,
        algorithm: Algorithm,
        graph: Graph | Schedule,
        partition: Partition | Own | Given,
        training: TrainingConfig | None = None,
        *,
        lora: LoraConfig | Sequence[LoraConfig] | None = None,
        rounds: int = 30,
        seed: int = 0,
        common_start: bool = True,
        init_adapters: Sequence[str | Path | None] | None = None,
        gossip_steps: int | Literal["period"] = 1,
        test: Literal["all", "own", "both", "alike"] = "all",
        evaluate_every: int = 5,
        measure_every: int = 1,
        eval_batch_size: int = 256,
        attackers: AttackersConfig | None = None,
        privacy: PrivacyConfig | None = None,
        engine: Callable[[int], Engine] = Simulate,
        phases: Phases | None = None,
    ) -> None:
        training = training or TrainingConfig()
        schedule, partition = named_alike(as_schedule(graph), partition, task.labels)
        agents = partition.num_agents
        topology = algorithm.topology
        for field, given in (("lora.ranks", lora), ("init_adapters", init_adapters)):
            if isinstance(given, Sequence) and len(given) != agents:
                raise UserError(f"{field}: {len(given)} given for {agents} agents; give one for each.")
        if topology == "graph" and schedule.num_agents != agents:
            raise UserError(
                f"graph: it joins {schedule.num_agents} agents but the partition has {agents} shards; "
                "make both the same number of agents."
            )
        if topology in ("graph", "server") and agents < 2:
            raise UserError(
                f"agents: {algorithm.name} needs at least 2 agents, got 1; use local or centralized for one."
            )
        steps = exchanges_of_round(schedule, gossip_steps) if topology == "graph" else 1
        self.engine = engine(1 if topology == "pooled" and isinstance(partition, Partition) else agents)
        self.sees_all = len(self.engine.reports) == self.engine.num_agents
        """Whether this process sees all agents; in a mesh it sees its own agent only."""
        if not self.sees_all:
            refuse_alone(algorithm, schedule, steps)
        self.honest = Honest(attackers or AttackersConfig())
        algorithm = self.honest.among(algorithm, agents, len(self.engine.agents), seed)
        if isinstance(partition, Own) and self.engine.agents != [partition.agent]:
            raise UserError(
                f"partition: it holds the examples of agent {partition.agent} alone, but this process trains "
                f"{len(self.engine.agents)} agents; give everybody's, or an engine of one agent a process."
            )
        if topology == "pooled":
            training = training.model_copy(update={"batch_size": training.batch_size * agents})
            shards = {0: np.sort(np.concatenate([partition.shard(i) for i in range(agents)]))}
        else:
            # Processes that keep step take as many steps as the agent that takes most.
            shards = {i: partition.shard(i) for i in (range(agents) if self.sees_all else self.engine.agents)}
        if topology == "server":
            schedule = as_schedule(Graph.server([len(shards[i]) for i in range(agents)]))
        elif topology != "graph":
            schedule = as_schedule(complete(self.engine.num_agents))
        self.task, self.schedule, self.partition = task, schedule, partition
        self.training, self.rounds, self.seed, self.measure_every = training, rounds, seed, measure_every
        self.evaluate_every, self.test = evaluate_every, test
        self._tests = partition.tests_of(test, task.test_labels, seed)
        self.attached = attach(task.model, lora or task.default_lora())
        ranks = [sum(s.rank for s in self.attached.sites_of(i).values()) for i in range(agents)]
        self._largest = int(np.argmax(ranks))
        task.on_attach([*self.attached.sites, *self.attached.modules])
        self.timer = Timer(self.attached.device)
        self.phase = phases or self.timer
        self.exchange = Exchange(
            algorithm,
            schedule,
            self.engine,
            rounds=rounds,
            gossip_steps=steps,
            seed=seed,
            ranks=None if self.attached.uniform or topology == "pooled" else self._ranks(),
            phase=self.phase,
        )
        self.algorithm = self.exchange.algorithm  # fitted to the graph
        taught, shards = self.honest.taught(task, shards)
        self.account = Account(privacy or PrivacyConfig(), training, shards, rounds, init_adapters, self.sees_all)
        self.trainer = trainer_class(self.account)(
            taught,
            self.attached,
            training,
            self.engine.agents,
            [shards[i] for i in self.engine.agents],
            seed,
            eval_batch_size,
            steps_in_round=int(local_steps(training, list(shards.values())).max()),
        )
        try:
            self.adapter: Adapter = self.exchange.begin(self._first_adapter(common_start, init_adapters))
            self.state: State = self.exchange.init(self.adapter)
            self.trainer.prepare(self.adapter, rounds * self.trainer.steps_in_round)
        except BaseException:
            self.close()  # so that the task can serve another run
            raise
        self.round = 0
        """Rounds done."""
        self.step_in_round = 0
        """Local steps done in the next round; above 0 only after a stop within that round."""
        self.stop_requested = False
        self.on_step: Callable[[int, int, int, Tensor], None] | None = None
        """Called after every local step: (round, steps done, steps of the round, (n,) sums of their losses)."""
        self._recorded = 0
        """The round of the last record."""
        self._losses: Tensor | None = None
        self._measures: Tensors = {}
        self._noted: dict[str, Any] = {}
        """Fields of the record for an agent that does not see all others."""
        self._bytes_sent = 0.0
        self._wire_bytes: float | None = None
        self._ahead: Started | None = None
        """The exchange of the next round, if it was started before that round."""
        self._collection: Pending[Tensors] | None = None
        """The collection of all adapters in the main process, while it is under way."""

    def _ranks(self) -> dict[str, list[int]]:
        everybody = range(self.engine.num_agents)
        return {name: [self.attached.sites_of(i)[name].rank for i in everybody] for name in self.attached.sites}

    def _first_adapter(self, common_start: bool, directories: Sequence[str | Path | None] | None) -> Adapter:
        pooled = self.algorithm.topology == "pooled"
        agents = self.engine.agents
        refuse_start(self.algorithm.rule, self.attached.uniform, common_start, directories)
        if pooled:  # one agent stands for all
            agents = [self._largest] if directories is None else list(range(len(directories)))
        adapter = self.attached.init(agents, self.seed, common_start)
        if directories is not None:
            chosen = [None if (path := directories[i]) is None else Path(path) for i in agents]
            adapter = load_peft(self.attached, adapter, chosen, agents)
        return consensus.averaged(adapter) if pooled and len(agents) > 1 else adapter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the adapters out of the task's model, which can then serve another run."""
        self.attached.detach()

    @property
    def gossip_steps(self) -> int:
        """Exchanges in a round."""
        return self.exchange.gossip_steps

    def stop(self) -> None:
        """Asks the run to end after the current local step: `train` then returns. Another call of `train` goes on."""
        self.stop_requested = True

    def train(self) -> Iterator[Record]:
        """Trains the rounds that are left, and yields the record of each; round 0 is the record of the start.

        Where several processes share the run, only the main process has complete records.
        """
        # Each process may have calibrated another number of agents a pass: all take the main process's number.
        passes = self.engine.gather({"passes": torch.full((len(self.engine.agents),), self.trainer.agents_per_pass)})
        self.trainer.agents_per_pass = int(passes["passes"][0])
        self.exchange.hold(self.adapter)
        if self.step_in_round == 0:
            self.timer.seconds = {}
            self._start_ahead()
            if self.round == 0:
                yield self._first_record()
        try:
            while self.round < self.rounds and not self.engine.anyone_stops(self.stop_requested):
                record = self.advance()
                if record is not None:
                    yield record
        finally:
            self.stop_requested = False  # also where the caller leaves the loop after `stop`
        self._land()

    def _first_record(self) -> Record:
        self._collect()
        surveyed = self._survey(evaluated=True, measured=True)
        return Record(
            round=0,
            **surveyed,
            bytes_sent=0.0,
            learning_rate=learning_rate(self.training, 0.0),
            seconds=dict(self.timer.seconds),
        )

    def advance(self) -> Record | None:
        """Trains the next round and returns its record; None if a stop was asked for within its local steps.

        Where the neighbours have gone on without this agent, it trains the round that they are at, a later one.
        """
        mixes_first, exchanged = self.algorithm.order == "combine-adapt", None
        if self.step_in_round == 0:
            self.timer.seconds, self._losses, self._measures, self._noted = {}, None, {}, {}
            self._bytes_sent, self._wire_bytes = 0.0, None
            if mixes_first and (exchanged := self._mix()) and self._due(self.measure_every):
                self._measure(exchanged.inbox)
        if not self._local_steps():
            return None
        if not mixes_first:
            exchanged = self._mix()
        number = self.round + 1
        evaluated, measured = self._due(self.evaluate_every), self._due(self.measure_every)
        self.round, self.step_in_round, self._recorded = number, 0, number
        # The adapters do not change any more. So the next round's messages, and the adapters that the main process
        # collects, can travel while all processes measure and evaluate.
        self._start_ahead()
        if evaluated or measured:
            self._collect()
        if measured and exchanged and not mixes_first:
            self._measure(exchanged.inbox)
        assert self._losses is not None
        mean_losses = self.account.told_of(self._losses.cpu() / torch.from_numpy(self.trainer.local_steps))
        gathered = self.engine.gather({"losses": mean_losses, **self._measures})
        surveyed = self._survey(evaluated, measured)
        return Record(
            round=number,
            losses=None if self.account.on else self.honest.only(gathered["losses"].tolist()),
            **surveyed,
            interference=consensus.rms(gathered.get("interference")),
            tail=consensus.rms(gathered.get("tail")),
            recompression=consensus.rms(gathered.get("recompression")),
            bytes_sent=self._bytes_sent,
            wire_bytes=self._wire_bytes,
            learning_rate=learning_rate(self.training, (number - 1) / self.rounds),
            seconds=dict(self.timer.seconds),
            **self._noted,
        )

    def _due(self, every: int) -> bool:
        """Whether the round under way, or one since the last record, is a multiple of `every`, or the last round."""
        number = self.round + 1
        return number // every > self._recorded // every or number >= self.rounds

    def _local_steps(self) -> bool:
        """Takes the local steps that are left in the round; returns whether it came to the last one before a stop."""
        total, round_ = self.trainer.steps_in_round, self.exchange.round(self.round + 1)

        def on_step(done: int, losses: Tensor) -> bool:
            self.step_in_round = done
            if self.on_step is not None:
                self.on_step(round_.number, done, total, losses)
            return done < total and self.engine.anyone_stops(self.stop_requested)

        with self.phase("train"):
            self.adapter, self.state, self._losses = self.trainer.train_round(
                self.adapter,
                self.algorithm,
                self.state,
                round_,
                self.rounds,
                self.step_in_round,
                self._losses,
                on_step,
            )
        return self.step_in_round >= total

    def _start(self) -> Started | None:
        """Starts the exchange of the next round, or of the later round that the neighbours are at.

        Returns None where there is no exchange: between agents that do not talk, and after the last round.
        """
        if self.algorithm.topology not in ("graph", "server"):
            return None
        number, self.adapter, self.state = self.exchange.meet(self.adapter, self.state, self.round + 1)
        self.round = min(number, self.rounds) - 1
        return self.exchange.start(self.adapter, self.state, number) if number <= self.rounds else None

    def _start_ahead(self) -> None:
        """Starts the next round's exchange if the round begins with it: its messages are then known already."""
        if self.algorithm.order == "combine-adapt" and self.round < self.rounds and not self._ahead:
            self._ahead = self._start()

    def _mix(self) -> Exchanged | None:
        """Makes the exchange of the next round, or of a later one (see `_start`); None if there is none."""
        started, self._ahead = self._ahead or self._start(), None
        if started is None:
            return None
        exchanged = self.exchange.finish(self.adapter, started)
        self.adapter, self.state = exchanged.adapter, exchanged.state
        self.round = min(exchanged.round.number, self.rounds) - 1
        self._bytes_sent, self._wire_bytes = exchanged.bytes_sent, exchanged.wire_bytes
        if exchanged.cut is not None:
            self._measures["recompression"] = exchanged.cut
        with self.phase("combine"):
            self.trainer.moments_after(self.algorithm, self.state)
        if not self.sees_all:
            self._noted |= exchanged.inbox.notes()
        return exchanged

    def _measure(self, inbox: Inbox) -> None:
        """Measures interference and truncation tail of the messages that arrived."""
        with self.phase("measure"):
            measured = consensus.interference_and_tail(self.adapter, inbox)
            if measured is not None:
                self._measures["interference"], self._measures["tail"] = measured
            if not self.sees_all:
                self._noted["neighbour_distance"] = consensus.neighbour_distance(self.adapter, inbox)

    def _collect(self) -> None:
        """Starts to bring all adapters to the main process."""
        self._collected()
        more = put("scale/", self.adapter.scale) | put("ranks/", self.adapter.ranks)
        self._collection = self.engine.collect(self.adapter.tensors() | more)

    def _collected(self) -> Tensors:
        """Waits for the collection that is under way; all adapters in the main process, {} elsewhere or without one."""
        collection, self._collection = self._collection, None
        return {} if collection is None else collection.wait()

    def _survey(self, evaluated: bool, measured: bool) -> dict[str, Any]:
        """Fields of the record: scores of all agents and of the averaged model, consensus distance, where due.

        Only the main process waits for the collected adapters; the others go on while their adapters travel. A field
        that needs all agents is None for an agent that does not see them.
        """
        scores = owns = averaged = distance = None
        own = self.test == "own"
        if evaluated:
            with self.phase("evaluate"):
                scores = owns = self.honest.only(self._own_scores()) if self.test != "all" else None
                if not own:
                    every = self.engine.gather({"scores": self.trainer.evaluate(self.adapter)})
                    scores = self.honest.only(every["scores"].tolist())
        if self.engine.is_main and self.sees_all and (evaluated or measured):
            with self.phase("measure"):
                adapters = self.honest.adapters(as_adapter(self._collected()).folded())
                if measured:
                    distance = consensus.distance(adapters) if adapters.num_agents > 1 else 0.0
            if scores is not None:
                with self.phase("evaluate"):
                    averaged = fmean(score for score in scores if score is not None)
                    if adapters.num_agents > 1 and (own or not consensus.agree(adapters)):
                        tests = self.honest.places(self._tests) if own else None
                        averaged = self.trainer.score_of(consensus.averaged(adapters), tests)
        found = {"scores": scores, "own_scores": owns, "averaged_score": averaged, "consensus_distance": distance}
        spent = self.account.spent(self.round) if evaluated else {}
        return {**found, **spent, "attackers": list(self.honest.attackers) or None}

    def _own_scores(self) -> list[float]:
        """(N,) every agent's score on its own test examples; pooled training scores its one model on each agent's."""
        if self.algorithm.topology == "pooled":
            return self.trainer.evaluate_own(self.adapter, self._tests).tolist()
        own = self.trainer.evaluate_own(self.adapter, [self._tests[i] for i in self.engine.agents])
        return self.engine.gather({"scores": own})["scores"].tolist()

    def _land(self) -> None:
        """Waits for the collection under way, and abandons an exchange that was started ahead: it will be repeated."""
        self._collected()
        if self._ahead is not None:
            self._ahead.pending.abandon()
            self._ahead = None

    # What a run leaves behind

    def all_adapters(self) -> Adapter | None:
        """The adapters of all N agents (in a mesh: of the own one) in the main process; None in other processes."""
        self._collect()
        gathered = self._collected()
        return as_adapter(gathered).folded() if gathered else None

    def save_adapter(self, directory: str | Path, agent: int | str = consensus.AVERAGED) -> None:
        """Writes one agent's adapter, or the averaged model, as a PEFT directory, with its tokenizer and a card.

        Args:
            directory: the PEFT directory to write.
            agent: the number of an agent, or "averaged".

        Raises:
            UserError: there is no such agent, or this process does not see it.
        """
        known = self.engine.reports
        consensus.check_agent(agent, self.engine.num_agents)
        if not self.sees_all and agent not in known:
            raise UserError(f"agent: {agent!r} is not known here; use {known[0]}, the agent of this process.")
        adapters = self.all_adapters()
        if adapters is not None:
            place = known.index(agent) if isinstance(agent, int) else agent
            made = {"algorithm": self.algorithm.name, "agents": self.partition.num_agents, "rounds": self.round}
            made |= {"privacy": kept} if (kept := self.account.told(self.round)) else {}
            if self.partition.names and isinstance(agent, int):
                made["model"] = f"agent {agent}, {self.partition.names[agent]}"
            one = consensus.chosen(adapters, place, self.honest.attackers)
            write_adapter(Path(directory), one, agent, self.outline(), made)

    def outline(self) -> dict[str, Any]:
        """What an export needs beside the tensors, in JSON's types: `adapters.portable.outline`."""
        one = self.algorithm.topology == "pooled" or self.attached.uniform
        agents = [self._largest] if one else range(self.engine.num_agents)
        return outline(self.attached, self.task.describe(), agents, 0 if one else self._largest)

    def snapshot(self) -> tuple[Tensors, dict[str, Any]]:
        """All that is needed to go on later. Every process calls this.

        Returns:
            Named tensors, with the reported agents on the leading axis, in the main process, which writes them ({} in
            others); and plain values in JSON's types.
        """
        tensors = put("adapter/", self.adapter.tensors()) | put("state/", flattened(self.state))
        tensors |= put("scale/", self.adapter.scale) | put("ranks/", self.adapter.ranks)
        tensors |= self.trainer.snapshot()
        if self.step_in_round and self._losses is not None:
            tensors["losses"] = self._losses
            tensors |= put("measures/", self._measures)
        values = {
            "round": self.round,
            "step_in_round": self.step_in_round,
            "recorded": self._recorded,
            "seconds": self.timer.seconds if self.step_in_round else {},
            "bytes_sent": self._bytes_sent if self.step_in_round else 0.0,
            "wire_bytes": self._wire_bytes if self.step_in_round else None,
            "agents_per_pass": self.trainer.agents_per_pass,
            "engine": self.engine.snapshot(),
            "outline": self.outline(),
            "attackers": list(self.honest.attackers),
        }
        return self.engine.collect({k: t.cpu() for k, t in tensors.items()}).wait(), values

    def restore(self, tensors: Tensors, values: dict[str, Any]) -> None:
        """Goes back to a snapshot of a run with the same configuration; the rounds that follow are then bit-equal.

        Every process passes the values, and the main process the tensors. The number of processes may have been another
        one at the snapshot.
        """
        self._land()
        device = self.trainer.device
        mine = {k: t.to(device, copy=True) for k, t in self.engine.scatter(tensors).items()}
        self.engine.restore(values.get("engine", {}))
        self.adapter = self.adapter.with_tensors(take("adapter/", mine))
        self.state = parted(take("state/", mine), self.state)
        self.trainer.restore(mine)
        self._losses = mine.get("losses")
        self._measures = {k: t.cpu() for k, t in take("measures/", mine).items()}
        self.round, self.step_in_round = int(values["round"]), int(values["step_in_round"])
        self._recorded = int(values.get("recorded", self.round))
        self.timer.seconds = dict(values["seconds"])
        self._bytes_sent, self._wire_bytes = float(values.get("bytes_sent", 0.0)), values.get("wire_bytes")
        self.trainer.agents_per_pass = int(values["agents_per_pass"])

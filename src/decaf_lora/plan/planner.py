"""What does one round of a configured run cost? The round is taken through `dry_run.py`, and its costs read off."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from decaf_lora import algorithms, graphs, partition
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, flattened
from decaf_lora.algorithms import Round
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.calibration import sizes
from decaf_lora.config import RunConfig, TrainingConfig
from decaf_lora.engines import Simulate
from decaf_lora.engines.base import Pending, Sizes
from decaf_lora.errors import UserError
from decaf_lora.exchange import Exchange
from decaf_lora.graphs import Graph
from decaf_lora.plan.assumed import KnownData, planned_task
from decaf_lora.plan.costs import DataSizes, Part, Plan
from decaf_lora.plan.dry_run import Cost, DryRun, UnknownNumberError, real_tensors, replace_methods
from decaf_lora.run import Run
from decaf_lora.runs.build import build_run, lora_configs
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.causal_lm import CausalTask
from decaf_lora.tasks.sequence_classification import SequenceClassification


def estimate(
    config: RunConfig,
    sizes: DataSizes | None = None,
    *,
    processes: int = 1,
    tflops: float | None = None,
) -> Plan:
    """The plan of the run that `config` describes, in the process that holds most agents.

    Args:
        config: the run.
        sizes: sizes of the data that take the place of known or assumed ones.
        processes: number of processes of torchrun that the agents are split over.
        tflops: throughput from which hours are computed, in 10^12 FLOP/s; None: the plan gives no hours.

    Raises:
        UserError: the shapes of the model, or a size that the plan needs, cannot be known.
    """
    try:
        return _Planner(config, sizes or DataSizes(), processes).plan(tflops)
    except UnknownNumberError as error:
        raise UserError(f"task: {config.task.name} cannot be planned: {error}.") from error


def measured(plan: Plan, config: RunConfig) -> Plan:
    """`plan` with the throughput that a real step of `config` has on this machine; loads the model and the data."""
    with build_run(with_a_rate(config)) as run:
        seconds, _ = timed_step(run)
        device, agents, per_pass = run.trainer.device, len(run.engine.agents), run.trainer.agents_per_pass
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    note = f"measured: a step of {agents} agents, {per_pass} in a pass, takes {seconds:.3g} s on {kind}"
    tflops = plan.flops_per_step / seconds / 1e12
    return replace(plan, tflops=tflops, assumptions=(*plan.assumptions, note))


def with_a_rate(config: RunConfig) -> RunConfig:
    """`config` with some learning rate in place of auto: costs do not depend on it."""
    if config.training.learning_rate != "auto":
        return config
    rate = TrainingConfig().learning_rate
    return config.model_copy(update={"training": config.training.model_copy(update={"learning_rate": rate})})


def timed_step(run: Run) -> tuple[float, Tensor]:
    """Takes a local step of all agents of `run` twice, and times the second: the first one warms up.

    The adapters of the run stay as they are; its optimizer state and its place in the data do not.

    Returns:
        Seconds, and the agents' losses (n,).

    Raises:
        TrainingError: a loss is not finite.
    """
    for _ in range(2):
        run.timer.seconds = {}
        with run.timer("train"):
            _, _, losses = run.trainer.train_round(
                run.adapter,
                run.algorithm,
                run.state,
                run.exchange.round(1),
                run.rounds,
                on_step=lambda done, losses: True,
            )
    return run.timer.seconds["train"], losses


class _Share(Simulate):
    """The engine of the first of several processes; tensors of the agents in other processes are shapes only."""

    def __init__(self, num_agents: int, processes: int) -> None:
        super().__init__(num_agents)
        self.agents = list(range(math.ceil(num_agents / processes)))

    def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        heard = (graph.weights[self.agents] != 0).any(0)
        heard[self.agents] = True
        senders = np.flatnonzero(heard).tolist()
        inbox = Inbox.from_weights(self._filled(message, len(senders)), graph.weights, senders, self.agents, exchange)
        return Pending(lambda: inbox)

    def gather(self, tensors: Tensors) -> Tensors:
        return self._filled(tensors, self.num_agents)

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        collected = self.gather(tensors)
        return Pending(lambda: collected)

    def _filled(self, tensors: Tensors, count: int) -> Tensors:
        more = count - len(self.agents)
        return {k: torch.cat([t, t.new_empty(more, *t.shape[1:])]) if more else t for k, t in tensors.items()}


PHASES = {
    "train": "train",
    "exchange": "exchange",
    "combine": "exchange",
    "measure": "exchange",
    "evaluate": "evaluate",
}
"""Phase of a run -> the phase of the plan that its costs count towards."""


class _Planner:
    def __init__(self, config: RunConfig, sizes: DataSizes, processes: int) -> None:
        if not 1 <= processes <= config.agents:
            raise UserError(f"processes: {processes} for {config.agents} agents; give 1 to {config.agents}.")
        for name, value in asdict(sizes).items():
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is below 1.")
        self.config, self.sizes, self.processes = with_a_rate(config), sizes, processes
        self.assumptions: list[str] = []
        if config.training.learning_rate == "auto":
            self.assumptions.append("training.learning_rate: to choose one by itself takes about one more run")
        if config.validation_share is not None:
            self.assumptions.append("validation_share: counted as a run on all examples, scored on the test set")
        self.dry = DryRun()

    def plan(self, tflops: float | None) -> Plan:
        config, dry = self.config, self.dry
        algorithm = algorithms.make(config.algorithm.name, **config.algorithm.options())
        graph = graphs.parse(config.graph, config.agents, config.seed)
        task, data = planned_task(config, self.sizes)
        self.assumptions += [*data.assumptions, *self._numbers(task)]
        num_test, task.num_test = task.num_test, min(task.num_test, config.task.eval_batch_size)
        pooled = algorithm.topology == "pooled"
        processes = 1 if pooled else self.processes
        dry.fake_module(task.model)
        weights = dry.live
        kept, phases = self._watch(task), dict[str, Cost]()
        # transformers must read masks as in a real run: the dry run knows their values.
        with dry, mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False):
            run = Run(
                task,
                algorithm,
                graph,
                self._shards(task, data),
                self._training(1 if pooled else math.ceil(config.agents / processes)),
                lora=lora_configs(config, task.default_lora()),
                rounds=config.rounds,
                seed=config.seed,
                common_start=config.start == "common",
                gossip_steps=config.gossip_steps,
                evaluate_every=1,
                eval_batch_size=config.task.eval_batch_size,
                engine=lambda count: _Share(count, processes),
                phases=lambda name: self._phase(phases, PHASES[name]),
            )
            gc.collect()
            trainer = run.trainer
            steps, here, count = trainer.steps_in_round, len(run.engine.agents), run.engine.num_agents
            per_pass = min(trainer.agents_per_pass, here)
            if self._is_auto and per_pass > 1:
                self.assumptions.append(
                    f"agents per pass: auto tries up to {per_pass} of {here} agents at once, which is what is planned; "
                    "training.agents_per_pass bounds it"
                )
            first = self._fill_caches(run)
            self._one_step_and_pass(run, phases)
            record = run.advance()
            assert record is not None
            phases["evaluate"].peak = max(phases["evaluate"].peak, first.peak)
            parts = self._parts(run, weights, max(kept), phases["train"])
            bytes_per_round = self._bytes_per_round(run, record.bytes_sent)
        alike, most = self._end_alike(run), count + (count > 1)
        evaluate = phases["forward"].flops / (self._evaluated(run) * task.num_test)
        start_alike = config.start == "common" and not config.init_adapters
        models = [1 if equal else most for equal in (start_alike, alike)]
        return Plan(
            model=config.task.model or config.task.name,
            agents=config.agents,
            agents_here=here,
            agents_per_pass=per_pass,
            examples_per_pass=per_pass * trainer.config.batch_size,
            parameters=sum(p.numel() for p in task.model.parameters()),
            trained_per_agent=sum(t[0].numel() for t in run.adapter.tensors(run.exchange.trained).values()),
            parts=parts,
            peaks={name: phases[name].peak for name in ("train", "exchange", "evaluate") if name in phases},
            rounds=config.rounds,
            steps_per_round=steps,
            bytes_per_round=bytes_per_round,
            flops_per_step=phases["train"].flops * count / per_pass,
            flops_per_evaluation=evaluate * num_test if data.num_test_known else None,
            evaluations=models[0] + models[1] * math.ceil(config.rounds / config.evaluate_every),
            assumptions=tuple(self.assumptions),
            tflops=tflops,
        )

    def _fill_caches(self, run: Run) -> Cost:
        """Lets a task compute, on one example, what it keeps for the whole run, such as text features."""
        task, whole = run.task, run.task.num_test
        with self.dry.phase() as phase:
            if not isinstance(task, CausalTask | SequenceClassification):  # these keep nothing
                task.num_test = 1
                run.trainer.evaluate(run.adapter.select(slice(0, 1)))
                task.num_test = whole
        return phase

    @contextmanager
    def _phase(self, phases: dict[str, Cost], name: str) -> Iterator[None]:
        """Notes the cost of the code inside under `name`; of several costs the highest peak and the last FLOP count."""
        with self.dry.phase() as phase:
            yield
        if name in phases:
            phase.peak = max(phase.peak, phases[name].peak)
        phases[name] = phase

    def _one_step_and_pass(self, run: Run, phases: dict[str, Cost]) -> None:
        """Shortens the round of `run` to one step and one pass, and the evaluation to two passes.

        Steps follow one another, and so do passes; each frees the memory that it took. So one stands for all. Of an
        evaluation two are needed, since the first keeps what the later ones use.
        """
        trainer = run.trainer
        trainer.steps_in_round, trainer.local_steps = 1, np.ones_like(trainer.local_steps)
        passes, evaluate = trainer._passes, trainer.evaluate
        evaluated = self._evaluated(run)

        def evaluate_one_pass(adapter: Adapter) -> Tensor:
            n = adapter.num_agents
            if "forward" in phases:  # the averaged model needs no more than the agents did
                return torch.zeros(n, dtype=torch.float64)
            with self.dry.phase() as phases["forward"]:
                return evaluate(adapter.select(slice(0, evaluated))).new_zeros(n)

        replace_methods(trainer, _passes=lambda active: islice(passes(active), 1), evaluate=evaluate_one_pass)

    def _evaluated(self, run: Run) -> int:
        """Agents of the first two passes of the evaluation; the test set of the plan is one batch."""
        n = 1 if self._end_alike(run) else len(run.engine.agents)
        return min(n, 2 * run.trainer.evaluator.agents_in_pass(run.task.num_test, run.trainer.evaluated_together))

    def _numbers(self, task: Task) -> list[str]:
        base = "4 bits" if self.config.task.quantization else str(next(task.model.parameters()).dtype)
        autocast = ", under bfloat16 autocast" if self.config.training.precision == "bfloat16" else ""
        says = [f"numbers: base {base.removeprefix('torch.')}, adapters and optimizer float32{autocast}"]
        attention = getattr(getattr(task.model, "config", None), "_attn_implementation", None)
        fused = " (fused, as on the CPU)" if attention == "sdpa" else ""
        return says + ([f"attention: {attention}{fused}"] if attention else [])

    def _end_alike(self, run: Run) -> bool:
        """Whether all agents end a round with equal adapters: mixes small random ones for real to find out."""
        algorithm, n = run.algorithm, run.engine.num_agents
        if algorithm.topology not in ("graph", "server") or algorithm.order != "adapt-combine":
            return False
        if run.schedule.period != 1 or not run.attached.uniform:
            return False
        graph = run.schedule.window(0, run.gossip_steps)
        if graph.hops and algorithm.relays:
            return False
        with real_tensors():
            draw, one = torch.Generator().manual_seed(0), torch.ones(n)
            start = torch.randn(1 if self.config.start == "common" else n, 1, 3, generator=draw).expand(n, 1, 3)
            before = Adapter({"x": start}, {"x": torch.zeros(n, 3, 1)}, {"x": one}, {"y": torch.zeros(n, 2)})
            mixing = Exchange(algorithm, graphs.as_schedule(graph), Simulate(n))
            before = mixing.begin(before)
            state, trained = mixing.init(before), before.tensors(algorithm.trains(Round(1)))
            moved = {k: t + torch.randn(t.shape, generator=draw) for k, t in trained.items()}
            adapter = before.with_tensors(moved)
            after = mixing.finish(adapter, mixing.start(adapter, state, 1)).adapter
            return all(bool((t == t[:1]).all()) for t in after.tensors().values())

    def _training(self, here: int) -> TrainingConfig:
        training = self.config.training
        if not self._is_auto:
            return training
        device = torch.device(
            "cpu" if self.config.device == "cpu" else "cuda"
        )  # elsewhere than on a CPU auto tries more
        return training.model_copy(update={"agents_per_pass": sizes(here, training.batch_size, device)[-1]})

    @property
    def _is_auto(self) -> bool:
        return self.config.training.agents_per_pass == "auto"

    def _shards(self, task: Task, data: KnownData) -> partition.Partition:
        config = self.config
        if data.labels_known or config.training.epochs is not None:
            return partition.parse(config.partition, task.labels, config.agents, config.seed, task.column)
        return partition.iid(task.labels, config.agents, config.seed)

    def _watch(self, task: Task) -> list[int]:
        """Makes the batches of `task` fake; returns a list that gets the bytes every loss keeps for the backward."""
        dry, kept = self.dry, list[int]()
        losses, train_batch, test_batch = task.losses, task.train_batch, task.test_batch

        def outside(make: Callable[[np.ndarray], Batch]) -> Callable[[np.ndarray], Batch]:
            def batch(indices: np.ndarray) -> Batch:
                with real_tensors():
                    made = make(indices)
                return {k: dry.fake(t) for k, t in made.items()}

            return batch

        def watched(batch: Batch, agents: int) -> Tensor:
            before = dry.live
            loss = losses(batch, agents)
            kept.append(dry.live - before)
            return loss

        replace_methods(task, train_batch=outside(train_batch), test_batch=outside(test_batch), losses=watched)
        return kept

    def _bytes_per_round(self, run: Run, first: float) -> float:
        period = run.schedule.period
        if period is None:
            rounds = min(8, run.rounds)
            self.assumptions.append(f"bytes: mean of {rounds} rounds of a random schedule")
        else:
            rounds = min(math.lcm(period, run.gossip_steps) // run.gossip_steps, run.rounds)
        trains = {run.algorithm.trains(run.exchange.round(number)) for number in range(1, min(100, run.rounds) + 1)}
        if len(trains) > 1:
            rounds = min(64, run.rounds)
            self.assumptions.append(
                f"{run.algorithm.name} trains other factors in other rounds: bytes are the mean of {rounds}, memory is "
                "the first one's"
            )
        bytes_sent = first
        for number in range(2, rounds + 1) if run.algorithm.topology in ("graph", "server") else ():
            bytes_sent += run.exchange.finish(
                run.adapter, run.exchange.start(run.adapter, run.state, number)
            ).bytes_sent
        return bytes_sent / rounds

    def _parts(self, run: Run, weights: int, kept: int, train: Cost) -> tuple[Part, ...]:
        here = len(run.engine.agents)
        adapter = run.adapter
        moments = [t for m in run.trainer.moments.values() for t in (m.first, m.second, m.steps)]
        own = {
            "adapters": [*adapter.tensors().values(), *adapter.scale.values()],
            "adapters, working copy": list(adapter.tensors().values()),
            "gradients": list(adapter.tensors(run.algorithm.trains(Round(1))).values()),
            f"optimizer state ({run.training.optimizer})": moments,
            f"state of {run.algorithm.name}": list(flattened(run.state).values()),
        }
        parts = [Part("base model", weights)]
        for name, tensors in own.items():
            size = sum(t.numel() * t.element_size() for t in tensors)
            parts.append(Part(name, size, size // here))
        parts.append(Part("activations kept for the backward pass", kept))
        parts.append(Part("temporary, at the highest", train.peak - sum(p.bytes for p in parts)))
        return tuple(parts)

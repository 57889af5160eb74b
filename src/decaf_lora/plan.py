"""What will this run cost? Memory, bytes and arithmetic, before any weight or image is loaded.

`estimate` builds the run that a configuration describes, with a model made from its config.json alone, and takes
one round of it (local step, exchange, evaluation) through `dry_run.py`: the code that will run is the code that is
measured, on tensors without memory. DataSizes are bytes of tensors, in this process; what Python, libraries and a GPU's
own context take comes on top.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from decaf_lora import algorithms, graphs, partition, tasks
from decaf_lora.algorithms.base import Adapter, Inbox, Tensors
from decaf_lora.config import RunConfig, TaskConfig, TrainingConfig
from decaf_lora.data import Ragged, looks_local
from decaf_lora.dry_run import DryRun, Phase, UnknownNumberError
from decaf_lora.engines import Simulate
from decaf_lora.engines.base import Pending, Sizes
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph
from decaf_lora.records import Spread, human_bytes
from decaf_lora.run import Run
from decaf_lora.runs.build import build_run, lora_configs
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.causal_lm import AnswerScoring, CausalTask, LanguageModeling, Sequences
from decaf_lora.tasks.image_text import TEMPLATES, ImageText
from decaf_lora.tasks.sequence_classification import HEADS, SequenceClassification, heads

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "openai/clip-vit-base-patch16": {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "projection_dim": 512,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "projection_dim": 512,
        },
    },
}
"""Shapes of models whose config.json may be out of reach, from their public model cards."""

DATASETS: dict[tuple[str, str | None], tuple[int, int, int]] = {
    ("dpdl-benchmark/oxford_flowers102", None): (102, 7169, 1020),
    ("./ucf101-middle-frames", None): (101, 9537, 3783),
    ("ethz/food101", None): (101, 75750, 25250),
    ("aps/super_glue", "wic"): (2, 5428, 638),
    ("aps/super_glue", "boolq"): (2, 9427, 3270),
}
"""(data, subset) of the paper's recipes -> classes, training examples, test examples."""


@dataclass(frozen=True)
class DataSizes:
    """What a plan cannot know without the data; None: from the data where they are local, else assumed."""

    sequence_length: int | None = None
    """Tokens of a sequence, or of a prompt of an image-text model."""
    num_classes: int | None = None
    num_train: int | None = None
    num_test: int | None = None


@dataclass(frozen=True)
class Part:
    """Bytes of one thing in this process, and for one agent where agents have their own."""

    name: str
    bytes: int
    per_agent: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run costs. Bytes are of tensors in this process; `parts` add up to the training peak."""

    model: str
    agents: int
    agents_here: int
    """Agents of the (largest) process."""
    agents_per_pass: int
    examples_per_pass: int
    parameters: int
    trained_per_agent: int
    parts: tuple[Part, ...]
    peaks: dict[str, int]
    """Highest bytes in use during `train`, `exchange` and `evaluate`."""
    rounds: int
    steps_per_round: int
    bytes_per_round: float
    """What an agent sends in a round, mean over agents and rounds."""
    flops_per_step: float
    """Of all agents together."""
    flops_per_evaluation: float | None
    """Of one model on the whole test set; None where its size is not known."""
    evaluations: int
    """Of single models, the agents' and the averaged one, in the whole run; equal ones are evaluated once."""
    assumptions: tuple[str, ...]
    tflops: float | None = None
    """Throughput that `hours` is computed with, in 10^12 FLOP/s."""

    @property
    def peak(self) -> int:
        """The highest of the peaks."""
        return max(self.peaks.values())

    @property
    def bytes_sent(self) -> float:
        """What an agent sends in the whole run."""
        return self.bytes_per_round * self.rounds

    @property
    def flops(self) -> float:
        """Of the whole run: training and evaluations."""
        return self.flops_per_step * self.steps_per_round * self.rounds + self.evaluations * (
            self.flops_per_evaluation or 0.0
        )

    @property
    def hours(self) -> float | None:
        """Hours of arithmetic at `tflops`; None where no throughput is given."""
        return None if self.tflops is None else self.flops / self.tflops / 1e12 / 3600

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        derived = {"peak": self.peak, "bytes_sent": self.bytes_sent, "flops": self.flops, "hours": self.hours}
        return {**asdict(self), **derived}


def estimate(
    config: RunConfig,
    sizes: DataSizes | None = None,
    *,
    processes: int = 1,
    tflops: float | None = None,
) -> Plan:
    """The plan of `config`, with its agents split over `processes` (of torchrun); of the first, which has most.

    `tflops` is the throughput to compute hours with. Raises UserError where the model's shapes or a needed size cannot
    be known.
    """
    try:
        return _Planner(config, sizes or DataSizes(), processes).plan(tflops)
    except UnknownNumberError as error:
        raise UserError(f"task: {config.task.name} cannot be planned: {error}.") from error


def measured(plan: Plan, config: RunConfig) -> Plan:
    """`plan` with the throughput of a real step on this machine, for which model and data are loaded."""
    run = build_run(config)
    run.trainer.steps_in_round, run.trainer.local_steps = 1, np.ones_like(run.trainer.local_steps)
    for _ in range(2):  # the first one warms up
        run.step_in_round = 0
        run._seconds = {}
        run._local_steps(1)
    seconds = run._seconds["train"]
    kind = torch.cuda.get_device_name(run.trainer.device) if run.trainer.device.type == "cuda" else "the CPU"
    note = (
        f"measured: a step of {len(run.engine.agents)} agents, {run.trainer.agents_per_pass} in a pass, takes "
        f"{seconds:.3g} s on {kind}"
    )
    run.close()
    tflops = plan.flops_per_step / seconds / 1e12
    return replace(plan, tflops=tflops, assumptions=(*plan.assumptions, note))


def shown(plan: Plan, name: str) -> list[Any]:
    """The plan for the terminal: rich tables and text."""
    one = plan.agents_here == 1
    memory = Table(title=f"memory while training, {_process(plan)}", **_STYLE)
    for column in ("", "in all", *(() if one else ("an agent",))):
        memory.add_column(column, justify="left" if not column else "right")
    for part in plan.parts:
        per_agent = "" if part.per_agent is None else _bytes(part.per_agent)
        memory.add_row(part.name, _bytes(part.bytes), *(() if one else (per_agent,)))
    memory.add_section()
    memory.add_row("highest while training", _bytes(plan.peaks["train"]))
    memory.add_row("highest in an exchange", _bytes(plan.peaks["exchange"]) if "exchange" in plan.peaks else "none")
    memory.add_row("highest in an evaluation", _bytes(plan.peaks["evaluate"]))
    work = Table(title="work", **_STYLE)
    for column in ("", "a step", "a round", "the run"):
        work.add_column(column, justify="left" if not column else "right")
    steps = plan.steps_per_round
    work.add_row("rounds", "", "1", f"{plan.rounds}")
    work.add_row("local steps", "1", f"{steps}", f"{steps * plan.rounds}")
    sent = [_bytes(plan.bytes_per_round), _bytes(plan.bytes_sent)] if plan.bytes_per_round else ["nothing", "nothing"]
    work.add_row("an agent sends", "", *sent)
    flops = [plan.flops_per_step * n for n in (1, steps, steps * plan.rounds)]
    work.add_row("training, all agents, FLOP", *(f"{x:.3g}" for x in flops))
    if plan.flops_per_evaluation is not None:
        evaluating = plan.flops_per_evaluation * plan.evaluations
        work.add_row(f"evaluating {plan.evaluations} models, FLOP", "", "", f"{evaluating:.3g}")
    if plan.hours is not None:
        work.add_row(f"hours at {plan.tflops:.3g} TFLOP/s", "", "", f"{plan.hours:.3g}")
    facts = [
        f"{name}: {plan.model}, {plan.parameters / 1e6:.4g} million parameters, {plan.agents} agents, each trains "
        f"{plan.trained_per_agent / 1e6:.3g} million",
        f"{plan.agents_per_pass} agents in a pass, {plan.examples_per_pass} examples",
    ]
    return [
        *(Text(fact) for fact in facts),
        Text(""),
        memory,
        Text(""),
        work,
        Text(""),
        *(Text(f"- {text}") for text in plan.assumptions),
    ]


_STYLE: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "title_justify": "left"}


def _process(plan: Plan) -> str:
    if plan.agents_here == plan.agents:
        return "all agents in one process"
    return f"a process with {plan.agents_here} of {plan.agents} agents"


def _bytes(count: float) -> str:
    return human_bytes(Spread(count))


class _Share(Simulate):
    """The agents of the first of several processes; the others' tensors come as shapes."""

    def __init__(self, num_agents: int, processes: int) -> None:
        super().__init__(num_agents)
        self.agents = list(range(math.ceil(num_agents / processes)))

    def start(self, message: Tensors, graph: Graph, round_: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        heard = (graph.weights[self.agents] != 0).any(0)
        heard[self.agents] = True
        senders = np.flatnonzero(heard).tolist()
        inbox = Inbox.from_weights(self._filled(message, len(senders)), graph.weights, senders, self.agents)
        return Pending(lambda: inbox)

    def gather(self, tensors: Tensors) -> Tensors:
        return self._filled(tensors, self.num_agents)

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        collected = self.gather(tensors)
        return Pending(lambda: collected)

    def _filled(self, tensors: Tensors, count: int) -> Tensors:
        more = count - len(self.agents)
        return {k: torch.cat([t, t.new_empty(more, *t.shape[1:])]) if more else t for k, t in tensors.items()}


class _Planner:
    def __init__(self, config: RunConfig, sizes: DataSizes, processes: int) -> None:
        if not 1 <= processes <= config.agents:
            raise UserError(f"processes: {processes} for {config.agents} agents; give 1 to {config.agents}.")
        for name, value in asdict(sizes).items():
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is below 1.")
        self.config, self.sizes, self.processes = config, sizes, processes
        self.assumptions: list[str] = []
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
        kept = self._watch(task)
        # transformers must look into masks that the dry run knows, as it does in a real run.
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
            )
            gc.collect()
            trainer = run.trainer
            steps, here, count = trainer.steps_in_round, len(run.engine.agents), run.engine.num_agents
            per_pass = min(trainer.agents_per_pass, here)
            first = self._fill_caches(run)
            phases = self._one_step_and_pass(run)
            run._send_ahead()
            run._one_round()
            phases["evaluate"].peak = max(phases["evaluate"].peak, first.peak)
            parts = self._parts(run, weights, max(kept), phases["train"])
            bytes_per_round = self._bytes_per_round(run)
        alike, most = self._end_alike(run), count + (count > 1)
        evaluate = phases["forward"].flops / ((1 if alike else per_pass) * task.num_test)
        start_alike = config.start == "common" and not config.init_adapters
        models = [min(2, most) if equal else most for equal in (start_alike, alike)]
        return Plan(
            model=config.task.model or config.task.name,
            agents=config.agents,
            agents_here=here,
            agents_per_pass=per_pass,
            examples_per_pass=per_pass * trainer.config.batch_size,
            parameters=sum(p.numel() for p in task.model.parameters()),
            trained_per_agent=sum(t[0].numel() for t in run.adapter.tensors(algorithm.trains(1)).values()),
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

    def _fill_caches(self, run: Run) -> Phase:
        """Lets a task compute, on one example, what it keeps for the whole run, such as text features."""
        task, whole = run.task, run.task.num_test
        with self.dry.phase() as phase:
            if not isinstance(task, CausalTask | SequenceClassification):  # these keep nothing
                task.num_test = 1
                run.trainer.evaluate(run.adapter.select(slice(0, 1)))
                task.num_test = whole
        return phase

    def _one_step_and_pass(self, run: Run) -> dict[str, Phase]:
        """Shortens the round of `run` to what repeats in it, and notes what each of its phases costs.

        Steps follow one another and so do passes, each of which frees what it took: one stands for all.
        """
        trainer, phases = run.trainer, dict[str, Phase]()
        trainer.steps_in_round, trainer.local_steps = 1, np.ones_like(trainer.local_steps)
        passes, evaluate = trainer._passes, trainer.evaluate
        evaluated = 1 if self._end_alike(run) else trainer.agents_per_pass

        def evaluate_one_pass(adapter: Adapter) -> Tensor:
            n = adapter.num_agents
            if "forward" in phases:  # the averaged model needs no more than the agents did
                return torch.zeros(n, dtype=torch.float64)
            with self.dry.phase() as phases["forward"]:
                return evaluate(adapter.select(slice(0, evaluated))).new_zeros(n)

        def during(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*args: Any, **kwargs: Any) -> Any:
                with self.dry.phase() as phase:
                    out = method(*args, **kwargs)
                if name in phases:
                    phase.peak = max(phase.peak, phases[name].peak)
                phases[name] = phase
                return out

            return watched

        trainer._passes = lambda active: islice(passes(active), 1)  # type: ignore[method-assign]
        trainer.evaluate = evaluate_one_pass  # type: ignore[method-assign]
        names = {"_local_steps": "train", "_mix": "exchange", "_measure": "exchange", "_survey": "evaluate"}
        for method, name in names.items():
            setattr(run, method, during(name, getattr(run, method)))
        return phases

    def _numbers(self, task: Task) -> list[str]:
        base = "4 bits" if self.config.task.quantization else str(next(task.model.parameters()).dtype)
        autocast = ", under bfloat16 autocast" if self.config.training.precision == "bfloat16" else ""
        says = [f"numbers: base {base.removeprefix('torch.')}, adapters and optimizer float32{autocast}"]
        attention = getattr(getattr(task.model, "config", None), "_attn_implementation", None)
        fused = " (fused, as on the CPU)" if attention == "sdpa" else ""
        return says + ([f"attention: {attention}{fused}"] if attention else [])

    def _end_alike(self, run: Run) -> bool:
        """Whether all agents end a round with equal adapters: found by mixing small random ones for real."""
        algorithm, n = run.algorithm, run.engine.num_agents
        if algorithm.topology not in ("graph", "server") or algorithm.order != "adapt-combine":
            return False
        if run.schedule.period != 1 or not run.attached.uniform:
            return False
        graph = run.schedule.window(0, run.gossip_steps)
        if graph.hops and algorithm.relay is not None:
            return False
        with real_tensors():
            draw, one = torch.Generator().manual_seed(0), torch.ones(n)
            start = torch.randn(1 if self.config.start == "common" else n, 1, 3, generator=draw).expand(n, 1, 3)
            before = Adapter({"x": start}, {"x": torch.zeros(n, 3, 1)}, {"x": one}, {"y": torch.zeros(n, 2)})
            state, trained = algorithm.init(before), before.tensors(algorithm.trains(1))
            moved = {k: t + torch.randn(t.shape, generator=draw) for k, t in trained.items()}
            adapter = before.with_tensors(moved)
            message = algorithm.message(adapter, state, 1)
            everybody = list(range(n))
            inbox = Inbox.from_weights(message, graph.weights, everybody, everybody)
            after = algorithm.combine(adapter, state, inbox, 1)[0]
            return all(bool((t == t[:1]).all()) for t in after.tensors().values())

    def _training(self, here: int) -> TrainingConfig:
        training = self.config.training
        if training.agents_per_pass != "auto":
            return training
        if here > 1:
            self.assumptions.append(
                f"agents per pass: auto tries up to all {here} agents at once, which is what is planned; "
                "training.agents_per_pass bounds it"
            )
        return training.model_copy(update={"agents_per_pass": here})

    def _shards(self, task: Task, data: Data) -> partition.Partition:
        config = self.config
        if data.labels_known or config.training.epochs is not None:
            return partition.parse(config.partition, task.labels, config.agents, config.seed)
        return partition.iid(task.labels, config.agents, config.seed)

    def _watch(self, task: Task) -> list[int]:
        """Takes batches into the dry run, and notes what every forward pass of the loss leaves for the backward."""
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

        task.train_batch = outside(train_batch)  # type: ignore[method-assign, assignment]
        task.test_batch = outside(test_batch)  # type: ignore[method-assign, assignment]
        task.losses = watched  # type: ignore[method-assign]
        return kept

    def _bytes_per_round(self, run: Run) -> float:
        period = run.schedule.period
        if period is None:
            rounds = min(8, run.rounds)
            self.assumptions.append(f"bytes: mean of {rounds} rounds of a random schedule")
        else:
            rounds = min(math.lcm(period, run.gossip_steps) // run.gossip_steps, run.rounds)
        for number in range(2, rounds + 1):
            run._mix(number)
        return run._bytes_sent / rounds

    def _parts(self, run: Run, weights: int, kept: int, train: Phase) -> tuple[Part, ...]:
        here = len(run.engine.agents)
        adapter = run.adapter
        moments = [t for m in run.trainer.moments.values() for t in (m.first, m.second, m.steps)]
        own = {
            "adapters": [*adapter.tensors().values(), *adapter.scale.values()],
            "adapters, working copy": list(adapter.tensors().values()),
            "gradients": list(adapter.tensors(run.algorithm.trains(1)).values()),
            f"optimizer state ({run.training.optimizer})": moments,
            f"state of {run.algorithm.name}": list(run.state.values()),
        }
        parts = [Part("base model", weights)]
        for name, tensors in own.items():
            size = sum(t.numel() * t.element_size() for t in tensors)
            parts.append(Part(name, size, size // here))
        parts.append(Part("activations kept for the backward pass", kept))
        parts.append(Part("temporary, at the highest", train.peak - sum(p.bytes for p in parts)))
        return tuple(parts)


# The task, with a model of shapes


@dataclass
class Data:
    """What a planned task knows about its data."""

    labels_known: bool
    num_test_known: bool
    assumptions: list[str] = field(default_factory=list)


def planned_task(config: RunConfig, sizes: DataSizes) -> tuple[Task, Data]:
    """The task of `config` with a model whose weights are not loaded, and batches of the largest size.

    Local data are read, for their labels and lengths; of others only the sizes count.
    """
    named = config.task
    with tasks.loading_by(shapes_of):
        if named.name in _ASSUMED and not (named.data and Path(named.data).expanduser().exists()):
            return _assumed_task(config, sizes)
        if sizes.sequence_length is not None and named.name in ("sequence-classification", "causal-lm"):
            named = named.model_copy(update={"max_length": sizes.sequence_length})
        task = tasks.make(named)
    return task, Data(True, True, _largest_batches(task))


def _largest_batches(task: Task) -> list[str]:
    """Makes every batch of token sequences one of the longest; says how long."""
    if isinstance(task, SequenceClassification):
        lengths = task._train["input_ids"].lengths
    elif isinstance(task, CausalTask):
        lengths = task._train.tokens.lengths
        if isinstance(task, AnswerScoring):
            lengths = lengths.reshape(-1, len(task.classes)).max(1)
    else:
        return []
    order = np.argsort(-lengths, kind="stable")
    train_batch, test_batch = task.train_batch, task.test_batch
    count = task.num_test

    def longest_and_one_shortest(indices: np.ndarray) -> Batch:
        chosen = order[: len(indices)].copy()
        chosen[1:][-1:] = order[-1]  # so that there is padding, and a mask, where lengths differ
        return train_batch(chosen)

    task.train_batch = longest_and_one_shortest  # type: ignore[method-assign]
    # Test examples are in the order of their lengths.
    task.test_batch = lambda indices: test_batch(np.arange(count - len(indices), count))  # type: ignore[method-assign]
    longest, middle = int(lengths.max()), int(np.median(lengths))
    return [f"sequence length: batches of the longest training examples, up to {longest} tokens (median {middle})"]


def _assumed_task(config: RunConfig, sizes: DataSizes) -> tuple[Task, Data]:
    """The task on data of which only the sizes are known."""
    named = config.task
    known = DATASETS.get((named.data or "", named.subset), (None, None, None))
    if known[0] is not None:
        known = (known[0], _kept(known[1], named.max_train), _kept(known[2], named.max_test))
    needs_classes = named.name != "causal-lm" or bool(named.answers)
    classes = sizes.num_classes or len(named.classes) or len(named.answers) or known[0] or (0 if needs_classes else 1)
    if not classes:
        raise UserError(f"num_classes: {named.data} is not here to count them; give --num-classes.")
    train, test = sizes.num_train or known[1], sizes.num_test or known[2]
    if train is None and config.training.epochs is not None:
        raise UserError(
            f"num_train: with training.epochs the steps depend on the number of training examples, and {named.data} "
            "is not here to count them; give --num-train."
        )
    data = Data(False, test is not None)
    data.assumptions.append(
        f"data: {named.data} is not read; {classes} classes, "
        + (f"{train} training examples in equal classes, " if train else "")
        + (f"{test} test examples" if test else "number of test examples not known")
    )
    train = train or max(2 * classes, config.agents * config.training.batch_size)
    task, says = _ASSUMED[named.name](named, sizes, classes, train, test or named.eval_batch_size)
    data.assumptions += says
    train_batch = task.train_batch
    task.train_batch = lambda indices: train_batch(np.arange(len(indices)) % train)  # type: ignore[method-assign]
    return task, data


def _kept(count: int, limit: float | None) -> int:
    """Of `count` examples, what a limit, or a share below 1, leaves."""
    if limit is None:
        return count
    return min(count, int(limit)) if limit >= 1 else math.ceil(limit * count)


def _sequences(count: int, length: int, padded: bool, answers: int = 1) -> Ragged:
    """`count` sequences of `length` tokens, in the memory of one; `padded`: every second example has one less."""
    shorter = np.arange(count) // answers % 2 if padded and length > 2 else np.zeros(count, np.int64)
    offsets = np.concatenate([[0], np.cumsum(length - shorter)])
    return Ragged(np.broadcast_to(np.int32(1), (int(offsets[-1]),)), offsets)


def _length(config: TaskConfig, sizes: DataSizes, model: Any) -> tuple[int, str]:
    """The sequence length to plan with, and where it comes from."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, length in (("sequence_length", sizes.sequence_length), ("task.max_length", config.max_length)):
        if length is not None and length > (limit or length):
            raise UserError(f"{name}: {length} is more than the model's limit of {limit}.")
    if sizes.sequence_length is not None:
        return sizes.sequence_length, "as given"
    if config.max_length is not None:
        return config.max_length, "task.max_length"
    if limit is None:
        raise UserError("sequence_length: the model states no limit; give --sequence-length.")
    return limit, "the model's limit; --sequence-length gives another"


def _sequence_classification(
    config: TaskConfig, sizes: DataSizes, classes: int, train: int, test: int
) -> tuple[Task, list[str]]:
    model, new = tasks.pretrained_model(config, AutoModelForSequenceClassification, num_labels=classes)
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        text_config.pad_token_id = 0
    length, source = _length(config, sizes, model)
    task = SequenceClassification(
        model,
        {"input_ids": _sequences(train, length, padded=True)},
        np.arange(train) % classes,
        {"input_ids": _sequences(test, length, padded=True)},
        np.arange(test) % classes,
        [str(c) for c in range(classes)],
        heads=heads(model, new),
    )
    return task, [f"sequence length: {length} tokens, padded ({source})"]


def _causal_lm(config: TaskConfig, sizes: DataSizes, classes: int, train: int, test: int) -> tuple[Task, list[str]]:
    model, _ = tasks.pretrained_model(config, AutoModelForCausalLM)
    length, source = _length(config, sizes, model)
    kind = "packed" if config.packing else "padded"
    says = [f"sequence length: {length} tokens, {kind} ({source})"]
    labels = np.arange(train) % classes
    if config.answers:
        says.append("answers: one token after the prompt")
        tokens = [_sequences(n * classes, length, True, classes) for n in (train, test)]
        scored = [Sequences(one, one.lengths - 1) for one in tokens]
        names = [str(c) for c in range(classes)]
        return AnswerScoring(model, scored[0], labels, scored[1], np.arange(test) % classes, names), says
    says.append("targets: every token")
    padded = not config.packing
    whole = [Sequences(_sequences(n, length, padded), np.ones(n, np.int64)) for n in (train, test)]
    return LanguageModeling(model, whole[0], labels, whole[1]), says


def _image_text(config: TaskConfig, sizes: DataSizes, classes: int, train: int, test: int) -> tuple[Task, list[str]]:
    model, _ = tasks.pretrained_model(config, AutoModel)
    vision, limit = model.config.vision_config, model.config.text_config.max_position_embeddings
    templates = config.templates or TEMPLATES
    words = max(len(re.findall(r"\w+|[^\w\s]", template.replace("{}", ""))) for template in templates)
    padded = "siglip" in model.config.model_type
    length = min(limit, sizes.sequence_length or (limit if padded else words + NAME_TOKENS + 2))

    def tokenizer(texts: Any, **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [1] * length}
        return {"input_ids": torch.ones(len(texts), length, dtype=torch.long)}

    def images(indices: np.ndarray) -> Tensor:
        return torch.zeros(len(indices), vision.num_channels, vision.image_size, vision.image_size)

    prompts = [[template.format(c) for template in templates] for c in range(classes)]
    task = ImageText(model, tokenizer, prompts, images, np.arange(train) % classes, images, np.arange(test) % classes)
    says = [
        f"images: {vision.image_size} x {vision.image_size} pixels",
        f"prompts: {classes} classes x {len(templates)} templates of {length} tokens",
    ]
    return task, says


NAME_TOKENS = 6
"""Tokens that the longest class name is assumed to take in a prompt."""

_ASSUMED = {
    "image-text": _image_text,
    "sequence-classification": _sequence_classification,
    "causal-lm": _causal_lm,
}


# Models without weights


def shapes_of(config: TaskConfig, kind: Any, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """`tasks.pretrained_model` on the meta device: the shapes of `config.model` from its config.json.

    What lies outside the pretrained body (a classification head) counts as new.
    """
    options = {k: v for k, v in options.items() if k != "ignore_mismatched_sizes"}
    with torch.device("meta"):
        model = kind.from_config(_architecture(config, options), dtype=getattr(torch, config.dtype))
    if config.quantization == "4bit":
        _quantize(model)
    if config.gradient_checkpointing:
        tasks.checkpoint_layers(model)
    body = getattr(model, "base_model_prefix", "")
    inside = body and hasattr(model, body)
    new = [name for name, _ in model.named_parameters() if inside and not name.startswith(f"{body}.")]
    is_headed = kind is AutoModelForSequenceClassification
    return model.eval(), new if is_headed else []


def _architecture(config: TaskConfig, options: dict[str, Any]) -> Any:
    if config.model is None:
        raise UserError("task.model: not set; name a model of the Hugging Face Hub or a local directory.")
    path = Path(config.model).expanduser()
    if not path.is_dir() and looks_local(config.model):
        raise UserError(f"task.model: {path} does not exist.")
    name = str(path) if path.is_dir() else config.model
    built_in = ARCHITECTURES.get(config.model) if not path.is_dir() else None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=built_in is not None, **options)
    except (OSError, ValueError) as error:
        if built_in is not None:
            facts = {k: v for k, v in built_in.items() if k != "model_type"}
            return AutoConfig.for_model(built_in["model_type"], **facts, **options)
        reason = " ".join(str(error).split())[:200]
        if path.is_dir():
            raise UserError(f"task.model: {path} has no config.json that can be read: {reason}") from error
        raise UserError(
            f"task.model: the config.json of {config.model!r} is not in the cache and cannot be fetched. Where there "
            f"is a network, run `hf download {config.model} config.json --local-dir DIR`, bring DIR here and set "
            "task.model to it."
        ) from error


class FourBit(nn.Linear):
    """The shapes of a linear layer in 4 bits: its weight is unpacked for every use, and never kept."""

    BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
    """Of a weight in NF4 with double quantization: 4 bits, and 8 bits for 64 of them, and 32 for 256 of those."""

    @property
    def stored_bytes(self) -> dict[str, int]:
        """What parameters take that are not stored as they look."""
        return {"weight": math.ceil(self.weight.numel() * self.BYTES)}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Unpacked.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ torch.empty_like(weight).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ torch.empty_like(weight), None


def _quantize(model: nn.Module) -> None:
    """Linear layers become 4-bit ones, but for heads, as `tasks` loads them; bfloat16 computes."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", *HEADS):
            with torch.device("meta"):
                layer = FourBit(module.in_features, module.out_features, module.bias is not None, dtype=torch.bfloat16)
            model.set_submodule(name, layer)


def real_tensors() -> Any:
    """Inside, tensors are real also within a dry run."""
    return _disable_current_modes()

"""What is to be run? The configuration: typed, frozen, pure data, no heavy imports.

A run is one algorithm on one graph, partition and seed. A comparison is the product of several of each over
one base run. Both are read from YAML, written back with every value, and overridden field by field on the
command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from decaf_lora import kinds
from decaf_lora.errors import UserError
from decaf_lora.frozen import Frozen
from decaf_lora.threats import AttackersConfig, PrivacyConfig
from decaf_lora.validation import OWN as OWN
from decaf_lora.validation import checked
from decaf_lora.validation import explain as explain
from decaf_lora.validation import fields as fields
from decaf_lora.validation import flat as flat
from decaf_lora.yaml_file import read_yaml, write_yaml

MOST_EXCHANGES = 10_000
"""Exchanges that a round may have."""


class Section(Frozen):
    """A section whose `name` may mean a kind of the user's or of an installed package, which has options of its own.

    In YAML and on the command line the kind's own options stand among the others. Here they lie apart, in `own`:
    only the code that loads the kind can check them.
    """

    name: str
    own: dict[str, Any] = Field(default_factory=dict)
    described: ClassVar[frozenset[str]]
    """Names of the kinds of this package, whose options are all fields of the section."""

    @classmethod
    def has_own(cls, names: Iterable[Any]) -> bool:
        """Whether one of `names` may take options that the section does not have."""
        return any(str(name).strip().lower().replace("_", "-") not in cls.described for name in names)

    @classmethod
    def apart(cls, values: Any, names: Iterable[Any]) -> Any:
        """`values` with the fields that the section does not have moved to `own`, if one of `names` may take them."""
        if not isinstance(values, dict) or not cls.has_own(names):
            return values
        known = {key: value for key, value in values.items() if key in cls.model_fields}
        rest = {str(key): value for key, value in values.items() if key not in cls.model_fields}
        return {**known, OWN: {**known.get(OWN, {}), **rest}}

    @model_validator(mode="before")
    @classmethod
    def _own_apart(cls, values: Any) -> Any:
        return cls.apart(values, [values["name"]] if isinstance(values, dict) and "name" in values else [])

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = handler(self)
        return {**{key: value for key, value in values.items() if key != OWN}, **values.get(OWN, {})}


class TaskConfig(Section):
    """What is learnt: model, data, loss and score. A task refuses options that it does not use."""

    described = frozenset({"digits", "image-text", "sequence-classification", "causal-lm"})

    name: str = "digits"
    """`digits`, `image-text`, `sequence-classification`, `causal-lm`, or `module:function` /
    `file.py:function` that returns a `decaf_lora.tasks.Task` of your own."""
    model: str | None = None
    """A model on the Hugging Face Hub, or a local directory."""
    data: str | None = None
    """A data set on the Hub, or a local folder (also of images), parquet, CSV, TSV, Excel, JSON lines or text file."""
    file_column: str | None = None
    """For a folder `data` with one file for each site: the name of a column to add, which holds the name of each
    row's file. A file called `test` is the test set. `partition: files:DIR` sets this field."""
    subset: str | None = None
    """Subset (configuration) of the data set, or sheet of an Excel file."""
    delimiter: str | None = None
    """Separator of the columns of a CSV file: one character, or `tab`. Unset: detected from the file."""
    quoting: Literal["standard", "none"] | None = None
    """Quotes in a CSV file: `standard` encloses fields in them, `none` reads them as ordinary characters. Unset:
    detected from the file."""
    encoding: str | None = None
    """Encoding of text files, such as `cp1252`. Unset: UTF-8, or the encoding that makes sense of the file."""
    train_split: str = "train"
    """Split to train on; slices such as `train[:10%]` work."""
    test_split: str | None = None
    """Split to score on. Unset: `test`."""
    test_share: float | None = Field(None, gt=0, lt=1)
    """Share of the training split to hold out as the test set, class by class; takes the place of `test_split`."""
    max_train: int | float | None = None
    """Largest number of training examples to keep or, below 1, the share to keep. The mix of classes stays the same."""
    max_test: int | float | None = None
    """Largest number of test examples to keep or, below 1, the share to keep. The mix of classes stays the same."""
    data_seed: int = Field(0, ge=0)
    """Seed that draws the held-out share and the kept examples. All runs of a comparison use the same one."""
    text_column: str = "text"
    """Column of the text."""
    text_pair_column: str | None = None
    """Column of the second text of a pair."""
    image_column: str = "image"
    """Column of the image: a file, its bytes, or its path."""
    label_column: str | None = None
    """Column of the label. Unset: `label`. Language modelling uses the label only to split data among agents."""
    prompt_column: str | None = None
    """causal-lm: column of the prompt, if `templates` is not set."""
    answer_column: str | None = None
    """causal-lm: column of the answer to learn (instruction tuning)."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers. Unset: the names in the data, else the sorted labels."""
    templates: tuple[str, ...] = ()
    """image-text: prompts in which {} stands for the class name; several make an ensemble. causal-lm: one prompt in
    which {column} stands for the value of that column."""
    answers: tuple[str, ...] = ()
    """causal-lm: the answer that stands for each class, in the order of the classes (verbalised classification). The
    class with the likeliest answer is predicted."""
    length_normalized: bool = True
    """causal-lm: compare answers by their log-likelihood per token, not by its sum over tokens."""
    chat_template: bool = False
    """causal-lm: put prompt and answer into the tokenizer's chat template."""
    packing: bool = False
    """causal-lm: join texts end to end and cut them into blocks of `max_length`, instead of padding."""
    max_length: int | None = Field(None, ge=2)
    """Longest sequence in tokens. Unset: the model's own limit."""
    metric: Literal["accuracy", "f1", "macro-f1"] = "accuracy"
    """Score of a classification. `f1` is for two classes: the F1 of the `positive` one."""
    positive: str | None = None
    """The positive class of `f1`. Unset: the second class."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen base model; adapters stay float32."""
    quantization: Literal["4bit"] | None = None
    """Load the base model in 4 bits (NF4); needs a GPU and bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: saves memory, takes more time."""
    num_workers: int = Field(0, ge=0, le=1024)
    """Number of processes that preprocess texts, and of threads that preprocess images. 0: the main one does it."""
    pixel_range: tuple[float, float] | None = None
    """The two pixel values that mean black and white in images of more than 8 bits a channel. Unset: 0 and 65535 for
    whole numbers, 0 and 1 for others."""
    image_cache: float = Field(0.5, ge=0, le=10**6)
    """Memory in GiB that each split may use to keep preprocessed images. Images beyond that are decoded again for every
    batch."""
    skip_bad: bool = False
    """Leave out images that do not decode, with a warning that counts and names them. Otherwise they are an error."""
    eval_batch_size: int = Field(256, ge=1)
    """The most test examples in a forward pass, over all agents in it."""

    @field_validator("max_train", "max_test")
    @classmethod
    def _check_limit(cls, value: float | None) -> float | None:
        if value is not None and not (0 < value < 1 or (value >= 1 and isinstance(value, int))):
            raise ValueError("must be a whole number of at least 1, or a share between 0 and 1")
        return value

    @field_validator("pixel_range")
    @classmethod
    def _check_range(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError("must be two numbers, the lower one first")
        return value

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, value: str | None) -> str | None:
        if value is not None and value not in ("tab", "\\t") and (len(value) != 1 or value in '"\r\n'):
            raise ValueError("must be one character (no quote, no line break), or tab")
        return value

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if self.test_split is not None and self.test_share is not None:
            raise ValueError("test_split and test_share exclude each other; give one")
        return self


class LoraOptions(Frozen):
    """LoRA, with the names and meanings of `peft.LoraConfig`."""

    r: int = Field(2, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(2, ge=1)
    """The LoRA scaling is lora_alpha / r (or / sqrt(r) with use_rslora)."""
    ranks: tuple[int, ...] = ()
    """Rank of each agent's adapters, one number for each agent, in place of `r`. For agents whose ranks differ."""
    alphas: tuple[float, ...] = ()
    """lora_alpha of each agent, one number for each. Unset: the values that give all agents the same
    LoRA scaling."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapters."""
    target_modules: str | list[str] | None = None
    """Layers to adapt: their names, a regular expression, or `all-linear`. Unset: the task's default."""
    exclude_modules: str | list[str] | None = None
    """Layers to leave out."""
    modules_to_save: list[str] | None = None
    """Modules to train in full, such as a classifier head. They are averaged
    with the same mixing weights as the adapters."""
    use_rslora: bool = False
    """Scale by 1 / sqrt(r) instead of 1 / r."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Ranks of layers that differ from `r`, by name or regular expression."""
    alpha_pattern: dict[str, int] = Field(default_factory=dict)
    """Alphas of layers that differ from `lora_alpha`, by name or regular expression."""
    layers_to_transform: list[int] | None = None
    """Indices of the blocks to adapt. Unset: all."""
    fan_in_fan_out: bool = False
    """Whether layers store their weight transposed. GPT-2's Conv1D sets this by itself."""
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """Distribution that A is drawn from at the start; B starts at 0."""

    @model_validator(mode="after")
    def _check(self) -> LoraOptions:
        if any(r < 1 for r in self.ranks):
            raise ValueError("ranks must be at least 1")
        if any(a <= 0 for a in self.alphas):
            raise ValueError("alphas must be above 0")
        return self


class AlgorithmConfig(Section):
    """What agents send and how they combine what they receive. Unset options take the algorithm's own default."""

    described = frozenset(
        {"local", "dlora", "dlora-fa", "decaf", "decaf-tracked", "alternating", "fedsa", "core", "fedavg", "fedprox"}
        | {"fedadam", "scaffold", "flexlora", "centralized"}
    )

    name: str = "decaf"
    """On a graph: dlora, dlora_fa, decaf, decaf_tracked, alternating, fedsa, core. With a server: fedavg, fedprox,
    fedadam, scaffold, flexlora. Without exchange: local, centralized. Or `file.py:function`. See docs/methods.md."""
    gauge: str | None = None
    """decaf, flexlora: the gauge, that is, how the singular values of a product BA are shared between B and A:
    balanced, orthonormal, anchored, balanced-rotated, orthonormal-rotated, or rotated (the default rotated one)."""
    order: Literal["adapt-combine", "combine-adapt"] | None = None
    """All on a graph but alternating: train before the exchange (adapt-combine) or after it (combine-adapt)."""
    moments: Literal["keep", "reset", "transport"] | None = None
    """What happens to Adam's moments after an exchange. dlora, dlora_fa, decaf, fedsa, core: keep or reset. decaf:
    also transport, which rotates the moments together with the factors."""
    reference: Literal["average", "own"] | None = None
    """decaf: the factors that rotated gauges rotate the new factors towards: the average of the neighbours' factors,
    or the agent's own."""
    relay_rank: int | None = Field(None, ge=1)
    """decaf: the rank to which stacked products are cut between the exchanges of one round (gossip_steps above 1).
    Unset: they are forwarded whole."""
    tracking: bool | None = None
    """dlora, dlora_fa, decaf, fedsa, core: gradient tracking, which corrects the drift of the local steps towards an
    agent's own data. Twice the bytes. `decaf_tracked` is decaf with tracking."""
    tracking_gamma: float | None = Field(None, gt=0, le=1)
    """Gradient tracking: the share of each update that a correction takes on. 1 is plain tracking; less damps it."""
    truncation_feedback: float | None = Field(None, gt=0, le=1)
    """decaf: keep what a truncation cuts off, at rank r, and add it, times this factor, before the next truncation. 1
    forgets nothing. Unset: off."""
    quasi_global: float | None = Field(None, ge=0, lt=1)
    """dlora, dlora_fa, decaf, fedsa, core: quasi-global momentum. After each exchange, point the optimizer's momentum
    along the change of the averaged model. The value is the decay over rounds: 0 uses the last round only, 0.9 a long
    average. No extra bytes. Unset: off."""
    messages: Literal["full", "int8"] | None = None
    """All on a graph: send numbers as they are (full), or as int8 with error feedback, a quarter of the bytes."""
    interval: int | Literal["auto"] | None = None
    """alternating: rounds until the other factor's turn; auto takes it from the graph, 1 / sqrt(1 - sigma_2)."""
    mixes: Literal["trained", "both"] | None = None
    """alternating: send the factor that is trained, or both factors."""
    proximal: float | None = Field(None, ge=0)
    """fedprox: the weight of the term that holds agents near the server's model."""
    server_learning_rate: float | None = Field(None, gt=0)
    """fedadam: the size of the server's step. Tune it together with training.learning_rate."""
    server_momentum: float | None = Field(None, ge=0, lt=1)
    """fedadam: the decay of the server's first moment, beta_1."""
    server_beta_2: float | None = Field(None, ge=0, lt=1)
    """fedadam: the decay of the server's second moment."""
    server_epsilon: float | None = Field(None, gt=0)
    """fedadam: the mean change below which the server's steps get shorter, tau."""
    transforms: tuple[str, ...] = ()
    """Transforms to lay over an algorithm on a graph: personal_head, outer_momentum:0.9, proximal:0.01, or your own
    or an installed package's, such as `mine.py:noise:scale=0.1`."""

    def options(self) -> dict[str, Any]:
        """The options that were set, by name."""
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v not in (None, (), [])}


class TrainingConfig(Frozen):
    """The local steps between two exchanges."""

    steps: int = Field(5, ge=1)
    """Optimizer steps of every agent in a round."""
    epochs: float | None = Field(None, gt=0, le=10**6)
    """Passes over an agent's own shard in a round, in place of `steps`. Agents with unequal shards then take unequal
    numbers of steps."""
    batch_size: int = Field(16, ge=1)
    """Number of examples of one agent in one step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    learning_rate: float | Literal["auto"] = 5e-3
    """Peak learning rate. auto: one is chosen first, on a held-out share of the training examples (docs/tune.md)."""
    head_rate_ratio: float = Field(1.0, gt=0, le=10**6)
    """Learning rate of modules that are trained in full, such as a classification head, in multiples of
    `learning_rate`. A new head with many classes wants 16 or so (docs/methods.md)."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay: decoupled for AdamW, added to the gradient for SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate decays over the whole run."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of a linear or cosine schedule."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the run in which the learning rate rises linearly from 0."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of a gradient. Each agent's gradient is clipped by its own norm. Unset: no clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: the forward and the backward pass run under autocast. Adapters and optimizer stay float32."""
    agents_per_pass: int | Literal["auto"] = "auto"
    """Number of agents whose batches go through the model together. auto: times a few numbers first, in pairs, and
    takes the fastest; a run of fewer than 50 steps takes as many as make 128 examples."""

    @field_validator("learning_rate")
    @classmethod
    def _check_rate(cls, value: float | Literal["auto"]) -> float | Literal["auto"]:
        if value != "auto" and value <= 0:
            raise ValueError("must be above 0, or auto")
        return value

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if isinstance(self.agents_per_pass, int) and self.agents_per_pass < 1:
            raise ValueError("agents_per_pass must be at least 1, or auto")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self

    @property
    def peak(self) -> float:
        """`learning_rate` as a number; UserError while it is still to be chosen."""
        if self.learning_rate == "auto":
            raise UserError(
                "training.learning_rate: auto is chosen by `decaf run` and `decaf compare`, in one process; here give "
                "a number, which `decaf tune` finds."
            )
        return self.learning_rate


_Model = TypeVar("_Model", bound=BaseModel)

_FILES = re.compile(r"(?:(?:shots|up[-_]to):\d+/)?files:(.+)")


class RunConfig(Frozen):
    """One run: one algorithm on one graph, partition and seed."""

    task: TaskConfig = TaskConfig()
    lora: LoraOptions = LoraOptions()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    training: TrainingConfig = TrainingConfig()
    attackers: AttackersConfig = AttackersConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    agents: int = Field(10, ge=1, le=100_000)
    """Number of agents."""
    graph: str = "ring"
    """Who talks to whom: ring, complete, star, line, torus:2x5, bipartite:8+2, erdos-renyi:0.4 ..., a file, or
    `file.py:function`; `decaf graph --help` lists them."""
    gossip_steps: int | Literal["period"] = 1
    """Number of exchanges in a round. Where the graph is a schedule, each exchange takes its next graph, and `period`
    makes as many exchanges as the schedule has graphs: an exact schedule (base:3, one-peer-hypercube) has then averaged
    as the complete graph does."""
    partition: str = "dirichlet:0.1"
    """Which examples each agent holds: iid, shots:K, up-to:K, dirichlet:ALPHA, by-class, column:NAME, files:DIR,
    indices:FILE, shots:K/dirichlet:ALPHA, or `file.py:function`."""
    start: Literal["common", "independent"] = "common"
    """Whether all agents start with the same random A (common), or each with its own (independent)."""
    init_adapters: tuple[str, ...] = ()
    """PEFT directories of the adapters to start from, of any rank. Give one for each agent (`fresh`: this agent has
    none), or one for all, in which {agent} stands for the agent's number. An agent takes the rank of its adapter,
    unless `lora.ranks` gives another."""
    rounds: int = Field(30, ge=1)
    """Number of rounds. A round is the local steps and the exchange."""
    seed: int = Field(0, ge=0)
    """Seed of the partition, the start, the batches and random graphs."""
    test: Literal["all", "own", "both", "alike"] = "all"
    """Which test examples score an agent: all, those of its own site (own), or both. `own` and `both` need a partition
    by column or files, and test examples that have this column. `alike`: all, and beside them test examples of the
    classes that the agent holds, in the shares in which it holds them; for personal models (docs/methods.md)."""
    validation_share: float | None = Field(None, gt=0, lt=1)
    """Hold out this share of every agent's training examples, and score on these in place of the test set. `decaf tune`
    does it by itself. Unset: no share."""
    baseline: tuple[Literal["alone", "pooled"], ...] = ()
    """What to train as well, to see whether training together has helped: `alone`, every agent on its own data with as
    many steps from the same start; `pooled`, one model on everybody's data, in simulation only."""
    baseline_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the baselines. Unset: `training.learning_rate`."""
    setting: str | None = Field(None, min_length=1, max_length=100)
    """Name of the run in tables and figures. Unset: the algorithm's."""
    evaluate_every: int = Field(5, ge=1)
    """Number of rounds from one evaluation on the test set to the next. The last round is always evaluated."""
    measure_every: int = Field(1, ge=1)
    """Number of rounds from one measurement of consensus distance, interference and truncation tail to the next. The
    last round is always measured. A measurement brings all agents' adapters together in one process."""
    checkpoint_every: int = Field(10, ge=1)
    """Number of rounds from one checkpoint to the next."""
    device: str = "auto"
    """Device to compute on: cpu, cuda, cuda:1, or auto (a GPU if there is one)."""

    @model_validator(mode="before")
    @classmethod
    def _files_are_the_data(cls, values: Any) -> Any:
        """Sets `task.data` where the partition is `files:DIR`: the files that split the data are also the data."""
        named = values.get("partition") if isinstance(values, dict) else None
        match = _FILES.fullmatch(named.strip()) if isinstance(named, str) else None
        if match is None:
            return values
        task = values.get("task", {})
        given = task if isinstance(task, dict) else task.model_dump()
        wanted = {"data": match[1], "file_column": "site"}
        for field, value in wanted.items():
            if given.get(field) not in (None, value):
                raise ValueError(f"{named} sets task.{field} to {value}, but it is {given[field]}; leave it out")
        return {**values, "task": {**given, **wanted}}

    @model_validator(mode="after")
    def _counts_every_look(self) -> RunConfig:
        if self.privacy.on and self.training.learning_rate == "auto":
            raise ValueError(
                "training.learning_rate auto looks at the examples many times, which privacy.epsilon does not count; "
                "give a number"
            )
        return self

    @field_validator("graph", "partition", mode="before")
    @classmethod
    def _with_options(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads a name with options that is given as a mapping, {name: ..., option: value}."""
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError("give a name, or a mapping with the field `name` and options")
        return kinds.joined(value["name"], {k: v for k, v in value.items() if k != "name"}, str(info.field_name))

    @field_validator("baseline", mode="before")
    @classmethod
    def _one_baseline(cls, value: Any) -> Any:
        """Reads one name as a list of one, and drops repetitions."""
        given = (value,) if isinstance(value, str) else value
        return tuple(dict.fromkeys(map(str, given))) if isinstance(given, list | tuple) else given

    @field_validator("gossip_steps")
    @classmethod
    def _check_gossip(cls, value: int | Literal["period"]) -> int | Literal["period"]:
        if value != "period" and value < 1:
            raise ValueError("must be at least 1, or period")
        if value != "period" and value > MOST_EXCHANGES:
            raise ValueError(f"must be at most {MOST_EXCHANGES}, or period")
        return value


class CompareConfig(RunConfig):
    """Several algorithms, graphs, partitions and seeds over one base run."""

    algorithms: tuple[str, ...] = ("local", "dlora", "dlora_fa", "decaf", "fedavg", "centralized")
    """Algorithms to compare. An option `algorithm.*` goes to the algorithms that take it."""
    graphs: tuple[str, ...] = ()
    """Graphs to compare. Unset: the graph of the base run alone."""
    partitions: tuple[str, ...] = ()
    """Partitions to compare. Unset: the partition of the base run alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run. Tables show mean and standard deviation over them."""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """Learning rates of algorithms, by name, that differ from `training.learning_rate`."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Further rows, by name: the fields in which each differs from the base run (docs/report.md)."""

    @model_validator(mode="before")
    @classmethod
    def _own_apart(cls, values: Any) -> Any:
        """Moves options to `own` where any of the algorithms that are compared may take them."""
        if not isinstance(values, dict) or not isinstance(values.get("algorithms"), list | tuple):
            return values
        return {**values, "algorithm": AlgorithmConfig.apart(values.get("algorithm", {}), values["algorithms"])}


def load(kind: type[RunConfig], path: Path) -> RunConfig:
    """A configuration of `kind` from a YAML file; UserError names the field, and the nearest known one."""
    values = read_yaml(path, "config")
    if not isinstance(values, dict):
        raise UserError(f"config: {path} must hold a mapping of fields to values.")
    return build(kind, values)


def build(kind: type[_Model], values: dict[str, Any]) -> _Model:
    """A configuration of `kind` from plain values; UserError as `checked` raises it."""
    return checked(kind, values)


def dump(config: BaseModel) -> str:
    """The configuration as YAML, every field with its value."""
    return write_yaml(config.model_dump(mode="json"))


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """Fields in which two configurations differ, as `field: ours -> theirs`."""
    a, b = flat(ours), flat(theirs)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k)]

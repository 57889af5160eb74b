"""How does a person say what to run? The typed, frozen configuration; pure data, no heavy imports.

A run is one algorithm on one graph, partition and seed. A comparison is the product of several of each over
one base run. Both are read from YAML, written back with every value, and overridden field by field on the
command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from decaf_lora import kinds
from decaf_lora.errors import UserError, nearest
from decaf_lora.frozen import Frozen
from decaf_lora.yaml_file import read_yaml, write_yaml

MOST_EXCHANGES = 10_000
"""Exchanges that a round may have."""
OWN = "own"
"""The field of a section that holds the options of a kind which is not of this package."""


class Section(Frozen):
    """A section whose `name` may be the user's own kind, or an installed package's, with options of its own.

    These stand among the others in YAML and on the command line; here they are apart, since only whoever loads the
    kind can check them.
    """

    name: str
    own: dict[str, Any] = Field(default_factory=dict)
    described: ClassVar[frozenset[str]]
    """The kinds whose options are all fields of the section."""

    @classmethod
    def has_own(cls, names: Iterable[Any]) -> bool:
        """Whether one of `names` may take options that the section does not have."""
        return any(str(name).strip().lower().replace("_", "-") not in cls.described for name in names)

    @classmethod
    def apart(cls, values: Any, names: Iterable[Any]) -> Any:
        """`values` with the fields that the section does not have under `own`, if one of `names` may take them."""
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
    """Read the folder `data` as a file a site, and name the file of every row in a column called so; a file called
    `test` is the test set. `partition: files:DIR` sets it."""
    subset: str | None = None
    """Subset (configuration) of the data set, or sheet of an Excel file."""
    delimiter: str | None = None
    """What separates the columns of a CSV file: one character, or `tab`; found from the file if unset."""
    quoting: Literal["standard", "none"] | None = None
    """Whether quotes in a CSV file enclose fields, or are characters like others; found from the file if unset."""
    encoding: str | None = None
    """Encoding of text files, such as `cp1252`; UTF-8, or the one that makes sense, if unset."""
    train_split: str = "train"
    """Split to learn from; slices such as `train[:10%]` work."""
    test_split: str | None = None
    """Split to score on; `test` if unset."""
    test_share: float | None = Field(None, gt=0, lt=1)
    """Hold this share of the training split out as test set, class by class, instead of `test_split`."""
    max_train: int | float | None = None
    """Keep at most so many training examples, or (below 1) this share, with the class mix of all."""
    max_test: int | float | None = None
    """Keep at most so many test examples, or (below 1) this share, with the class mix of all."""
    data_seed: int = Field(0, ge=0)
    """Draws the held-out share and the kept examples; the same for all seeds of a comparison."""
    text_column: str = "text"
    """Column of the text."""
    text_pair_column: str | None = None
    """Column of the second text of a pair."""
    image_column: str = "image"
    """Column of the image: a file, its bytes, or its path."""
    label_column: str | None = None
    """Column of the label; `label` if unset. Language modelling uses it only to split data among agents."""
    prompt_column: str | None = None
    """causal-lm: column of the prompt, where `templates` is not set."""
    answer_column: str | None = None
    """causal-lm: column of the answer to learn (instruction tuning)."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; the data's own, or the sorted labels, if unset."""
    templates: tuple[str, ...] = ()
    """image-text: prompts with {} for the class name, several for an ensemble; causal-lm: one prompt with
    {column} for each field."""
    answers: tuple[str, ...] = ()
    """causal-lm: the answer to score for each class, in the order of the classes (verbalised classification)."""
    length_normalized: bool = True
    """causal-lm: compare answers by log-likelihood per token, not by its sum."""
    chat_template: bool = False
    """causal-lm: put prompt and answer into the tokenizer's chat template."""
    packing: bool = False
    """causal-lm: join texts end to end and cut them into blocks of `max_length`, instead of padding."""
    max_length: int | None = Field(None, ge=2)
    """Longest sequence in tokens; the model's own limit if unset."""
    metric: Literal["accuracy", "f1", "macro-f1"] = "accuracy"
    """Score of a classification; `f1` is of the `positive` one of two classes."""
    positive: str | None = None
    """The positive class of `f1`; the second one if unset."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen base; adapters stay float32."""
    quantization: Literal["4bit"] | None = None
    """Load the base in 4 bits (NF4); needs a GPU and bitsandbytes."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    num_workers: int = Field(0, ge=0, le=1024)
    """Processes that preprocess texts, and threads that preprocess images; 0 uses the main one."""
    pixel_range: tuple[float, float] | None = None
    """Values that are black and white in images of more than 8 bits a channel; 0 65535 for whole numbers, 0 1 for
    others, if unset."""
    image_cache: float = Field(0.5, ge=0, le=10**6)
    """GiB of preprocessed images that each split may keep in memory; others are decoded whenever they are asked for."""
    skip_bad: bool = False
    """Leave out images that do not decode (they are counted and named) instead of refusing them."""
    eval_batch_size: int = Field(256, ge=1)
    """Test examples of one agent in one forward pass."""

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
    """LoRA, with the names and meanings of `peft.LoraConfig`; unset targets take the task's own."""

    r: int = Field(2, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = Field(2, ge=1)
    """The LoRA scaling is lora_alpha / r (or / sqrt(r) with use_rslora)."""
    ranks: tuple[int, ...] = ()
    """Rank of each agent's adapters in place of `r`, one number an agent, where they differ."""
    alphas: tuple[float, ...] = ()
    """lora_alpha of each agent; if unset, what gives agents of other ranks the same LoRA scaling."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapters."""
    target_modules: str | list[str] | None = None
    """Names of the layers, a regular expression, or `all-linear`; the task's default if unset."""
    exclude_modules: str | list[str] | None = None
    """Layers to leave out."""
    modules_to_save: list[str] | None = None
    """Modules to train fully and to mix with the same weights, such as a classifier head."""
    use_rslora: bool = False
    """Scale by 1 / sqrt(r) instead of 1 / r."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Ranks of layers that differ from `r`, by name or regular expression."""
    alpha_pattern: dict[str, int] = Field(default_factory=dict)
    """Alphas of layers that differ from `lora_alpha`."""
    layers_to_transform: list[int] | None = None
    """Indices of the blocks to adapt; all if unset."""
    fan_in_fan_out: bool = False
    """For layers that store their weight transposed (GPT-2's Conv1D sets it by itself)."""
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """How A is drawn; B starts at 0."""

    @model_validator(mode="after")
    def _check(self) -> LoraOptions:
        if any(r < 1 for r in self.ranks):
            raise ValueError("ranks must be at least 1")
        if any(a <= 0 for a in self.alphas):
            raise ValueError("alphas must be above 0")
        return self


class AlgorithmConfig(Section):
    """What agents send and how they combine it. Unset options take the algorithm's own default."""

    described = frozenset({"local", "dlora", "dlora-fa", "decaf", "decaf-tracked", "fedavg", "centralized"})

    name: str = "decaf"
    """local, dlora, dlora_fa, decaf, decaf_tracked, fedavg, centralized, or `file.py:function`."""
    gauge: str | None = None
    """decaf: how the singular values are split: balanced, orthonormal, anchored, balanced-rotated,
    orthonormal-rotated, or rotated for the default rotated one."""
    order: Literal["adapt-combine", "combine-adapt"] | None = None
    """dlora, dlora_fa, decaf: local steps before or after mixing."""
    moments: Literal["keep", "reset", "transport"] | None = None
    """What becomes of Adam's moments after mixing: keep or reset (dlora, dlora_fa, decaf), or transport, which turns
    them along with the factors (decaf)."""
    reference: Literal["average", "own"] | None = None
    """decaf: the frame that rotated gauges turn to."""
    relay_rank: int | None = Field(None, ge=1)
    """decaf: with several exchanges in a round (gossip_steps), the rank to which stacked products are cut between
    them; unset forwards them whole."""
    tracking: bool | None = None
    """dlora, dlora_fa, decaf: correct the drift of the local steps by gradient tracking, at twice the bytes;
    `decaf_tracked` is decaf with it."""
    tracking_gamma: float | None = Field(None, gt=0, le=1)
    """How far a correction moves at each update: 1 is plain gradient tracking, less damps it."""
    truncation_feedback: float | None = Field(None, gt=0, le=1)
    """decaf: keep what a truncation cuts, at rank r, and add it times this to the next mix; 1 forgets nothing."""
    quasi_global: float | None = Field(None, ge=0, lt=1)
    """dlora, dlora_fa, decaf: after mixing, turn the momentum to where the network went (quasi-global momentum): 0 in
    the last round, above 0 in all rounds, each counting this much of the next. Sends nothing more."""
    messages: Literal["full", "int8"] | None = None
    """dlora, dlora_fa, decaf: send numbers as they are, or as int8 with error feedback, at a quarter of the bytes."""

    transforms: tuple[str, ...] = ()
    """More transforms to lay over it, of your own or an installed package: `mine.py:noise:scale=0.1`."""

    def options(self) -> dict[str, Any]:
        """The options that were set."""
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v not in (None, (), [])}


class TrainingConfig(Frozen):
    """The local steps between two exchanges."""

    steps: int = Field(5, ge=1)
    """Optimizer steps of every agent in a round."""
    epochs: float | None = Field(None, gt=0, le=10**6)
    """Passes over an agent's own shard in a round, instead of `steps`; agents then take unequal steps."""
    batch_size: int = Field(16, ge=1)
    """Examples of one agent in one step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    learning_rate: float = Field(5e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled for AdamW, added to the gradient for SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """SGD's momentum."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Decay of the learning rate over the whole run."""
    final_learning_rate: float = Field(0.0, ge=0)
    """Where linear and cosine end."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of the run in which the learning rate rises linearly from 0."""
    clip_norm: float | None = Field(None, gt=0)
    """Every agent's own gradient norm is clipped to this."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs forward and backward under autocast; adapters and optimizer stay float32."""
    agents_per_pass: int | Literal["auto"] = "auto"
    """Agents whose batches go through the model together; auto takes the fastest of a short calibration."""

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if isinstance(self.agents_per_pass, int) and self.agents_per_pass < 1:
            raise ValueError("agents_per_pass must be at least 1, or auto")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        return self


_FILES = re.compile(r"(?:(?:shots|up[-_]to):\d+/)?files:(.+)")


class RunConfig(Frozen):
    """One run: one algorithm on one graph, partition and seed."""

    task: TaskConfig = TaskConfig()
    lora: LoraOptions = LoraOptions()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    training: TrainingConfig = TrainingConfig()
    agents: int = Field(10, ge=1, le=100_000)
    """Number of agents."""
    graph: str = "ring"
    """Who talks to whom: ring, complete, star, line, torus:2x5, bipartite:8+2, erdos-renyi:0.4 ..., a file, or
    `file.py:function`; `decaf graph --help` lists them."""
    gossip_steps: int | Literal["period"] = 1
    """Exchanges in a round, each on the next graph of a schedule; `period` takes a whole period of it, after
    which an exact schedule (base:3, one-peer-hypercube) has averaged as the complete graph does."""
    partition: str = "dirichlet:0.1"
    """Who holds what: iid, shots:K, up-to:K, dirichlet:ALPHA, by-class, column:NAME, files:DIR, indices:FILE,
    shots:K/dirichlet:ALPHA, or `file.py:function`."""
    start: Literal["common", "independent"] = "common"
    """Whether all agents draw the same A at the start."""
    init_adapters: tuple[str, ...] = ()
    """PEFT directories to start from instead, of any rank: one for each agent (`fresh` for an agent without), or one
    for all, in which {agent} stands for the agent's number. An agent takes the rank of its adapter, unless
    `lora.ranks` says another."""
    rounds: int = Field(30, ge=1)
    """Rounds of local steps and exchange."""
    seed: int = Field(0, ge=0)
    """Seeds the partition, the start, the batches and random graphs."""
    test: Literal["all", "own", "both"] = "all"
    """Score each agent on all test examples, on those of its own site, or on both. Own ones need a partition by
    column or files, and test examples that have this column."""
    evaluate_every: int = Field(5, ge=1)
    """Rounds between evaluations on the test set; the last round is always evaluated."""
    measure_every: int = Field(1, ge=1)
    """Rounds between measurements of consensus distance, interference and truncation tail; the last round is always
    measured. Every one compares all agents' adapters in one process."""
    checkpoint_every: int = Field(10, ge=1)
    """Rounds between checkpoints."""
    device: str = "auto"
    """cpu, cuda, cuda:1, or auto."""

    @model_validator(mode="before")
    @classmethod
    def _files_are_the_data(cls, values: Any) -> Any:
        """`files:DIR` splits by the files of DIR, which are then the data, too."""
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

    @field_validator("graph", "partition", mode="before")
    @classmethod
    def _with_options(cls, value: Any, info: ValidationInfo) -> Any:
        """A name with its options as a mapping, {name: ..., option: value}."""
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError("give a name, or a mapping with the field `name` and options")
        return kinds.joined(value["name"], {k: v for k, v in value.items() if k != "name"}, str(info.field_name))

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
    """Algorithms to compare; `algorithm.*` options go to those that take them."""
    graphs: tuple[str, ...] = ()
    """Graphs to compare; the base run's if empty."""
    partitions: tuple[str, ...] = ()
    """Partitions to compare; the base run's if empty."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, all shown as mean and standard deviation."""
    learning_rates: dict[str, float] = Field(default_factory=dict)
    """Each algorithm's own learning rate, where it differs from `training.learning_rate`."""

    @model_validator(mode="before")
    @classmethod
    def _own_apart(cls, values: Any) -> Any:
        """Options of one's own may belong to any of the algorithms that are compared."""
        if not isinstance(values, dict) or not isinstance(values.get("algorithms"), list | tuple):
            return values
        return {**values, "algorithm": AlgorithmConfig.apart(values.get("algorithm", {}), values["algorithms"])}


def load(kind: type[RunConfig], path: Path) -> RunConfig:
    """A configuration of `kind` from a YAML file; UserError names the field, and the nearest known one."""
    values = read_yaml(path, "config")
    if not isinstance(values, dict):
        raise UserError(f"config: {path} must hold a mapping of fields to values.")
    return build(kind, values)


def build(kind: type[RunConfig], values: dict[str, Any]) -> RunConfig:
    """A configuration from plain values, with errors as one line."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(kind, error)) from error


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first fault of a validation as `field: what is wrong, what to do`."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"]) or "config"
    if fault["type"] == "extra_forbidden":
        close = nearest(where, fields(kind))
        return f"{where}: unknown field." + (f" Did you mean {close[0]}?" if close else "")
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    shown = ""
    if isinstance(given, str | int | float | bool | None) and abs(given if isinstance(given, int) else 0) < 10**30:
        shown = f" (got {given!r})" if len(repr(given)) < 80 else f" (got {repr(given)[:80]} ...)"
    if fault["type"] == "string_type" and isinstance(given, int | float):
        shown += "; write it in quotes"
    return f"{where}: {message[0].lower()}{message[1:]}{shown}."


def fields(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all fields of a configuration."""
    names = []
    for name, field in kind.model_fields.items():
        if name == OWN:
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += fields(field.annotation, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def dump(config: BaseModel) -> str:
    """The configuration as YAML, every field with its value."""
    return write_yaml(config.model_dump(mode="json"))


def flat(config: BaseModel) -> dict[str, Any]:
    """Dotted name of every field -> its value, in JSON's types."""

    def walk(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        out = {}
        for key, value in values.items():
            out.update(walk(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
        return out

    return walk(config.model_dump(mode="json"), "")


def differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """Fields in which two configurations differ, as `field: ours -> theirs`."""

    a, b = flat(ours), flat(theirs)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(set(a) | set(b)) if a.get(k) != b.get(k)]

"""Which tasks are there? `make` builds the one that a configuration names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decaf_lora.config import OWN, TaskConfig
from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind, Table, call, options
from decaf_lora.tasks.base import Task


def digits(shift: bool = True) -> Task:
    """The demo task: the embedded tiny CLIP on turned and inverted handwritten digits."""
    from decaf_lora.tasks.demo.task import Digits

    return Digits(shift=shift)


def _image_text(config: TaskConfig) -> Task:
    from decaf_lora.tasks import image_text

    return image_text.make(config)


def _sequence_classification(config: TaskConfig) -> Task:
    from decaf_lora.tasks import sequence_classification

    return sequence_classification.make(config)


def _causal_lm(config: TaskConfig) -> Task:
    from decaf_lora.tasks import causal_lm

    return causal_lm.make(config)


@dataclass(frozen=True)
class TaskKind(Kind):
    """A kind of task; `build` takes the `TaskConfig`.

    Attributes:
        options: the fields of the `TaskConfig` that the task reads; None: any.
    """

    options: frozenset[str] | None = None


_ANY = {"name", "eval_batch_size"}
_PRETRAINED = _ANY | {
    *("model", "dtype", "quantization", "gradient_checkpointing"),
    *(
        "data",
        "file_column",
        "subset",
        "delimiter",
        "quoting",
        "encoding",
        "train_split",
        "test_split",
        "test_share",
        "max_train",
        "max_test",
        "data_seed",
    ),
    *("label_column", "classes", "metric", "positive", "num_workers"),
}

_BUILT_IN = {
    "digits": TaskKind(lambda config: digits(), "the demo: a tiny CLIP on turned digits", options=frozenset(_ANY)),
    "image-text": TaskKind(
        _image_text,
        "images and the names of their classes, with a CLIP",
        options=frozenset(_PRETRAINED | {"image_column", "image_cache", "pixel_range", "templates", "skip_bad"}),
    ),
    "sequence-classification": TaskKind(
        _sequence_classification,
        "texts or pairs of texts and their classes",
        options=frozenset(_PRETRAINED | {"text_column", "text_pair_column", "max_length"}),
    ),
    "causal-lm": TaskKind(
        _causal_lm,
        "texts, or prompts and answers, with a language model",
        options=frozenset(
            _PRETRAINED
            | {"text_column", "prompt_column", "answer_column", "templates", "answers", "length_normalized"}
            | {"chat_template", "packing", "max_length"}
        ),
    ),
}


def _own(function: Callable[..., Any], name: str) -> TaskKind:
    """The kind of a user's function. Parameters without a default that are not set get the `TaskConfig`."""
    required = [option.name for option in options(function).values() if option.default is inspect.Parameter.empty]

    def build(config: TaskConfig) -> Task:
        supplied = {parameter: config for parameter in required if parameter not in config.own}
        if not supplied:
            refuse_unused(config, frozenset(_ANY), name)
        task = call(function, name, "", "task", supplied, config.own)
        if not isinstance(task, Task):
            raise UserError(f"task: {name} returned {type(task).__name__}, not a decaf_lora.tasks.Task.")
        return task

    return TaskKind(build, "a task of your own")


KINDS: Table[TaskKind] = Table("task", "decaf_lora.tasks", _BUILT_IN, _own)
"""The tasks by name."""


def make(config: TaskConfig) -> Task:
    """The task that the configuration names: one of `KINDS`, or what a user's function returns (docs/own-task.md).

    A user's function gets its options. A parameter without a default that is no option gets the `TaskConfig`.

    Raises:
        UserError: the name is unknown, an option is set that the task does not use, or the task cannot be made.
    """
    name, kind, argument = KINDS.find(config.name)
    if argument:
        raise UserError(f"task: {name} takes no argument; write {name} instead of {config.name}.")
    if kind.options is not None:
        refuse_unused(config, kind.options, name)
    return kind.build(config)


def files_state(config: TaskConfig) -> str:
    """A short text that changes whenever a local file of the task changes: data, model, or the user's own code.

    A process that keeps a task for its next run compares this text.
    """
    source = config.name.rpartition(":")[0]
    if not (config.data or config.model or source):
        return ""
    from decaf_lora.data.content import state

    return state([name for name in (config.data, config.model, source) if name])


def refuse_unused(config: TaskConfig, used: frozenset[str], user: str) -> None:
    """Raises UserError if an option is set that is not among `used`, those that the task called `user` reads."""
    for field, info in TaskConfig.model_fields.items():
        if field not in used and field != OWN and getattr(config, field) != info.default:
            raise UserError(f"task.{field}: {user} does not use it; leave it out.")

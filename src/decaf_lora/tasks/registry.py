"""Which tasks are there? `make` builds the one that a configuration names."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError, unknown
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


class BuiltIn(NamedTuple):
    """A task of this package: how it is made, and the options that it reads."""

    make: Callable[[TaskConfig], Task]
    options: frozenset[str]


_ANY = {"name", "eval_batch_size"}
_PRETRAINED = _ANY | {
    *("model", "dtype", "quantization", "gradient_checkpointing"),
    *("data", "subset", "train_split", "test_split", "test_share", "max_train", "max_test", "data_seed"),
    *("label_column", "classes", "metric", "positive", "num_workers"),
}

BUILT_IN: dict[str, BuiltIn] = {
    "digits": BuiltIn(lambda config: digits(), frozenset(_ANY)),
    "image-text": BuiltIn(
        _image_text, frozenset(_PRETRAINED | {"image_column", "image_cache", "templates", "skip_bad"})
    ),
    "sequence-classification": BuiltIn(
        _sequence_classification, frozenset(_PRETRAINED | {"text_column", "text_pair_column", "max_length"})
    ),
    "causal-lm": BuiltIn(
        _causal_lm,
        frozenset(
            _PRETRAINED
            | {"text_column", "prompt_column", "answer_column", "templates", "answers", "length_normalized"}
            | {"chat_template", "packing", "max_length"}
        ),
    ),
}


def make(config: TaskConfig) -> Task:
    """The task named by the configuration: a built-in one, `module:function` or `file.py:function`.

    A function of your own is called without arguments or, if it requires one, with the `TaskConfig`.
    """
    if config.name in BUILT_IN:
        built_in = BUILT_IN[config.name]
        refuse_unused(config, built_in.options, config.name)
        return built_in.make(config)
    if ":" in config.name:
        factory = _user_factory(config.name)
        parameters = inspect.signature(factory).parameters.values()
        takes_config = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)
        if not takes_config:
            refuse_unused(config, frozenset(_ANY), config.name)
        task = factory(config) if takes_config else factory()
        if not isinstance(task, Task):
            raise UserError(f"task: {config.name} returned {type(task).__name__}, not a decaf_lora.tasks.Task.")
        return task
    raise unknown("task", config.name, BUILT_IN)


def refuse_unused(config: TaskConfig, used: frozenset[str], user: str) -> None:
    """UserError for an option that was set but that `user` does not read."""
    for field, info in TaskConfig.model_fields.items():
        if field not in used and getattr(config, field) != info.default:
            raise UserError(f"task.{field}: {user} does not use it; leave it out.")


def _user_factory(name: str) -> Callable[..., Any]:
    source, _, function = name.rpartition(":")
    if source.endswith(".py"):
        path = Path(source).resolve()
        if not path.exists():
            raise UserError(f"task: {path} does not exist.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            raise UserError(f"task: cannot import {source!r} ({error}); is it on PYTHONPATH?") from error
    if not hasattr(module, function):
        raise UserError(f"task: {source} has no function {function!r}.")
    return getattr(module, function)

"""Which task does a plan run? Its model has no weights; its data are local ones, or have assumed sizes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from decaf_lora import tasks
from decaf_lora.config import RunConfig, TaskConfig
from decaf_lora.data import Ragged
from decaf_lora.errors import UserError
from decaf_lora.plan.costs import DataSizes
from decaf_lora.plan.dry_run import replace_methods
from decaf_lora.plan.shapes import shapes_of
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.causal_lm import AnswerScoring, CausalTask, LanguageModeling
from decaf_lora.tasks.image_text import TEMPLATES, ImageText
from decaf_lora.tasks.sequence_classification import SequenceClassification, heads
from decaf_lora.tasks.sequences import Sequences

DATASETS: dict[tuple[str, str | None], tuple[int, int, int]] = {
    ("dpdl-benchmark/oxford_flowers102", None): (102, 7169, 1020),
    ("./ucf101-middle-frames", None): (101, 9537, 3783),
    ("ethz/food101", None): (101, 75750, 25250),
    ("aps/super_glue", "wic"): (2, 5428, 638),
    ("aps/super_glue", "boolq"): (2, 9427, 3270),
}
"""(data, subset) of the paper's recipes -> classes, training examples, test examples."""


@dataclass
class KnownData:
    """What a plan knows of the data of its task: whether labels and test set are known, and what was assumed."""

    labels_known: bool
    num_test_known: bool
    assumptions: list[str] = field(default_factory=list)


def planned_task(config: RunConfig, sizes: DataSizes) -> tuple[Task, KnownData]:
    """The task of `config` with a model whose weights are not loaded, and batches of the largest size.

    Local data are read for their labels and lengths. Other data are not read: their sizes are enough.

    Args:
        config: the run to plan.
        sizes: sizes of the data that take the place of known or assumed ones.

    Raises:
        UserError: the shapes of the model, or a size that the plan needs, cannot be known.
    """
    named = config.task
    with tasks.loading_by(shapes_of):
        if named.name in _ASSUMED and not (named.data and Path(named.data).expanduser().exists()):
            return _assumed_task(config, sizes)
        if sizes.sequence_length is not None and named.name in ("sequence-classification", "causal-lm"):
            named = named.model_copy(update={"max_length": sizes.sequence_length})
        task = tasks.make(named)
    return task, KnownData(True, True, _largest_batches(task))


def _largest_batches(task: Task) -> list[str]:
    """Makes every batch of token sequences one of the longest examples; returns a line that says how long they are."""
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
        chosen = np.resize(order, len(indices))  # again from the longest where a batch asks for more than there are
        chosen[1:][-1:] = order[-1]  # so that there is padding, and a mask, where lengths differ
        return train_batch(chosen)

    def last_ones(indices: np.ndarray) -> Batch:  # test examples are in the order of their lengths
        return test_batch(np.arange(count - len(indices), count))

    replace_methods(task, train_batch=longest_and_one_shortest, test_batch=last_ones)
    longest, middle = int(lengths.max()), int(np.median(lengths))
    return [f"sequence length: batches of the longest training examples, up to {longest} tokens (median {middle})"]


def _assumed_task(config: RunConfig, sizes: DataSizes) -> tuple[Task, KnownData]:
    """The task of `config` on made-up data of the sizes that are given or known."""
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
    data = KnownData(False, test is not None)
    data.assumptions.append(
        f"data: {named.data} is not read; {classes} classes, "
        + (f"{train} training examples in equal classes, " if train else "")
        + (f"{test} test examples" if test else "number of test examples not known")
    )
    train = train or max(2 * classes, config.agents * config.training.batch_size)
    task, says = _ASSUMED[named.name](named, sizes, classes, train, test or named.eval_batch_size)
    data.assumptions += says
    train_batch = task.train_batch
    replace_methods(task, train_batch=lambda indices: train_batch(np.arange(len(indices)) % train))
    return task, data


def _kept(count: int, limit: float | None) -> int:
    """How many of `count` examples `limit` keeps: a number, or below 1 a share."""
    if limit is None:
        return count
    return min(count, int(limit)) if limit >= 1 else math.ceil(limit * count)


def _sequences(count: int, length: int, padded: bool, answers: int = 1) -> Ragged:
    """`count` sequences of `length` tokens that share one token's memory.

    With `padded` every second example has one token less, so that batches need padding. `answers` sequences in a row
    belong to one example.
    """
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
"""Assumed number of tokens of the longest class name in a prompt."""

_ASSUMED = {
    "image-text": _image_text,
    "sequence-classification": _sequence_classification,
    "causal-lm": _causal_lm,
}

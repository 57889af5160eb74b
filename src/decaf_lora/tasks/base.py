"""The contract of a task: model + data + loss + score.

A task is one object. Give it a frozen model, one label per training example (what a partition splits on), a
way to make batches of training and test examples by index, a loss and a score. Batches carry the examples
of k agents, agent after agent, on the leading axis k b of every tensor, so a task is written once for one
agent or many. docs/own-task.md builds one from a plain torch module and a list of tensors.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from decaf_lora.errors import UserError, unknown

Batch = dict[str, Tensor]


class Task(ABC):
    """Model, data, loss and score of what the agents learn together."""

    name: str = "task"
    model: nn.Module
    """The foundation model; it is frozen and stays shared."""
    labels: np.ndarray
    """(num_train,) the label of every training example: what a partition splits on."""
    num_test: int
    """Number of test examples."""
    score_name: str = "accuracy"
    """What `score` returns; higher is better unless `lower_is_better`."""
    lower_is_better: bool = False
    classes: Sequence[str] = ()
    """Names of the classes in the order of their numbers, where there are any."""
    content: str = ""
    """A hash of the examples; a run is resumed only on the same. "" compares labels and counts only."""
    interface: Mapping[str, Any] = MappingProxyType({})
    """How examples are put to the model: what whoever uses the trained model must know, in JSON's types.

    Known to exports: `labels` (class names in the order of the model's outputs, or of the prompts), `templates`,
    `answers`, `max_length` (tokens), `pad_token`, `processor` (whether images go in)."""

    tables: Mapping[str, Any] = MappingProxyType({})
    """"train" and "test" -> the `datasets.Dataset` of the examples, in their order, where there is one."""

    def column(self, name: str, split: Literal["train", "test"] = "train") -> np.ndarray:
        """(num_train,) or (num_test,) values of a column of the data, for partitions that split by one.

        Raises:
            UserError: the task has no columns, or none of this name.
        """
        if split not in self.tables:
            raise UserError(
                f"partition: the task {self.name} has no columns, so none called {name!r}; write a function that "
                "returns the shards (docs/own-partition.md)."
            )
        table = self.tables[split]
        if name not in table.column_names:
            raise unknown("partition: column", name, [n for n in table.column_names if ":" not in n])
        feature, values = table.features[name], table.select_columns([name])[name][:]
        if hasattr(feature, "int2str"):  # classes are stored as numbers
            values = [None if value is None else feature.int2str(value) for value in values]
        return np.array(values, dtype=object if any(value is None for value in values) else None)

    def default_lora(self) -> LoraConfig:
        """The LoRA configuration to use when the user gives none; PEFT's defaults for known architectures."""
        return LoraConfig()

    def on_attach(self, sites: list[str]) -> None:  # noqa: B027 - an optional hook
        """Called once with the names of the adapted layers and of the modules that are trained in full, before any
        batch: a place to set up caches of what no agent changes."""

    @abstractmethod
    def train_batch(self, indices: np.ndarray) -> Batch:
        """The training examples `indices` (m,) as tensors with leading axis m."""

    @abstractmethod
    def test_batch(self, indices: np.ndarray) -> Batch:
        """The test examples `indices` (m,) as tensors with leading axis m."""

    @abstractmethod
    def losses(self, batch: Batch, agents: int) -> Tensor:
        """(agents,) mean loss of every agent on its share of `batch` (leading axis agents * b)."""

    @abstractmethod
    def statistics(self, batch: Batch, agents: int) -> Tensor:
        """(agents, q) sums over every agent's examples from which `score` is computed, e.g. (correct, all)."""

    def score(self, statistics: Tensor) -> Tensor:
        """(agents, q) summed statistics -> (agents,) scores; by default the first over the second."""
        return statistics[:, 0] / statistics[:, 1].clamp_min(1)

    def facts(self) -> dict[str, Any]:
        """What a run rests on, as plain JSON values: a checkpoint keeps it, and a resume compares it.

        `task`, `num_train`, `num_test`, `classes` (names in the order of their numbers, or []), and `content`, a
        hash over the labels and `self.content`.
        """
        labels = np.asarray(self.labels).astype("<i8")
        digest = hashlib.sha256(f"{self.content} ".encode() + labels.tobytes())
        return {
            "task": self.name,
            "num_train": len(labels),
            "num_test": self.num_test,
            "classes": [str(name) for name in self.classes],
            "content": digest.hexdigest(),
        }

    def majority_score(self) -> float | None:
        """The score of always giving the most frequent class of the training examples; None where there is none."""
        return None

    def describe(self) -> Mapping[str, Any]:
        """Plain facts, in JSON's types: what the task is, sizes, the pretrained model, and its `interface`.

        They go into checkpoints, so that an export needs neither the data nor the code of the task.
        """
        facts = {
            "name": self.name,
            "num_train": len(self.labels),
            "num_test": self.num_test,
            "score_name": self.score_name,
            "lower_is_better": self.lower_is_better,
        }
        return {**facts, **_pretrained(self.model), **self.interface}


def _pretrained(model: nn.Module) -> dict[str, Any]:
    """Where a model of transformers came from, and how it was loaded; nothing of another model."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name:
        return {}
    path = Path(name).expanduser()
    return {
        "model": str(path.resolve()) if path.is_dir() else name,
        "revision": getattr(config, "_commit_hash", None),
        "model_class": type(model).__name__,
        "model_module": type(model).__module__,
        "dtype": str(getattr(model, "dtype", torch.float32)).removeprefix("torch."),
        "quantized": bool(getattr(model, "is_quantized", False)),
    }


def repeat_for_agents(batch: Batch, agents: int) -> Batch:
    """The same examples for every one of `agents` agents: leading axis b -> agents * b."""
    return {k: t.repeat(agents, *[1] * (t.dim() - 1)) for k, t in batch.items()}


def cross_entropy(logits: Tensor, labels: Tensor, agents: int) -> Tensor:
    """(agents,) mean cross-entropy of logits (agents * b, C) and labels (agents * b,)."""
    each = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return each.view(agents, -1).mean(1)


def accuracy_statistics(logits: Tensor, labels: Tensor, agents: int) -> Tensor:
    """(agents, 2) number of correct and of all examples."""
    correct = (logits.argmax(-1) == labels).view(agents, -1)
    return torch.stack([correct.sum(1), torch.full_like(correct[:, 0], correct.shape[1], dtype=torch.long)], 1)

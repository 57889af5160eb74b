"""The contract of a task: model + data + loss + score.

A task is one object. It has a frozen model, one label for each training example (which partitions split on), a way to
make batches of training and test examples by index, a loss and a score. A batch holds b examples of each of k agents,
agent after agent, on the leading axis (k b) of every tensor. So a task is written once for one agent or many.
docs/own-task.md builds a task from a plain torch module and a list of tensors.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from decaf_lora.errors import UserError, unknown

if TYPE_CHECKING:
    from peft import LoraConfig

Batch = dict[str, Tensor]
"""Tensors by name; the first axis of each is the examples'."""


class Task(ABC):
    """Model, data, loss and score of what the agents learn together."""

    name: str = "task"
    model: nn.Module
    """The foundation model; it is frozen, and all agents share it."""
    labels: np.ndarray
    """(num_train,) the label of every training example, which partitions split on."""
    num_test: int
    """Number of test examples."""
    test_labels: np.ndarray | None = None
    """(num_test,) the label of every test example, of the same numbers as `labels`; None if that is not known. Needed
    to score agents on test examples of the classes that they hold (`test: alike`)."""
    score_name: str = "accuracy"
    """Name of the number that `score` returns; higher is better unless `lower_is_better`."""
    lower_is_better: bool = False
    classes: Sequence[str] = ()
    """Names of the classes in the order of their numbers; empty without classes."""
    content: str = ""
    """A hash of the examples. A run goes on only with examples of the same hash. "": labels and counts are compared."""
    interface: Mapping[str, Any] = MappingProxyType({})
    """How examples are put to the model, in JSON's types: whoever uses the trained model must know this.

    Exports know the keys `labels` (class names in the order of the model's outputs, or of the prompts), `templates`,
    `answers`, `max_length` (tokens), `pad_token`, and `processor` (whether images go in); predictions also `columns`,
    `label_column` and `image_column`, the names of what was read."""

    tables: Mapping[str, Any] = MappingProxyType({})
    """"train" and "test" -> the `datasets.Dataset` of the examples, in their order; empty if there is none."""

    kept: dict[str, Tensor] | None = None
    """While agents go through a test set in several passes: a place for what depends on their adapters and not on the
    examples, which a later pass of the same agents finds again. None at any other time."""

    def keep(self, place: dict[str, Tensor] | None) -> None:
        """Sets `kept`. Called by whoever scores."""
        self.kept = place

    def column(self, name: str, split: Literal["train", "test"] = "train") -> np.ndarray:
        """The values of a column of the data, for partitions that split by one.

        Args:
            name: of the column.
            split: whose examples.

        Returns:
            (num_train,) or (num_test,), in the order of the examples. Classes are given by name.

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
        """The LoRA configuration if the user gives none. By default PEFT's own, which knows many architectures."""
        from peft import LoraConfig

        return LoraConfig()

    def on_attach(self, sites: list[str]) -> None:  # noqa: B027 - an optional hook
        """Called once, before any batch. A place to set up caches of what no agent changes.

        Args:
            sites: names of the adapted layers, and of the modules that are trained in full.
        """

    @abstractmethod
    def train_batch(self, indices: np.ndarray) -> Batch:
        """The training examples `indices` (m,) as tensors with leading axis m."""

    @abstractmethod
    def test_batch(self, indices: np.ndarray) -> Batch:
        """The test examples `indices` (m,) as tensors with leading axis m."""

    def validation_batch(self, indices: np.ndarray) -> Batch:
        """The training examples `indices` (m,) as `statistics` takes them, to score on them in place of the test set.

        By default `train_batch`. A task whose test batches hold more than its training batches overrides this.
        """
        return self.train_batch(indices)

    @abstractmethod
    def losses(self, batch: Batch, agents: int) -> Tensor:
        """The mean loss of every agent on its own examples.

        Args:
            batch: tensors with leading axis agents * b.
            agents: number of agents.

        Returns:
            (agents,), differentiable.
        """

    @abstractmethod
    def statistics(self, batch: Batch, agents: int) -> Tensor:
        """Sums over every agent's examples, from which `score` is computed.

        Args:
            batch: tensors with leading axis agents * b.
            agents: number of agents.

        Returns:
            (agents, q), for instance the numbers of correct and of all examples (q = 2).
        """

    def score(self, statistics: Tensor) -> Tensor:
        """(agents, q) summed statistics -> (agents,) scores; by default the first sum divided by the second."""
        return statistics[:, 0] / statistics[:, 1].clamp_min(1)

    def facts(self) -> dict[str, Any]:
        """What a run is made from, in JSON's types. A checkpoint keeps these facts, and a resume compares them.

        The keys are `task`, `num_train`, `num_test`, `classes` (names in the order of their numbers, or []), and
        `content`, a hash over the labels and `self.content`.
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
        """The score of always giving the most frequent class of the training examples; None without classes."""
        return None

    def show_examples(self, indices: np.ndarray) -> list[str]:
        """Training examples `indices` (m,) as the model sees them, each in words for people.

        By default the names and shapes of an example's tensors.
        """
        batch = self.train_batch(indices)
        each = ", ".join(f"{name} {' x '.join(map(str, t.shape[1:])) or 'one number'}" for name, t in batch.items())
        return [each] * len(indices)

    def example_keys(self, split: Literal["train", "test"]) -> list[Hashable]:
        """For every example of a split a key that is equal where the model is given the same, whatever the label.

        [] if the task cannot tell. `decaf check` finds with it what is in both splits, or twice with two labels.
        """
        return []

    def describe(self) -> Mapping[str, Any]:
        """What the task is, in JSON's types: its sizes, its pretrained model, and its `interface`.

        This goes into checkpoints, so that an export needs neither the data nor the code of the task.
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
    """Where a model of transformers came from, and how it was loaded; {} for another model."""
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


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {k: t.to(device) for k, t in batch.items()}


def repeat_for_agents(batch: Batch, agents: int) -> Batch:
    """Repeats the same examples for each of the agents: leading axis b -> agents * b."""
    return {k: t.repeat(agents, *[1] * (t.dim() - 1)) for k, t in batch.items()}


def cross_entropy(logits: Tensor, labels: Tensor, agents: int) -> Tensor:
    """(agents,) mean cross-entropy of logits (agents * b, C) and labels (agents * b,)."""
    each = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return each.view(agents, -1).mean(1)


def accuracy_statistics(logits: Tensor, labels: Tensor, agents: int) -> Tensor:
    """(agents, 2) numbers of correct and of all examples, from logits (agents * b, C) and labels (agents * b,)."""
    correct = (logits.argmax(-1) == labels).view(agents, -1)
    return torch.stack([correct.sum(1), torch.full_like(correct[:, 0], correct.shape[1], dtype=torch.long)], 1)

"""The contract of a task: model + data + loss + score.

A task is one object. Give it a frozen model, one label per training example (what a partition splits on), a
way to make batches of training and test examples by index, a loss and a score. Batches carry the examples
of k agents, agent after agent, on the leading axis k b of every tensor, so a task is written once for one
agent or many. docs/own-task.md builds one from a plain torch module and a list of tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

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

    def default_lora(self) -> LoraConfig:
        """The LoRA configuration to use when the user gives none; PEFT's defaults for known architectures."""
        return LoraConfig()

    def on_attach(self, sites: list[str]) -> None:  # noqa: B027 - an optional hook
        """Called once with the names of the adapted layers, before any batch: a place to set up caches."""

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

    def describe(self) -> Mapping[str, Any]:
        """Plain facts for the records: what the task is, sizes, model."""
        return {"name": self.name, "num_train": len(self.labels), "num_test": self.num_test}


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

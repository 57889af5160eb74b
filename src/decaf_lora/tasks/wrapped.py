"""What does a task do that changes one thing of another task? All the rest it leaves to that one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from decaf_lora.tasks.base import Batch, Task

if TYPE_CHECKING:
    from peft import LoraConfig


class Wrapped(Task):
    """A task that does what another does. Subclasses override what they change.

    Args:
        task: the other task.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.name, self.model, self.labels, self.num_test = task.name, task.model, task.labels, task.num_test
        self.score_name, self.lower_is_better, self.classes = task.score_name, task.lower_is_better, task.classes

    def keep(self, place: dict[str, Tensor] | None) -> None:
        self._task.keep(place)

    def default_lora(self) -> LoraConfig:
        return self._task.default_lora()

    def on_attach(self, sites: list[str]) -> None:
        self._task.on_attach(sites)

    def train_batch(self, indices: np.ndarray) -> Batch:
        return self._task.train_batch(indices)

    def test_batch(self, indices: np.ndarray) -> Batch:
        return self._task.test_batch(indices)

    def losses(self, batch: Batch, agents: int) -> Tensor:
        return self._task.losses(batch, agents)

    def statistics(self, batch: Batch, agents: int) -> Tensor:
        return self._task.statistics(batch, agents)

    def score(self, statistics: Tensor) -> Tensor:
        return self._task.score(statistics)

    def describe(self) -> Mapping[str, Any]:
        return self._task.describe()

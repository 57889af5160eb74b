"""What do agents learn that train on wrong labels? A task in which some examples appear twice: right, and wrong.

Of M training examples, number M + i is example i with the label C - 1 - c in place of c. An agent that is to learn what
is wrong trains on these numbers.
"""

from __future__ import annotations

import numpy as np

from decaf_lora.errors import UserError
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.wrapped import Wrapped


class Mislabelled(Wrapped):
    """A task with a wrong copy of every training example. Scores are those of the task.

    Args:
        task: one whose batches hold the class numbers as `labels`.

    Raises:
        UserError: the batches hold no such labels.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._size = len(task.labels)
        right = np.asarray(task.labels)
        some = np.arange(min(4, self._size))
        held = task.train_batch(some).get("labels")
        if held is None or not np.array_equal(held.cpu().numpy(), right[some]):
            raise UserError(
                f"attackers.kind: label-flip needs a task whose batches hold the class as `labels`, and {task.name} "
                "has none; use sign-flip or noise."
            )
        self._highest = int(right.max())
        self.labels = np.concatenate([right, self._highest - right])

    def wrong(self, shard: np.ndarray) -> np.ndarray:
        """The numbers (m,) of the wrong copies of the examples `shard` (m,)."""
        return np.asarray(shard) + self._size

    def train_batch(self, indices: np.ndarray) -> Batch:
        batch = self._task.train_batch(indices % self._size)
        wrong = indices >= self._size
        labels = batch["labels"].clone()
        labels[wrong] = self._highest - labels[wrong]
        return {**batch, "labels": labels}

"""How is a choice judged without the test set? By training examples that no agent trains on, each taken from its owner.

`hold_out` takes a share of every agent's shard. What is left is trained on; what was taken is scored in place of the
test set. The partition comes first: every agent keeps the kind of data that it has in a run on all of its examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from decaf_lora.data import spread
from decaf_lora.errors import UserError
from decaf_lora.partition import Own, Partition
from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.wrapped import Wrapped


class HeldOut(Wrapped):
    """A task whose test set is some of its training examples; the real test set is out of reach.

    Training examples keep their numbers, so shards of the task are shards of this one.

    Args:
        task: the task.
        examples: (m,) numbers of the training examples to score on.
    """

    def __init__(self, task: Task, examples: NDArray[np.int64]) -> None:
        super().__init__(task)
        self._examples, self.num_test = np.asarray(examples), len(examples)
        self.score_name, self.interface = f"held-out {task.score_name}", task.interface
        if task.test_labels is not None:  # else the labels of the task only split its examples, and are no classes
            self.test_labels = np.asarray(task.labels)[self._examples]
        self.content = f"{task.content}, held out of the training examples"
        if "train" in task.tables:
            self.tables = {"train": task.tables["train"]}

    def column(self, name: str, split: Literal["train", "test"] = "train") -> np.ndarray:
        values = self._task.column(name, "train")
        return values if split == "train" else values[self._examples]

    def test_batch(self, indices: np.ndarray) -> Batch:
        return self._task.validation_batch(self._examples[indices])

    def describe(self) -> Mapping[str, Any]:
        return {**self._task.describe(), "num_test": self.num_test}


def hold_out(task: Task, partition: Partition | Own, share: float, seed: int) -> tuple[HeldOut, Partition]:
    """Takes a share of every agent's examples out of its shard, to score on them in place of the test set.

    An agent gives at least one example and keeps at least one. Who has a single example keeps it. The share is spread
    over the classes of the agent's shard as evenly as their sizes allow.

    Args:
        task: the task.
        partition: the shards (n_i,) of all agents.
        share: of a shard, above 0 and below 1.
        seed: of the draw, which is made for each agent by itself.

    Returns:
        The task that scores on the examples taken, and the partition without them. Its `tests` are the examples that
        each agent gave.

    Raises:
        UserError: every agent has a single example, or this process knows the examples of one agent only.
    """
    if isinstance(partition, Own):
        raise UserError(
            "validation_share: this process knows the examples of its own agent only, so none can be held out for all; "
            "leave it out in a federation."
        )
    labels = np.asarray(task.labels)
    taken = [_taken(labels, shard, share, seed, agent) for agent, shard in enumerate(partition.shards)]
    examples = np.sort(np.concatenate(taken))
    if not examples.size:
        raise UserError(
            "validation_share: every agent has a single example, so none can be held out; use fewer agents."
        )
    kept = tuple(np.setdiff1d(shard, own) for shard, own in zip(partition.shards, taken, strict=True))
    tests = tuple(np.searchsorted(examples, np.sort(own)) for own in taken)
    return HeldOut(task, examples), replace(partition, shards=kept, tests=tests)


def _taken(labels: np.ndarray, shard: NDArray[np.int64], share: float, seed: int, agent: int) -> NDArray[np.int64]:
    """The examples of a shard to hold out."""
    count = min(max(1, round(share * len(shard))), len(shard) - 1)
    return shard[spread(labels[shard], seed, f"validation {agent}")[:count]]

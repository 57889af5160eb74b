"""How is a classification scored? Accuracy, the F1 of one of two classes, or the mean F1 of all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from decaf_lora.errors import UserError, unknown
from decaf_lora.precision import double
from decaf_lora.tasks.base import accuracy_statistics


class ClassScore:
    """The score of a classification: accuracy, the F1 of one of two classes, or the mean F1 of all.

    Args:
        metric: "accuracy", "f1" or "macro-f1".
        classes: names of the classes in the order of their numbers.
        positive: name of the class of "f1"; None: the second one.

    Raises:
        UserError: "f1" without exactly two classes, or a positive class that does not exist or is not used.
    """

    def __init__(self, metric: str, classes: Sequence[str], positive: str | None = None) -> None:
        if metric == "f1" and len(classes) != 2:
            raise UserError(f"task.metric: f1 is for two classes, there are {len(classes)}; use macro-f1.")
        if positive is not None and metric != "f1":
            raise UserError(f"task.positive: only the metric f1 uses it, not {metric}.")
        if positive is not None and positive not in classes:
            raise unknown("task.positive", positive, classes)
        self.metric, self.num_classes = metric, len(classes)
        self.positive = 1 if positive is None else list(classes).index(positive)
        self.name = {"f1": f"F1 ({classes[self.positive]})" if metric == "f1" else "", "macro-f1": "macro-F1"}.get(
            metric, metric
        )

    def majority(self, labels: np.ndarray, test_labels: Tensor) -> float:
        """The score on `test_labels` (m,) of always giving the most frequent class of `labels` (n,)."""
        counts = torch.bincount(torch.as_tensor(labels), minlength=self.num_classes)
        constant = nn.functional.one_hot(counts.argmax(), self.num_classes).expand(len(test_labels), -1)
        return float(self.score(self.statistics(constant, test_labels, 1))[0])

    def statistics(self, logits: Tensor, labels: Tensor, agents: int) -> Tensor:
        """Sums over the examples of each agent, for `score`.

        Args:
            logits: (agents * b, C).
            labels: (agents * b,).
            agents: number of agents.

        Returns:
            For accuracy (agents, 2), the numbers of correct and of all examples. For F1 (agents, 3 C), the true
            positives of each class, then the false positives, then the false negatives.
        """
        if self.metric == "accuracy":
            return accuracy_statistics(logits, labels, agents)
        told = nn.functional.one_hot(logits.argmax(-1), self.num_classes).view(agents, -1, self.num_classes)
        true = nn.functional.one_hot(labels, self.num_classes).view(agents, -1, self.num_classes)
        return torch.cat([(told * true).sum(1), (told * (1 - true)).sum(1), ((1 - told) * true).sum(1)], 1)

    def score(self, statistics: Tensor) -> Tensor:
        """(agents, q) summed statistics -> (agents,) scores. macro-F1 is over classes that occur."""
        if self.metric == "accuracy":
            return statistics[:, 0] / statistics[:, 1].clamp_min(1)
        right, false_positive, false_negative = double(statistics).chunk(3, 1)
        wrong = false_positive + false_negative
        f1 = 2 * right / (2 * right + wrong).clamp_min(1)
        if self.metric == "f1":
            return f1[:, self.positive]
        return f1.sum(1) / (right + wrong > 0).sum(1).clamp_min(1)

"""A task of the benchmark's own for any number of agents: the demo's examples, four for each agent.

`decaf run digits --task benchmarks/suite/drawn.py:make --task.agents 1000`
"""

import numpy as np
import torch

from decaf_lora.randomness import numpy_generator
from decaf_lora.tasks.base import Batch
from decaf_lora.tasks.demo.task import Digits

EACH = 4


class Drawn(Digits):
    """The demo's task on `examples` training examples that are drawn with replacement, and on the demo's test set."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self._rows = numpy_generator(0, "drawn").integers(0, len(self.labels), examples)
        self.name, self.labels = "drawn", self.labels[self._rows]
        self.content = f"{self.content}, {examples} drawn"

    def train_batch(self, indices: np.ndarray) -> Batch:
        return super().train_batch(self._rows[np.asarray(indices)])


def make(agents: int = 10) -> Drawn:
    """For so many agents."""
    torch.manual_seed(0)
    return Drawn(EACH * agents)

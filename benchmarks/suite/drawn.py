"""A task of the benchmark's own for any number of agents: the demo's examples, four for each agent.

`decaf run digits --task benchmarks/suite/drawn.py:make --task.agents 1000`
"""

import numpy as np
import torch

from decaf_lora.randomness import numpy_generator
from decaf_lora.tasks.base import Batch
from decaf_lora.tasks.demo.task import Digits

EACH, TESTS = 4, 100


class Drawn(Digits):
    """The demo's task on training examples drawn with replacement, and on the first 100 of its test examples.

    Args:
        examples: of training.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self._rows = numpy_generator(0, "drawn").integers(0, len(self.labels), examples)
        self.name, self.labels = "drawn", self.labels[self._rows]
        assert self.test_labels is not None
        self.num_test, self.test_labels = TESTS, self.test_labels[:TESTS]
        self.content = f"{self.content}, {examples} drawn, {TESTS} tests"

    def train_batch(self, indices: np.ndarray) -> Batch:
        return super().train_batch(self._rows[np.asarray(indices)])


def make(agents: int = 10) -> Drawn:
    """For so many agents."""
    torch.manual_seed(0)
    return Drawn(EACH * agents)

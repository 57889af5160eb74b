"""A task of a user's own: a plain torch module and a list of tensors. Small, exact and fast."""

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

from decaf_lora.tasks.base import Task, accuracy_statistics, cross_entropy


class TwoLayers(nn.Module):
    """x (m, d) -> logits (m, classes)."""

    def __init__(self, d: int = 12, hidden: int = 10, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(d, hidden)
        self.second = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Toy(Task):
    """Classification of random points by a random linear rule."""

    name = "toy"

    def __init__(self, seed: int = 0, examples: int = 120, tests: int = 30, extras: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = TwoLayers()
        rule = torch.randn(12, 4, generator=generator)
        x = torch.randn(examples + tests, 12, generator=generator)
        y = (x @ rule).argmax(1)
        self.x, self.y = x[:examples], y[:examples]
        self.test_x, self.test_y = x[examples:], y[examples:]
        self.labels, self.num_test = self.y.numpy(), tests
        self.extras = extras

    def default_lora(self) -> LoraConfig:
        return LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["first", "second"],
            modules_to_save=["head"] if self.extras else None,
        )

    def train_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": self.x[indices], "y": self.y[indices]}

    def test_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        return {"x": self.test_x[indices], "y": self.test_y[indices]}

    def losses(self, batch: dict[str, torch.Tensor], agents: int) -> torch.Tensor:
        return cross_entropy(self.model(batch["x"]), batch["y"], agents)

    def statistics(self, batch: dict[str, torch.Tensor], agents: int) -> torch.Tensor:
        return accuracy_statistics(self.model(batch["x"]), batch["y"], agents)


def make_toy() -> Toy:
    """For `--task tests/helpers/toy.py:make_toy`."""
    return Toy()


class Sealed(Toy):
    """The toy whose test set must not be seen."""

    def test_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        raise AssertionError("somebody has looked at the test set")


def make_sealed() -> Sealed:
    """For `--task tests/helpers/toy.py:make_sealed`."""
    return Sealed()


class Distance(Toy):
    """A task whose score is a loss."""

    score_name, lower_is_better = "cross-entropy", True

    def statistics(self, batch: dict[str, torch.Tensor], agents: int) -> torch.Tensor:
        losses = self.losses(batch, agents) * (len(batch["y"]) / agents)
        return torch.stack([losses, torch.full_like(losses, len(batch["y"]) / agents)], 1)


def make_distance() -> Distance:
    """For `--task tests/helpers/toy.py:make_distance`."""
    return Distance()

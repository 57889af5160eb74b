"""What does a plan say, and what may it have to be told? Memory by part, bytes and arithmetic of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataSizes:
    """Sizes that a plan cannot know without the data. None: taken from local data, or else assumed."""

    sequence_length: int | None = None
    """Tokens of a sequence, or of a prompt of an image-text model."""
    num_classes: int | None = None
    num_train: int | None = None
    num_test: int | None = None


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the memory of this process; `per_agent`: of one agent, where each has its own."""

    name: str
    bytes: int
    per_agent: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run costs. Memory is in bytes of tensors in this process; `parts` add up to the peak while training."""

    model: str
    agents: int
    agents_here: int
    """Number of agents in the process that holds most."""
    agents_per_pass: int
    examples_per_pass: int
    parameters: int
    trained_per_agent: int
    parts: tuple[Part, ...]
    peaks: dict[str, int]
    """Highest bytes in use during `train`, `exchange` and `evaluate`."""
    rounds: int
    steps_per_round: int
    bytes_per_round: float
    """Bytes that an agent sends in a round, mean over agents and rounds."""
    flops_per_step: float
    """FLOP of one local step, of all agents together."""
    flops_per_evaluation: float | None
    """FLOP to evaluate one model on the whole test set; None if the size of the test set is not known."""
    evaluations: int
    """Number of models, the agents' and the averaged one, that the whole run evaluates; equal models count once."""
    assumptions: tuple[str, ...]
    tflops: float | None = None
    """Throughput from which `hours` is computed, in 10^12 FLOP/s."""

    @property
    def peak(self) -> int:
        """The highest of the peaks."""
        return max(self.peaks.values())

    @property
    def bytes_sent(self) -> float:
        """Bytes that an agent sends in the whole run."""
        return self.bytes_per_round * self.rounds

    @property
    def flops(self) -> float:
        """FLOP of the whole run: training and evaluations."""
        return self.flops_per_step * self.steps_per_round * self.rounds + self.evaluations * (
            self.flops_per_evaluation or 0.0
        )

    @property
    def hours(self) -> float | None:
        """Hours that the arithmetic takes at `tflops`; None without a throughput."""
        return None if self.tflops is None else self.flops / self.tflops / 1e12 / 3600

    def as_dict(self) -> dict[str, Any]:
        """All values, those that are computed included, in JSON's types."""
        derived = {"peak": self.peak, "bytes_sent": self.bytes_sent, "flops": self.flops, "hours": self.hours}
        return {**asdict(self), **derived}

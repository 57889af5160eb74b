"""What a plan says: memory by part, bytes and arithmetic of a run; and what it may have to be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DataSizes:
    """What a plan cannot know without the data; None: from the data where they are local, else assumed."""

    sequence_length: int | None = None
    """Tokens of a sequence, or of a prompt of an image-text model."""
    num_classes: int | None = None
    num_train: int | None = None
    num_test: int | None = None


@dataclass(frozen=True)
class Part:
    """Bytes of one thing in this process, and for one agent where agents have their own."""

    name: str
    bytes: int
    per_agent: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a run costs. Bytes are of tensors in this process; `parts` add up to the training peak."""

    model: str
    agents: int
    agents_here: int
    """Agents of the (largest) process."""
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
    """What an agent sends in a round, mean over agents and rounds."""
    flops_per_step: float
    """Of all agents together."""
    flops_per_evaluation: float | None
    """Of one model on the whole test set; None where its size is not known."""
    evaluations: int
    """Of single models, the agents' and the averaged one, in the whole run; equal ones are evaluated once."""
    assumptions: tuple[str, ...]
    tflops: float | None = None
    """Throughput that `hours` is computed with, in 10^12 FLOP/s."""

    @property
    def peak(self) -> int:
        """The highest of the peaks."""
        return max(self.peaks.values())

    @property
    def bytes_sent(self) -> float:
        """What an agent sends in the whole run."""
        return self.bytes_per_round * self.rounds

    @property
    def flops(self) -> float:
        """Of the whole run: training and evaluations."""
        return self.flops_per_step * self.steps_per_round * self.rounds + self.evaluations * (
            self.flops_per_evaluation or 0.0
        )

    @property
    def hours(self) -> float | None:
        """Hours of arithmetic at `tflops`; None where no throughput is given."""
        return None if self.tflops is None else self.flops / self.tflops / 1e12 / 3600

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, derived ones included."""
        derived = {"peak": self.peak, "bytes_sent": self.bytes_sent, "flops": self.flops, "hours": self.hours}
        return {**asdict(self), **derived}

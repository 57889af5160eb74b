"""Where do agents live and how do messages travel? The contract of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from decaf_lora.adapters.adapter import Tensors
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.graphs import Graph

T = TypeVar("T")

Sizes = Mapping[str, tuple[int, Sequence[int]]]
"""Tensor of a message -> (axis, size along it of each of the N agents), where agents differ. What lies beyond an
agent's size is 0 and does not travel."""


@dataclass(frozen=True)
class Pending(Generic[T]):
    """What is on its way while the process does other things."""

    wait: Callable[[], T]
    """Returns it once it is here. To be called once; several that are under way may be waited for in any order."""


class Engine(Protocol):
    """Places the agents and moves their messages; the round itself is in run.py and the same for all.

    Where agents live in several processes, all of them call every method, in the same order.
    """

    num_agents: int
    """N, the agents of the whole run."""
    agents: list[int]
    """Numbers of the agents that this process holds, ascending."""
    is_main: bool
    """Whether this process prints and writes."""

    def start(self, message: Tensors, graph: Graph, round_: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """Starts an exchange: every agent's message (name -> (n, ...)) to its neighbours, and what they send."""

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """Bytes that an exchange of such messages moves between processes, mean over agents; None in one process."""

    def gather(self, tensors: Tensors) -> Tensors:
        """name -> (n, ...) of this process to name -> (N, ...) of all agents, in every process: for what is small."""

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """Starts the same to the main process alone: for what is large. The others get {}, once theirs has left."""

    def scatter(self, tensors: Tensors) -> Tensors:
        """name -> (N, ...) of the main process to name -> (n, ...), everybody's own agents.

        What the other processes pass is ignored.
        """

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process: so that all of them stop in the same step."""

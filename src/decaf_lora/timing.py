"""How long does each phase of a round take?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Phases = Callable[[str], AbstractContextManager[object]]
"""Name of a phase -> what to be in while it lasts."""


def unwatched(phase: str) -> AbstractContextManager[object]:
    """Does nothing."""
    return nullcontext()


class Timer:
    """Adds up the seconds of each phase: `with timer("train"): ...`.

    Args:
        device: where the work is done; of a GPU, a phase ends once its stream has done what was asked of it.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        """phase -> seconds so far."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device is not None and self.device.type == "cuda":
                # Not the whole device: what is under way need not be done.
                torch.cuda.current_stream(self.device).synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

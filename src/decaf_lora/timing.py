"""How long does each phase of a round take?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Phases = Callable[[str], AbstractContextManager[object]]
"""Name of a phase -> the context manager in which the phase runs."""


def unwatched(phase: str) -> AbstractContextManager[object]:
    """The context manager that does nothing, for `Phases`."""
    return nullcontext()


class Timer:
    """Adds up the seconds of each phase: `with timer("train"): ...`.

    Args:
        device: where the work is done. On a GPU a phase ends once the current stream has finished its work.
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
                # Not the whole device: messages under way in other streams need not be finished.
                torch.cuda.current_stream(self.device).synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

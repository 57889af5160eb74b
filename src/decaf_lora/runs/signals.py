"""How is a run asked to stop? Ctrl-C and SIGTERM end it after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def stopping(stop: Callable[[], None], launched: bool = False) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) calls `stop`, a second one interrupts at once.

    Not where a launcher passes signals on: processes then get the first one several times.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        stop()
        if not launched:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    if _stopped:  # while the task was loading
        stop()
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


_stopped = False


def note_stop(number: int, frame: Any) -> None:
    global _stopped
    _stopped = True

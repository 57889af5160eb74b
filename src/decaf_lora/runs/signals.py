"""How is a run asked to stop? Ctrl-C, SIGTERM and SIGHUP end it after the current step, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that ask (there is no SIGHUP on Windows)."""

_asked = False
"""Whether this process was asked to stop at a time when no run could be told."""


@contextlib.contextmanager
def stopping(stop: Callable[[], None], launched: bool = False) -> Iterator[None]:
    """A context in which the first signal calls `stop`, and a second Ctrl-C interrupts at once.

    Args:
        stop: asks the run to stop.
        launched: a launcher passes signals on. A process then gets the first signal several times, so a second Ctrl-C
            does not interrupt.

    A SIGHUP that the process ignores (nohup) stays ignored. In a process that ignores Ctrl-C (a worker, whose parent
    decides), a second one does not interrupt either.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        stop()
        if not launched and before.get(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {s: signal.getsignal(s) for s in STOPPING if not _ignored_hangup(s)}
    for number in before:
        signal.signal(number, handler)
    if _asked:  # a signal came while the task was loading
        stop()
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _ignored_hangup(number: int) -> bool:
    return number != signal.SIGINT and number != signal.SIGTERM and signal.getsignal(number) is signal.SIG_IGN


def asked() -> bool:
    """Whether this process was asked to stop between two runs."""
    return _asked


def ask(*_: Any) -> None:
    """Notes that this process was asked to stop, for the next run to find. Serves as a signal handler."""
    global _asked
    _asked = True

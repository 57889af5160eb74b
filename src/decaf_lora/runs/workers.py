"""How do several runs go on side by side? Processes that take one piece of work after another.

A worker that is killed, for instance because memory is short, loses only its own piece of work; a process pool of the
standard library would break as a whole. A worker gets its next piece only when it is idle, so that no piece begins
after a stop. Workers end when their parent ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from filelock import FileLock

from decaf_lora.errors import UserError
from decaf_lora.runs import build, signals

_PRELOAD = ("decaf_lora.runs.several", "decaf_lora.run", "decaf_lora.tasks", "decaf_lora.report", "peft")

GRACE = 20.0
"""Seconds that a worker whose parent is gone has to save a checkpoint."""

Work = Callable[..., Any]
"""A function of a module: (piece, tell, *arguments) -> result. `tell` hands any value to the parent."""


class Lost(NamedTuple):
    """In place of a result: the worker has died."""

    how: str


class Stopped(NamedTuple):
    """In place of a result: the piece was stopped, or not begun."""


class _Worker(NamedTuple):
    process: BaseProcess
    connection: Connection


class Workers:
    """`count` processes, started at once; a context manager that leaves none behind.

    Args:
        count: number of processes.
        threads: number of torch's threads in each process.
        hear: called with each value that the work tells. Workers' warnings are issued in this process, so that each is
            shown once for all workers.
    """

    def __init__(self, count: int, threads: int, hear: Callable[[Any], None]) -> None:
        # A server that has loaded torch once forks the workers; it computes nothing itself, so that GPUs stay free.
        self._context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            self._context.set_forkserver_preload(list(_PRELOAD))
        self._threads, self._hear, self._count = threads, hear, count
        self._workers: list[_Worker] = []
        self._busy: dict[_Worker, Any] = {}
        self._asked = self._killed = False
        self._folder = tempfile.TemporaryDirectory(prefix="decaf-")

    def __enter__(self) -> Workers:
        for _ in range(self._count):
            self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self._workers:
            worker.connection.close()  # a worker without work ends
            if kind is KeyboardInterrupt or self._killed:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._folder.cleanup()

    def run(self, work: Work, pieces: Sequence[Any], *arguments: Any) -> Iterator[tuple[Any, Any]]:
        """Does the work; yields each piece with its result, in the order in which pieces end.

        Args:
            work: the function to call in a worker.
            pieces: its first argument, one after another.
            arguments: more arguments, the same for all pieces.

        Yields:
            The piece, and its result: what `work` returned, the exception that it raised, `Lost`, or `Stopped`.
        """
        left = list(pieces)
        while left or self._busy:
            if self._killed:
                for worker in self._workers:
                    worker.process.kill()
            if self._asked or self._killed:
                yield from ((piece, Stopped()) for piece in left)
                left = []
            idle = [worker for worker in self._workers if worker not in self._busy]
            while left and idle:
                worker = idle.pop(0)
                self._busy[worker] = left[0]
                with contextlib.suppress(OSError):  # the worker has died: `_listen` finds that
                    worker.connection.send((work, left[0], arguments))
                left.pop(0)
            yield from self._listen()
            while left and len(self._workers) < min(self._count, len(left) + len(self._busy)) and not self._asked:
                self._begin()

    def stop(self) -> None:
        """Asks the runs to end after their current step; no piece begins any more. A second call kills the workers."""
        if self._asked:
            self._killed = True
        self._asked = True
        for worker in self._workers:
            with contextlib.suppress(OSError, ValueError):
                worker.process.terminate()

    def _begin(self) -> None:
        ours, theirs = self._context.Pipe()
        lock = os.path.join(self._folder.name, "loading")
        process = self._context.Process(target=_serve, args=(theirs, lock, self._threads))
        if sys.platform == "linux":
            from multiprocessing import forkserver

            # One server serves the whole program. Started below, it would hold signals back from everybody's processes.
            forkserver.ensure_running()
        with _signals_held():  # they reach a worker once it knows what to do with them
            process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))

    def _listen(self) -> Iterator[tuple[Any, Any]]:
        """Handles what the workers have sent; waits at most 0.2 s for it."""
        ready = set(wait([w.connection for w in self._workers] + [w.process.sentinel for w in self._workers], 0.2))
        for worker in list(self._workers):
            if worker.connection in ready or worker.process.sentinel in ready:
                yield from self._hear_one(worker)

    def _hear_one(self, worker: _Worker) -> Iterator[tuple[Any, Any]]:
        try:
            while worker.connection.poll():
                kind, value = worker.connection.recv()
                if kind == "result":
                    yield self._busy.pop(worker), value
                elif kind == "warning":
                    message, category = value
                    warnings.warn(message, category, stacklevel=2)
                else:
                    self._hear(value)
        except (EOFError, OSError):  # it has died
            worker.process.join()
            self._workers.remove(worker)
            worker.connection.close()
            if worker in self._busy:
                yield self._busy.pop(worker), Stopped() if self._asked else Lost(_how(worker.process.exitcode))


def _how(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its process has ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"its process was killed by {name}" + (", perhaps for want of memory" if -code == signal.SIGKILL else "")


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """A context that holds back signals that ask to stop; a process started inside begins with them held back."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker


def _serve(connection: Connection, lock: str, threads: int) -> None:
    """The main function of a worker: does the work that arrives, until the parent closes the connection."""
    # Ctrl-C reaches every process of a terminal; here the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in signals.STOPPING:
        if number != signal.SIGINT:
            signal.signal(number, signals.ask)
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOPPING)
    threading.Thread(target=_outlive_nobody, args=(lock,), daemon=True).start()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the live display may be on by then
    build._loading = FileLock(lock)
    speaking = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with speaking, contextlib.suppress(OSError):  # the parent is gone: the run is being stopped
            connection.send((kind, value))

    def warn(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        send("warning", (str(message), category))

    warnings.showwarning = warn
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            work, piece, arguments = connection.recv()
        except (EOFError, OSError):
            return
        send("result", _outcome(work, piece, lambda value: send("told", value), arguments))


def _outcome(work: Work, piece: Any, tell: Callable[[Any], None], arguments: tuple[Any, ...]) -> Any:
    from decaf_lora.runs.events import Interrupted

    if signals.asked():
        return Stopped()
    try:
        return work(piece, tell, *arguments)
    except Interrupted:
        return Stopped()
    except UserError as error:
        return type(error)(str(error))
    except Exception as error:  # a fault of the program: the parent raises it, with the place where it was
        error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
        return error


def _outlive_nobody(lock: str) -> None:
    """Ends this process soon after its parent."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    wait([parent.sentinel])
    shutil.rmtree(os.path.dirname(lock), ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)  # the run stops, with a checkpoint
    time.sleep(GRACE)
    os._exit(1)

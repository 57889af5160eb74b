"""How do the processes of one launch meet, agree, and learn of each other's failures?

All that the processes say to each other besides tensors (who is here, the configuration, errors) goes through torch's
key-value store, as JSON. A process that fails tells the others why through the store. A process that dies is noticed
by the broken connection. Either way every process ends with a `UserError`, and exactly one of them prints it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from decaf_lora.errors import UserError, listed

_T = TypeVar("_T")

MOST_SECONDS = 10**7
"""The longest time to wait. torch counts in whole milliseconds, and fails for much longer ones."""

ROLL_CALL = 3.0
"""Seconds in which the remaining processes must answer after a connection broke."""


@dataclass(frozen=True)
class Launch:
    """What the launcher (torchrun, or srun with the same variables) says about this process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    restarts: int
    """How often the launcher has started the processes again."""
    max_restarts: int
    hosts_store: bool
    """Whether the launcher itself keeps the store, which then outlives rank 0."""

    @staticmethod
    def read() -> Launch:
        """From the environment.

        Raises:
            UserError: this process was not started by a launcher, or a variable is not a number.
        """
        values = os.environ
        missing = [k for k in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not values.get(k)]
        if missing:
            raise UserError(
                f"engine: torchrun needs a launcher ({', '.join(missing)} not set); start it as "
                "`torchrun --nproc-per-node 4 -m decaf_lora run RECIPE --engine torchrun`."
            )

        def number(name: str, default: int = 0) -> int:
            try:
                return int(values.get(name, default))
            except ValueError:
                raise UserError(f"engine: the variable {name} is {values[name]!r}, not a number.") from None

        return Launch(
            rank=number("RANK"),
            world_size=number("WORLD_SIZE"),
            local_rank=number("LOCAL_RANK"),
            local_world_size=number("LOCAL_WORLD_SIZE", 1),
            address=values["MASTER_ADDR"],
            port=number("MASTER_PORT"),
            restarts=number("TORCHELASTIC_RESTART_COUNT"),
            max_restarts=number("TORCHELASTIC_MAX_RESTARTS"),
            hosts_store=values.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )


def connect(
    backend: str = "auto", device: str = "auto", timeout: float = 600.0, launch: Launch | None = None
) -> Processes:
    """Joins the processes of this launch; returns once all are there.

    Args:
        backend: auto, gloo, nccl or another one of torch.distributed. auto takes NCCL where every process has a GPU of
            its own, else gloo.
        device: auto, cpu, cuda or cuda:K. auto and cuda take the process's own GPU.
        timeout: seconds to wait for a process that does not come, or falls silent.
        launch: who is who; None: as the launcher says.

    Raises:
        UserError: no launcher, a backend that is not built in, a port in use, a process that does not come (by rank).
    """
    launch = launch or Launch.read()
    if not 0 < timeout <= MOST_SECONDS:
        raise UserError(f"timeout: {timeout:g} is not above 0 and at most {MOST_SECONDS:g}; give seconds.")
    backend = backend.lower()
    if backend != "auto" and not (backend in dist.Backend.backend_list and dist.is_backend_available(backend)):
        built_in = [b for b in dist.Backend.backend_list if b not in ("undefined", "fake") and _built_in(b)]
        raise UserError(
            f"backend: {backend!r} is not built into this torch ({torch.__version__}); "
            f"choose auto or one of: {', '.join(built_in)}."
        )
    device, backend = _place(device, backend, launch)
    store = _open_store(launch, timeout)
    processes = Processes(launch, store, device, backend, timeout)
    try:
        processes._arrive()
    except BaseException:
        processes.close()
        raise
    return processes


def _built_in(backend: str) -> bool:
    return bool(dist.is_backend_available(backend))


def _place(device: str, backend: str, launch: Launch) -> tuple[str, str]:
    """The device of this process, and the backend that moves its messages."""
    own = launch.local_world_size <= torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and (own or backend == "gloo") else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        device = f"cuda:{launch.local_rank % torch.cuda.device_count()}"
    shares = device.startswith("cuda:") and (not own or device != f"cuda:{launch.local_rank}")
    if backend == "auto":
        backend = "nccl" if device.startswith("cuda") and not shares and _built_in("nccl") else "gloo"
    if backend == "nccl" and (shares or not device.startswith("cuda")):
        raise UserError(
            f"backend: nccl needs one GPU a process; rank {launch.rank} has {device}, with {launch.local_world_size} "
            f"processes and {torch.cuda.device_count()} GPUs on this machine. Start fewer processes, or choose gloo."
        )
    return device, backend


def _open_store(launch: Launch, timeout: float) -> Store:
    where = f"{launch.address}:{launch.port}"
    hosts = launch.rank == 0 and not launch.hosts_store

    def join() -> TCPStore:
        limit = timedelta(seconds=timeout)
        return TCPStore(launch.address, launch.port, launch.world_size, hosts, limit, wait_for_workers=False)

    try:
        store = _in_time(join, timeout + 1)  # where nobody listens, TCPStore itself gives up after `timeout`
    except _SilentError:
        if not hosts and not _listens(launch.address, launch.port):  # a busy machine: TCPStore had not given up yet
            raise _unreachable(launch, where, timeout) from None
        raise UserError(
            f"port: what listens on {where} does not answer as rank 0 of this run within {timeout:g} s; is the port "
            "another program's? Choose another (torchrun --master-port, or MASTER_PORT)."
        ) from None
    except (RuntimeError, ValueError) as error:
        if hosts:
            raise UserError(
                f"port: rank 0 cannot listen on {where} ({_reason(error)}); "
                "choose another port (torchrun --master-port, or MASTER_PORT)."
            ) from error
        raise _unreachable(launch, where, timeout) from error
    return PrefixStore(f"decaf/{launch.restarts}", store)


def _unreachable(launch: Launch, where: str, timeout: float) -> UserError:
    return UserError(
        f"ranks: rank {launch.rank} cannot reach rank 0 at {where} within {timeout:g} s; is it started, and is "
        "the address right? --timeout waits longer."
    )


def _listens(address: str, port: int) -> bool:
    """Whether anybody accepts a connection there."""
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


class _SilentError(RuntimeError):
    """Nobody has answered in time."""


def _in_time(call: Callable[[], _T], seconds: float) -> _T:
    """What `call` returns or raises; `_SilentError` if it takes longer, and then its thread is left to itself."""
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    # Not a thread pool: the interpreter waits for a pool's threads before it exits.
    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(timeout=seconds)
    except FutureTimeout:
        raise _SilentError(f"no answer within {seconds:g} s") from None


class _PatientStore:
    """A store whose every call ends: at `deadline` (of `time.monotonic`), and after `patience` seconds at most.

    torch itself waits for ever where the process that keeps the store was stopped, so that the store falls silent.

    Raises:
        _SilentError: from every call once one was not answered in time.
    """

    def __init__(self, store: Store, patience: float) -> None:
        self.store, self.patience, self.deadline = store, patience, math.inf
        self._silent = False

    @contextlib.contextmanager
    def until(self, deadline: float) -> Iterator[None]:
        """Within the block no call waits beyond `deadline`; each is given a second at least."""
        before, self.deadline = self.deadline, deadline
        try:
            yield
        finally:
            self.deadline = before

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self.store.set(key, value))

    def get(self, key: str) -> bytes:
        return self._ask(lambda: self.store.get(key))

    def check(self, keys: list[str]) -> bool:
        return self._ask(lambda: self.store.check(keys))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return self._ask(lambda: self.store.multi_get(keys))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self.store.add(key, amount))

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self._ask(lambda: self.store.compare_set(key, expected, value))

    def _ask(self, call: Callable[[], _T]) -> _T:
        if self._silent:
            raise _SilentError("no answer before")
        try:
            return _in_time(call, min(self.patience, max(1.0, self.deadline - time.monotonic())))
        except _SilentError:
            self._silent = True
            raise


def _reason(error: BaseException) -> str:
    """What torch's multi-line errors say, in a few words."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rpartition("message: ")[2].strip().rstrip(".")


class Processes:
    """The processes of one launch, joined by `connect`.

    In a `with` block, an exception that leaves the block is told to the other processes, which end with it too.

    Args:
        launch: what the launcher says about this process.
        store: torch's key-value store, shared by all processes.
        device: of this process.
        backend: that moves the messages.
        timeout: seconds to wait for a process that falls silent.
    """

    def __init__(self, launch: Launch, store: Store, device: str, backend: str, timeout: float) -> None:
        self.launch, self.device, self.backend, self.timeout = launch, device, backend, timeout
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = launch.rank == 0
        self._store, self._shared, self._waits = _PatientStore(store, timeout), 0, True
        self._closed = threading.Event()
        threading.Thread(target=self._answer, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not getattr(error, "quiet", False):
            # The first process to fail prints; the others may have failed at the same moment.
            told = f"rank {self.rank}: {error or repr(error)}"
            with contextlib.suppress(RuntimeError):
                first = self._store.compare_set("failure", "", told).decode()
                if isinstance(error, UserError):
                    error.quiet = first != told
        self.close()

    def close(self) -> None:
        """Leaves; the process that keeps the store waits a moment until all others have left."""
        self._closed.set()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group()
        until = time.monotonic() + min(ROLL_CALL, self.timeout)
        with contextlib.suppress(RuntimeError), self._store.until(until):
            left = self._store.add("left", 1)
            while self.is_main and left < self.world_size and time.monotonic() < until:
                time.sleep(0.02)
                left = self._store.add("left", 0)

    def _arrive(self) -> None:
        self.share("arrival", socket.gethostname())
        backend = "gloo" if self.backend == "gloo" else f"cpu:gloo,cuda:{self.backend}"
        with self.watched():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self._store.store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.timeout),
                device_id=torch.device(self.device) if self.backend == "nccl" else None,
            )
            if self.backend != "gloo":
                torch.cuda.set_device(self.device)
                # NCCL wants all ranks in its first operation; a batch of messages may have fewer.
                dist.all_reduce(torch.zeros(1, device=self.device))

    @property
    def transport(self) -> torch.device:
        """Where tensors must lie to be sent."""
        return torch.device("cpu" if self.backend == "gloo" else self.device)

    def share(self, what: str, value: Any) -> list[Any]:
        """Exchanges a value: every process gives its own, and gets those of all.

        Args:
            what: the subject, for errors.
            value: in JSON's types.

        Returns:
            The values in the order of ranks.

        Raises:
            UserError: a process has failed, or does not answer in time; says which.
        """
        self._shared, self._waits = self._shared + 1, True
        keys = [f"{what}/{self._shared}/{rank}" for rank in range(self.world_size)]
        until, pause = time.monotonic() + self.timeout, 0.005
        try:
            with self._store.until(until):
                self._store.set(keys[self.rank], json.dumps(value))
                while not self._store.check(keys):
                    if self._store.check(["failure"]) or time.monotonic() > until:
                        raise self._missing(what, keys)
                    time.sleep(pause)
                    pause = min(2 * pause, 0.2)
                texts = self._store.multi_get(keys)
        except RuntimeError as error:
            raise self._lost(error) from error
        self._waits = False
        return [json.loads(text) for text in texts]

    def _missing(self, what: str, keys: list[str]) -> UserError:
        """The error for keys that were not written in time."""
        if self._store.check(["failure"]):
            return self._told()
        here = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        missing = [rank for rank in range(self.world_size) if rank not in here]
        doing = "arrived" if what == "arrival" else f"answered ({what})"
        error = UserError(
            f"ranks: {len(here)} of {self.world_size} {doing} within {self.timeout:g} s; missing: {_ranks(missing)}. "
            "Look for its own message, or give --timeout more seconds."
        )
        error.quiet = self.rank != here[0]
        return error

    def _told(self) -> UserError:
        """The failure that another process has told and prints; quiet here."""
        error = UserError(self._store.get("failure").decode())
        error.quiet = True
        return error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block a broken or silent connection becomes a UserError that says which ranks are gone."""
        self._waits = True
        try:
            yield
        except RuntimeError as error:  # torch's base class for errors of gloo, NCCL and the store
            raise self._lost(error) from error
        self._waits = False

    def _answer(self) -> None:
        """Answers a roll call, in a thread of its own: this process may itself be waiting for another rank."""
        with contextlib.suppress(RuntimeError):
            while not self._store.check(["roll call"]):
                if self._closed.wait(0.2):
                    return
            self._store.set(f"survivor/{self.rank}", "waits" if self._waits else "busy")

    def _lost(self, cause: RuntimeError) -> UserError:
        """The error for a lost connection, which says who is gone.

        The remaining processes answer a roll call. The first of them that was waiting for others prints the error.
        """
        kept = "What was saved is kept; go on from the last checkpoint with --resume."
        keys = [f"survivor/{rank}" for rank in range(self.world_size)]
        until = time.monotonic() + min(ROLL_CALL, self.timeout)
        try:
            with self._store.until(until):
                self._store.set("roll call", "")
                while not self._store.check(keys) and not self._store.check(["failure"]) and time.monotonic() < until:
                    time.sleep(0.05)
                if self._store.check(["failure"]):
                    return self._told()
                here = [rank for rank, key in enumerate(keys) if self._store.check([key])]
                busy = [rank for rank in here if self._store.get(keys[rank]) == b"busy"]
        except _SilentError:
            error = UserError(
                f"ranks: rank 0 of {self.world_size} did not answer within {self.timeout:g} s; --timeout waits "
                f"longer. {kept}"
            )
            error.quiet = self.rank > 1
            return error
        except RuntimeError:  # the store died with rank 0
            error = UserError(f"ranks: rank 0 is gone, and the run with it. {kept}")
            error.quiet = self.rank > 1
            return error
        if gone := [rank for rank in range(self.world_size) if rank not in here]:
            error = UserError(f"ranks: {_ranks(gone)} of {self.world_size} {_is(gone)} gone. {kept}")
        elif busy:
            error = UserError(
                f"ranks: {_ranks(busy)} of {self.world_size} did not answer within {self.timeout:g} s; "
                f"--timeout waits longer. {kept}"
            )
        else:
            error = UserError(f"ranks: the connection between them broke ({_reason(cause)}). {kept}")
        # A busy process learns of the failure later, from the store.
        error.quiet = self.rank != next((rank for rank in here if rank not in busy), self.rank)
        return error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError that any process raises within the block is raised by all of them at its end.

        So all processes end before anything is written or sent. The first process that raised it prints it.
        """
        found: UserError | None = None
        try:
            yield
        except UserError as error:
            if error.quiet:
                raise
            found = error
        messages = self.share("check", None if found is None else str(found))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if not failed:
            return
        where = "" if len(failed) == self.world_size else f" (on {_ranks(failed)} of {self.world_size})"
        failure = UserError(f"{messages[failed[0]]}{where}")
        failure.quiet = self.rank != failed[0]
        raise failure from found

    def agree(self, values: dict[str, Any], what: str) -> None:
        """Checks that every process has the same values.

        Args:
            values: field -> value in JSON's types.
            what: the subject, for errors.

        Raises:
            UserError: in every process; names every field that differs, and the ranks' values.
        """
        everybody = self.share(what, values)
        faults = []
        for key in dict.fromkeys(key for each in everybody for key in each):
            ranks: dict[str, list[int]] = {}
            for rank, each in enumerate(everybody):
                ranks.setdefault(json.dumps(each.get(key)), []).append(rank)
            if len(ranks) > 1:
                faults.append(f"{key} is " + ", ".join(f"{v} on {_ranks(r)}" for v, r in ranks.items()))
        if faults:
            error = UserError(f"{what}: the ranks disagree; {'; '.join(faults)}. Start all with the same.")
            error.quiet = not self.is_main
            raise error


def _is(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {listed(ranks, 8)}"

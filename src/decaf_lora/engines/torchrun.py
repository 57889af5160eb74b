"""Agents split over the processes of torchrun: messages go point to point, and only where an edge needs them.

Rank r of W holds a contiguous block of the N agents, the first N mod W ranks one more than the others. In an
exchange a message crosses between two ranks once, however many agents of the receiving rank listen to it; all that
goes from one rank to another in an exchange is one flat buffer, and all buffers are sent and received as one batch
(gloo between CPUs, NCCL between GPUs). What the processes say to each other besides tensors (who is here, the
configuration, errors) goes through torch's key-value store, as JSON.

Batches are posted and waited for apart, so several can be under way while the processes compute (gloo moves them in
threads of its own, NCCL in its own stream) or talk about other things. That cannot deadlock: all ranks post the same
batches and collectives in the same order. gloo matches the sends and receives of a pair of ranks first to first and
blocks nobody who has not come to wait; NCCL runs what was posted in that order on every rank, so that the oldest that
is not done has, or will have, all its partners. What lies on CPUs goes through gloo beside NCCL and does not queue
behind messages between GPUs.

A process that fails tells the others why through the store; one that dies is noticed by the broken connection.
Either way every process ends with a `UserError`, and one of them prints it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import accumulate
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from decaf_lora.algorithms.base import Inbox, Tensors
from decaf_lora.engines.base import Pending, Sizes
from decaf_lora.errors import UserError, unknown
from decaf_lora.graphs import Graph

Wire = Literal["exact", "bfloat16", "int8"]
"""How floating-point messages cross between processes: as they are, rounded to bfloat16, or as int8 with one float32
scale an agent and tensor."""

ROLL_CALL = 3.0
"""Seconds in which the processes that are left must answer after a connection broke."""


# --- the processes ------------------------------------------------------------------------------------------


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


def connect(backend: str = "auto", device: str = "auto", timeout: float = 600.0) -> Processes:
    """Joins the processes of this launch; returns once all are there.

    `backend` is auto, gloo, nccl or another one of torch.distributed; auto takes NCCL where every process has a GPU
    of its own, else gloo. `device` is auto, cpu, cuda or cuda:K; auto and cuda take the process's own GPU. `timeout`:
    seconds to wait for a process that does not come, or falls silent.

    Raises:
        UserError: no launcher, a backend that is not built in, a port in use, a process that does not come (by rank).
    """
    launch = Launch.read()
    if timeout <= 0:
        raise UserError(f"timeout: {timeout:g} is not above 0; give seconds.")
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
    try:
        store = TCPStore(
            launch.address,
            launch.port,
            launch.world_size,
            hosts,
            timedelta(seconds=timeout),
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        if hosts:
            raise UserError(
                f"port: rank 0 cannot listen on {where} ({_reason(error)}); "
                "choose another port (torchrun --master-port, or MASTER_PORT)."
            ) from error
        raise UserError(
            f"ranks: rank {launch.rank} cannot reach rank 0 at {where} within {timeout:g} s; is it started, and is "
            "the address right? --timeout waits longer."
        ) from error
    return PrefixStore(f"decaf/{launch.restarts}", store)


def _reason(error: BaseException) -> str:
    """What torch's multi-line errors say, in a few words."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rpartition("message: ")[2].strip().rstrip(".")


class Processes:
    """The processes of one launch, joined by `connect`; a context manager that says good-bye to the others.

    An exception that leaves the `with` block is told to the other processes, which then end with it too.
    """

    def __init__(self, launch: Launch, store: Store, device: str, backend: str, timeout: float) -> None:
        self.launch, self.device, self.backend, self.timeout = launch, device, backend, timeout
        self.rank, self.world_size = launch.rank, launch.world_size
        self.is_main = launch.rank == 0
        self._store, self._shared, self._waits = store, 0, True
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
        with contextlib.suppress(RuntimeError):
            left = self._store.add("left", 1)
            until = time.monotonic() + min(ROLL_CALL, self.timeout)
            while self.is_main and left < self.world_size and time.monotonic() < until:
                time.sleep(0.02)
                left = self._store.add("left", 0)

    def _arrive(self) -> None:
        self.share("arrival", socket.gethostname())
        backend = "gloo" if self.backend == "gloo" else f"cpu:gloo,cuda:{self.backend}"
        with self.watched():
            dist.init_process_group(
                backend,
                store=PrefixStore("group", self._store),
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
        """The JSON `value` of every process, in the order of ranks.

        Raises:
            UserError: a process has failed, or does not answer in time; says which.
        """
        self._shared, self._waits = self._shared + 1, True
        keys = [f"{what}/{self._shared}/{rank}" for rank in range(self.world_size)]
        until, pause = time.monotonic() + self.timeout, 0.005
        try:
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
        """The error that another process has met and prints."""
        error = UserError(self._store.get("failure").decode())
        error.quiet = True
        return error

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A broken or silent connection within becomes a UserError that says which ranks are gone."""
        self._waits = True
        try:
            yield
        except RuntimeError as error:  # torch's errors of gloo, NCCL and the store all are
            raise self._lost(error) from error
        self._waits = False

    def _answer(self) -> None:
        """Answers a roll call, in a thread: where one rank is gone, others may wait for ranks that are not."""
        with contextlib.suppress(RuntimeError):
            while not self._store.check(["roll call"]):
                if self._closed.wait(0.2):
                    return
            self._store.set(f"survivor/{self.rank}", "waits" if self._waits else "busy")

    def _lost(self, cause: RuntimeError) -> UserError:
        """Who is gone? Those who are left answer a roll call; the first who waits for others prints the result."""
        kept = "What was saved is kept; go on from the last checkpoint with --resume."
        keys = [f"survivor/{rank}" for rank in range(self.world_size)]
        until = time.monotonic() + min(ROLL_CALL, self.timeout)
        try:
            self._store.set("roll call", "")
            while not self._store.check(keys) and not self._store.check(["failure"]) and time.monotonic() < until:
                time.sleep(0.05)
            if self._store.check(["failure"]):
                return self._told()
            here = [rank for rank, key in enumerate(keys) if self._store.check([key])]
            busy = [rank for rank in here if self._store.get(keys[rank]) == b"busy"]
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
        # Who is busy learns it later, from the store.
        error.quiet = self.rank != next((rank for rank in here if rank not in busy), self.rank)
        return error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A UserError that any process meets within ends all of them, before anything is written or sent.

        One line tells it: the first process that met it prints.
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
        """Checks that every process has the same `values`.

        Raises:
            UserError: on all of them, names every field that differs and the ranks' values.
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
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


# --- rows of bytes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Column:
    """Where one tensor of an agent lies in the agent's row of bytes, and how it is written there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    written: torch.dtype
    scaled: bool
    """Whether a float32 scale stands before the numbers."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.written.itemsize + 4 * self.scaled


class _Rows:
    """Tensors name -> (k, ...) as rows of bytes (k, `size`), one an agent, and back."""

    def __init__(self, tensors: Tensors, wire: Wire = "exact") -> None:
        self.columns = []
        for name, x in tensors.items():
            rounded = wire != "exact" and x.dtype in (torch.float32, torch.float64)
            written = {"bfloat16": torch.bfloat16, "int8": torch.int8}[wire] if rounded else x.dtype
            self.columns.append(_Column(name, tuple(x.shape[1:]), x.dtype, written, rounded and wire == "int8"))
        self.size = sum(column.size for column in self.columns)

    def write(self, tensors: Tensors, device: torch.device) -> Tensor:
        """name -> (k, ...) to bytes (k, size) on `device`."""
        parts = []
        for column in self.columns:
            x = tensors[column.name]
            if column.scaled:
                # A number that is not finite makes the scale so, and with it the whole tensor: it is not hidden.
                scale = x.abs().flatten(1).amax(1).float() / 127
                parts.append(_bytes(scale.unsqueeze(1)))
                x = (x / scale.clamp_min(1e-38).view(-1, *[1] * (x.dim() - 1))).round()
            parts.append(_bytes(x.to(column.written)))
        return torch.cat(parts, 1).to(device)

    def read(self, rows: Tensor, device: torch.device) -> Tensors:
        """Bytes (k, size) to name -> (k, ...) on `device`."""
        rows, tensors, start = rows.to(device), {}, 0
        for column in self.columns:
            scale = None
            part = rows[:, start : start + column.size]
            if column.scaled:
                scale, part = _numbers(part[:, :4], torch.float32), part[:, 4:]
            x = _numbers(part, column.written).view(len(rows), *column.shape).to(column.dtype)
            if scale is not None:
                x = x * scale.view(-1, *[1] * len(column.shape)).to(column.dtype)
            tensors[column.name] = x
            start += column.size
        return tensors


def _bytes(x: Tensor) -> Tensor:
    """(k, ...) to its bytes (k, b)."""
    width = x[0].numel()
    return x.contiguous().view(len(x), width).view(torch.uint8)


def _numbers(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Some columns of bytes (k, b) to the numbers that they hold, in one row."""
    # A copy, as a view may start at any byte; `contiguous` would leave a single row where it is.
    return part.clone(memory_format=torch.contiguous_format).flatten().view(dtype)


class _Parcels:
    """Messages name -> (k, ...) of some agents as one flat buffer of bytes, and back.

    Agents of the same sizes lie together, in the order of the first; each one's row holds its own part only.
    """

    def __init__(self, message: Tensors, wire: Wire, sizes: Sizes | None) -> None:
        self.wire, self.sizes = wire, {k: v for k, v in (sizes or {}).items() if k in message}
        self.shapes = {name: t[:0] for name, t in message.items()}
        self._rows: dict[tuple[int, ...], _Rows] = {}

    def size(self, agent: int) -> int:
        """Bytes of an agent's message."""
        return self._rows_of(self._profile(agent)).size

    def write(self, message: Tensors, first: int, agents: Sequence[int], device: torch.device) -> Tensor:
        """The messages of `agents` to bytes on `device`; row 0 of `message` is that of agent `first`."""
        parts = []
        for profile, places in self._profiles(agents).items():
            chosen = [agents[place] - first for place in places]
            own = {name: t[chosen] for name, t in self._cut(message, profile).items()}
            parts.append(self._rows_of(profile).write(own, device).flatten())
        return torch.cat(parts)

    def read(self, buffer: Tensor, agents: Sequence[int], device: torch.device) -> Tensors:
        """Bytes to name -> (k, ...) on `device`."""
        if not self.sizes:
            return self._rows_of(()).read(buffer.view(len(agents), -1), device)
        message = {k: t.new_zeros(len(agents), *t.shape[1:], device=device) for k, t in self.shapes.items()}
        start = 0
        for profile, places in self._profiles(agents).items():
            rows = self._rows_of(profile)
            end = start + len(places) * rows.size
            own = rows.read(buffer[start:end].view(len(places), -1), device)
            for name, part in self._cut(message, profile).items():
                part[places] = own[name]
            start = end
        return message

    def _profile(self, agent: int) -> tuple[int, ...]:
        return tuple(sizes[agent] for _, sizes in self.sizes.values())

    def _profiles(self, agents: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
        """Sizes of every tensor that has some -> places in `agents` of those who have them."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, agent in enumerate(agents):
            places.setdefault(self._profile(agent), []).append(place)
        return places

    def _cut(self, message: Tensors, profile: tuple[int, ...]) -> Tensors:
        """Views of the part that agents with this profile have."""
        own = {k: message[k].narrow(axis, 0, n) for (k, (axis, _)), n in zip(self.sizes.items(), profile, strict=True)}
        return {**message, **own}

    def _rows_of(self, profile: tuple[int, ...]) -> _Rows:
        if profile not in self._rows:
            self._rows[profile] = _Rows(self._cut(self.shapes, profile), self.wire)
        return self._rows[profile]


# --- the engine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One rank's part of an exchange on one graph."""

    weights: np.ndarray
    send: dict[int, list[int]] = field(default_factory=dict)
    """rank -> those of this rank's agents that it listens to."""
    receive: dict[int, list[int]] = field(default_factory=dict)
    """rank -> those of its agents that this rank listens to."""
    crossings: np.ndarray = field(default_factory=lambda: np.empty(0))
    """(N,) to how many other ranks each agent's message goes."""


class Torchrun:
    """The engine of `processes`: this rank's share of `num_agents` agents.

    For `Run(..., engine=functools.partial(Torchrun, processes=processes))`. With a `wire` other than "exact", what
    crosses between processes is rounded; an agent reads itself, and the agents of its own process, exactly.

    Raises:
        UserError: more processes than agents.
    """

    def __init__(self, num_agents: int, processes: Processes, wire: Wire = "exact") -> None:
        if wire not in get_args(Wire):
            raise unknown("wire", wire, get_args(Wire))
        world_size = processes.world_size
        if world_size > num_agents:
            raise UserError(
                f"engine: {world_size} processes share {num_agents} agent{'s' * (num_agents > 1)}, so some would have "
                f"none; start at most {num_agents} (torchrun --nproc-per-node) or use more agents."
            )
        self.num_agents, self.processes, self.wire = num_agents, processes, wire
        self.is_main = processes.is_main
        counts = [num_agents // world_size + (rank < num_agents % world_size) for rank in range(world_size)]
        ends = list(accumulate(counts))
        self.blocks = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
        """The agents of every rank."""
        self.agents = self.blocks[processes.rank]
        self.bytes_sent = 0
        """What this rank has handed to the transport in exchanges, so far."""
        self._plan = _Plan(np.empty(0))

    def start(self, message: Tensors, graph: Graph, round_: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """Every rank sends each other rank one buffer, with the messages it needs; to this rank's agents' inbox."""
        plan, me = self._plan_for(graph), self.processes.rank
        parcels = _Parcels(message, self.wire, sizes)
        device = next(iter(message.values())).device
        lane = self._lane(device)
        outgoing = {rank: parcels.write(message, self.agents[0], agents, lane) for rank, agents in plan.send.items()}
        incoming = {
            rank: torch.empty(sum(map(parcels.size, agents)), dtype=torch.uint8, device=lane)
            for rank, agents in plan.receive.items()
        }
        transfer = self._post(outgoing, incoming)
        self.bytes_sent += sum(buffer.nbytes for buffer in outgoing.values())

        def arrive() -> Inbox:
            transfer.wait()
            known = {rank: parcels.read(buffer, plan.receive[rank], device) for rank, buffer in incoming.items()}
            known[me] = message
            ranks = sorted(known)
            senders = [agent for rank in ranks for agent in (self.agents if rank == me else plan.receive[rank])]
            tensors = {name: torch.cat([known[rank][name] for rank in ranks]) for name in message}
            return Inbox.from_weights(tensors, graph.weights, senders, self.agents)

        return Pending(arrive)

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """Bytes that an exchange of such messages moves between ranks, mean over all N agents."""
        parcels, crossings = _Parcels(message, self.wire, sizes), self._plan_for(graph).crossings
        return float(sum(parcels.size(agent) * int(k) for agent, k in enumerate(crossings)) / self.num_agents)

    def gather(self, tensors: Tensors) -> Tensors:
        """name -> (n, ...) of this rank to (N, ...) of all, on every rank."""
        rows, device = _Rows(tensors), next(iter(tensors.values())).device
        mine = rows.write(tensors, self._lane(device))
        # Ranks differ by at most one agent: the shorter are filled, as all_gather wants equal sizes.
        largest = len(self.blocks[0])
        filled = torch.cat([mine, mine.new_zeros(largest - len(mine), rows.size)])
        parts = [torch.empty_like(filled) for _ in self.blocks]
        with self.processes.watched():
            dist.all_gather(parts, filled)
        return rows.read(torch.cat([p[: len(b)] for p, b in zip(parts, self.blocks, strict=True)]), device)

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """name -> (n, ...) of this rank to (N, ...) of all on rank 0; {} on the others, once theirs has left."""
        rows, device = _Rows(tensors), next(iter(tensors.values())).device
        mine = rows.write(tensors, self._lane(device))
        if not self.is_main:
            sent = self._post({0: mine}, {})

            def leave() -> Tensors:
                sent.wait()
                return {}

            return Pending(leave)
        incoming = {rank: mine.new_empty(len(block), rows.size) for rank, block in enumerate(self.blocks) if rank}
        transfer = self._post({}, incoming)

        def arrive() -> Tensors:
            transfer.wait()
            return rows.read(torch.cat([mine, *incoming.values()]), device)

        return Pending(arrive)

    def scatter(self, tensors: Tensors) -> Tensors:
        """name -> (N, ...) of rank 0 to everybody's own rows; on rank 0's device there, on the CPU elsewhere."""
        shapes = {k: (str(t.dtype).removeprefix("torch."), list(t.shape[1:])) for k, t in tensors.items()}
        shapes = self.processes.share("shapes", shapes if self.is_main else None)[0]
        rows = _Rows({k: torch.empty(1, *shape, dtype=getattr(torch, dtype)) for k, (dtype, shape) in shapes.items()})
        if not self.is_main:
            buffer = torch.empty(len(self.agents), rows.size, dtype=torch.uint8)
            self._post({}, {0: buffer}).wait()
            return rows.read(buffer, torch.device("cpu"))
        # One rank at a time: all at once would hold everybody's rows a second time.
        for rank, block in enumerate(self.blocks[1:], start=1):
            self._post({rank: rows.write({k: t[block] for k, t in tensors.items()}, torch.device("cpu"))}, {}).wait()
        return {k: t[self.agents] for k, t in tensors.items()}

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        flags = torch.tensor([flag], dtype=torch.int32)
        with self.processes.watched():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def _lane(self, device: torch.device) -> torch.device:
        """Where tensors of `device` are sent from, and received."""
        return device if device.type == "cpu" else self.processes.transport

    def _post(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> Pending[None]:
        """Starts to send and receive all buffers (by rank) as one batch, and keeps them until they are waited for."""
        operations = [dist.P2POp(dist.isend, buffer, rank) for rank, buffer in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, buffer, rank) for rank, buffer in incoming.items()]
        works: list[Any] = []
        if operations:
            with self.processes.watched():
                works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            if operations:
                with self.processes.watched():
                    for work in works:
                        work.wait()

        return Pending(wait)

    def _plan_for(self, graph: Graph) -> _Plan:
        if self._plan.weights is not graph.weights:
            me, heard = self.processes.rank, graph.weights != 0
            send, receive = {}, {}
            # (W, N): whether any agent of a rank listens to an agent.
            needs = np.stack([heard[block].any(axis=0) for block in self.blocks])
            for rank, block in enumerate(self.blocks):
                if rank != me:
                    send[rank] = [agent for agent in self.agents if needs[rank, agent]]
                    receive[rank] = [agent for agent in block if needs[me, agent]]
            self._plan = _Plan(
                graph.weights,
                {rank: agents for rank, agents in send.items() if agents},
                {rank: agents for rank, agents in receive.items() if agents},
                needs.sum(axis=0) - np.concatenate([needs[rank, block] for rank, block in enumerate(self.blocks)]),
            )
        return self._plan

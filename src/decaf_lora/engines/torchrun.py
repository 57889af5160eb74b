"""Agents split over the processes of torchrun: messages go point to point, and only where an edge needs them.

Rank r of W holds a contiguous block of the N agents; the first N mod W ranks hold one more than the others. In an
exchange a message crosses between two ranks once, however many agents of the receiving rank listen to it. All that one
rank sends to another in an exchange is one flat buffer. All buffers are sent and received as one batch (gloo between
CPUs, NCCL between GPUs).

Posting a batch and waiting for it are separate calls. So several batches can be under way while the processes compute
(gloo moves them in threads of its own, NCCL in its own stream) or use collectives. That cannot deadlock, since all
ranks post the same batches and collectives in the same order. gloo matches the sends and receives of a pair of ranks in
that order, and blocks a rank only when it waits. NCCL runs operations in that order on every rank, so the oldest
unfinished one has, or will have, all its partners. Tensors on CPUs go through gloo even beside NCCL, and do not queue
behind messages between GPUs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.inbox import Group, Inbox, routes
from decaf_lora.engines.base import InStep, Pending, Sizes
from decaf_lora.engines.launch import Processes
from decaf_lora.engines.wire import Parcels, Rows, as_wire
from decaf_lora.errors import UserError
from decaf_lora.graphs import Graph


@dataclass(frozen=True)
class _Plan:
    """One rank's part of an exchange on one graph."""

    send: dict[int, list[int]]
    """Other rank -> the agents of this rank that the other rank listens to."""
    receive: dict[int, list[int]]
    """Other rank -> the agents of the other rank that this rank listens to."""
    senders: list[int]
    """Agents whose messages are here after the exchange, ascending."""
    groups: tuple[Group, ...]
    """Which of this rank's agents listens to which of the senders."""
    crossings: np.ndarray
    """(N,) the number of other ranks to which each agent's message goes."""


class Torchrun(InStep):
    """The engine of one process of several: it holds this rank's share of the agents.

    For `Run(..., engine=functools.partial(Torchrun, processes=processes))`.

    Args:
        num_agents: N, of the whole run.
        processes: of the launch, from `connect`.
        wire: "exact", or "bfloat16" to round messages between processes. An agent reads itself, and the agents of its
            own process, exactly in either case.

    Raises:
        UserError: more processes than agents, or an unknown wire.
    """

    def __init__(self, num_agents: int, processes: Processes, wire: str = "exact") -> None:
        world_size = processes.world_size
        if world_size > num_agents:
            raise UserError(
                f"engine: {world_size} processes share {num_agents} agent{'s' * (num_agents > 1)}, so some would have "
                f"none; start at most {num_agents} (torchrun --nproc-per-node) or use more agents."
            )
        self.num_agents, self.processes, self.wire = num_agents, processes, as_wire(wire)
        self.is_main = processes.is_main
        counts = [num_agents // world_size + (rank < num_agents % world_size) for rank in range(world_size)]
        ends = list(accumulate(counts))
        self.blocks = [list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)]
        """The agents of every rank."""
        self.agents = self.blocks[processes.rank]
        self.reports = list(range(num_agents))
        self.bytes_sent = 0
        """Bytes of all exchanges that this rank has handed to the transport so far."""
        self._plan_for = functools.lru_cache(maxsize=64)(self._plan)

    def start(self, message: Tensors, graph: Graph, exchange: int, sizes: Sizes | None = None) -> Pending[Inbox]:
        """Sends each other rank one buffer with the messages that it needs; see `Engine.start`."""
        plan, me = self._plan_for(graph), self.processes.rank
        parcels = Parcels(message, self.wire, sizes)
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
            tensors = {name: torch.cat([known[rank][name] for rank in ranks]) for name in message}
            return Inbox.from_weights(tensors, graph.weights, plan.senders, self.agents, exchange, plan.groups)

        # An exchange that is given up must still be received: otherwise the next batch would receive its buffers.
        return Pending(arrive, transfer.wait)

    def wire_bytes(self, message: Tensors, graph: Graph, sizes: Sizes | None = None) -> float | None:
        """Bytes that an exchange of such a message moves between ranks, mean over all N agents."""
        parcels, crossings = Parcels(message, self.wire, sizes), self._plan_for(graph).crossings
        return float(sum(parcels.size(agent) * int(k) for agent, k in enumerate(crossings)) / self.num_agents)

    def gather(self, tensors: Tensors) -> Tensors:
        """name -> (n, ...) of this rank to (N, ...) of all, on every rank."""
        rows, device = Rows(tensors), next(iter(tensors.values())).device
        mine = rows.write(tensors, self._lane(device))
        # all_gather needs equal sizes, and ranks differ by at most one agent: the shorter ones are filled up.
        largest = len(self.blocks[0])
        filled = torch.cat([mine, mine.new_zeros(largest - len(mine), rows.size)])
        parts = [torch.empty_like(filled) for _ in self.blocks]
        with self.processes.watched():
            dist.all_gather(parts, filled)
        return rows.read(torch.cat([p[: len(b)] for p, b in zip(parts, self.blocks, strict=True)]), device)

    def collect(self, tensors: Tensors) -> Pending[Tensors]:
        """name -> (n, ...) of this rank to (N, ...) on rank 0; {} on the others once their part has been sent."""
        rows, device = Rows(tensors), next(iter(tensors.values())).device
        mine = rows.write(tensors, self._lane(device))
        if not self.is_main:
            sent = self._post({0: mine}, {})

            def leave() -> Tensors:
                sent.wait()
                return {}

            return Pending(leave, sent.wait)
        incoming = {rank: mine.new_empty(len(block), rows.size) for rank, block in enumerate(self.blocks) if rank}
        transfer = self._post({}, incoming)

        def arrive() -> Tensors:
            transfer.wait()
            return rows.read(torch.cat([mine, *incoming.values()]), device)

        return Pending(arrive, transfer.wait)

    def scatter(self, tensors: Tensors) -> Tensors:
        """name -> (N, ...) on rank 0 to each rank's own (n, ...), which lies on the CPU on all ranks but 0."""
        shapes = {k: (str(t.dtype).removeprefix("torch."), list(t.shape[1:])) for k, t in tensors.items()}
        shapes = self.processes.share("shapes", shapes if self.is_main else None)[0]
        rows = Rows({k: torch.empty(1, *shape, dtype=getattr(torch, dtype)) for k, (dtype, shape) in shapes.items()})
        if not self.is_main:
            buffer = torch.empty(len(self.agents), rows.size, dtype=torch.uint8)
            self._post({}, {0: buffer}).wait()
            return rows.read(buffer, torch.device("cpu"))
        # One rank at a time: buffers for all ranks at once would hold all rows a second time.
        for rank, block in enumerate(self.blocks[1:], start=1):
            self._post({rank: rows.write({k: t[block] for k, t in tensors.items()}, torch.device("cpu"))}, {}).wait()
        return {k: t[self.agents] for k, t in tensors.items()}

    def anyone_stops(self, asked: bool) -> bool:
        """Whether any rank was asked to stop."""
        flags = torch.tensor([asked], dtype=torch.int32)
        with self.processes.watched():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def _lane(self, device: torch.device) -> torch.device:
        """The device on which buffers for tensors of `device` are sent and received."""
        return device if device.type == "cpu" else self.processes.transport

    def _post(self, outgoing: dict[int, Tensor], incoming: dict[int, Tensor]) -> Pending[None]:
        """Starts to send and receive all buffers (by rank) as one batch; keeps the buffers until `wait` returns."""
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

    def _plan(self, graph: Graph) -> _Plan:
        me, heard = self.processes.rank, graph.weights != 0
        send, receive = {}, {}
        # (W, N): whether any agent of a rank listens to an agent.
        needs = np.stack([heard[block].any(axis=0) for block in self.blocks])
        for rank, block in enumerate(self.blocks):
            if rank != me:
                send[rank] = [agent for agent in self.agents if needs[rank, agent]]
                receive[rank] = [agent for agent in block if needs[me, agent]]
        senders = sorted([*self.agents, *(agent for agents in receive.values() for agent in agents)])
        return _Plan(
            {rank: agents for rank, agents in send.items() if agents},
            {rank: agents for rank, agents in receive.items() if agents},
            senders,
            routes(graph.weights, senders, self.agents),
            needs.sum(axis=0) - np.concatenate([needs[rank, block] for rank, block in enumerate(self.blocks)]),
        )

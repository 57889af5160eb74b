"""The contract: what is sent, and what becomes of what arrives?

An algorithm is a NamedTuple of pure functions. It sees adapters and messages, never a model, an engine or a
network. Every tensor has the agents of this process on its leading axis n: N in a simulation, a share of N
under torchrun, 1 in a mesh. The state is a flat dict of such tensors, so it can be checkpointed, moved
between processes and compared without knowing what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]
State = dict[str, Tensor]
Factor = Literal["A", "B", "extras"]
ALL_FACTORS: frozenset[Factor] = frozenset({"A", "B", "extras"})


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters of n agents: per adapted layer a pair of factors, plus fully trained tensors.

    A: layer -> (n, r, d_in); B: layer -> (n, d_out, r); scale: layer -> (n,), the LoRA scaling s in
    W0 + s B A; extras: parameter name -> (n, ...), for instance a classifier head.

    `ranks`: layer -> (n,) int64, each agent's own rank, where agents differ in rank or scale; r is then the
    largest, and what lies beyond an agent's rank is 0: rows of its A, columns of its B. Empty: all have rank r and
    one scale. Zeros stay zeros under training, since their gradients are products with each other.
    """

    A: Tensors
    B: Tensors
    scale: Tensors
    extras: Tensors
    ranks: Tensors = field(default_factory=dict)

    @property
    def num_agents(self) -> int:
        """n, the number of agents on the leading axis."""
        return next(iter((self.A or self.extras).values())).shape[0]

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers, in the model's order."""
        return list(self.A)

    def tensors(self, factors: frozenset[Factor] = ALL_FACTORS) -> Tensors:
        """The trained tensors by name: `A/layer` (n, r, d_in), `B/layer` (n, d_out, r), `extras/name` (n, ...)."""
        groups: dict[Factor, Tensors] = {"A": self.A, "B": self.B, "extras": self.extras}
        return {f"{key}/{name}": t for key in groups if key in factors for name, t in groups[key].items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """This adapter with the tensors named as in `tensors()` replaced; scales stay."""
        groups: dict[str, Tensors] = {"A": dict(self.A), "B": dict(self.B), "extras": dict(self.extras)}
        for key, tensor in tensors.items():
            group, name = key.split("/", 1)
            if name not in groups[group]:
                raise KeyError(f"adapter has no tensor {key!r}")
            groups[group][name] = tensor
        return replace(self, A=groups["A"], B=groups["B"], extras=groups["extras"])

    def select(self, agents: Sequence[int] | slice | Tensor) -> Adapter:
        """The adapters of some agents (indices into the leading axis), in that order."""
        index = agents if isinstance(agents, slice) else torch.as_tensor(agents)

        def take(tensors: Tensors) -> Tensors:
            return {k: t[index if isinstance(index, slice) else index.to(t.device)] for k, t in tensors.items()}

        return Adapter(take(self.A), take(self.B), take(self.scale), take(self.extras), take(self.ranks))

    def shape_groups(self) -> list[list[str]]:
        """Layers grouped by equal (r, d_in, d_out) and ranks: every group goes through one batched call."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in self.A:
            own = self.ranks[name].tolist() if self.ranks else []
            groups.setdefault((*self.A[name].shape[1:], self.B[name].shape[1], *own), []).append(name)
        return list(groups.values())

    def rank_of(self, layer: str) -> Tensor:
        """(n,) int64 ranks of the agents in a layer, on the CPU."""
        if self.ranks:
            return self.ranks[layer].cpu()
        return torch.full((self.num_agents,), self.A[layer].shape[1])

    def trim(self, tensors: Tensors) -> Tensors:
        """`tensors` (n, ...), named as in `tensors()`, with zeros beyond every agent's own rank."""
        return {key: self._trim(key, t) for key, t in tensors.items()} if self.ranks else tensors

    def _trim(self, key: str, tensor: Tensor) -> Tensor:
        group, name = key.split("/", 1)
        if group == "extras":
            return tensor
        axis = 1 if group == "A" else 2
        kept = torch.arange(tensor.shape[axis], device=tensor.device) < self.ranks[name].to(tensor.device)[:, None]
        return tensor * (kept[:, :, None] if group == "A" else kept[:, None, :])

    def message(self, factors: frozenset[Factor] = ALL_FACTORS) -> Tensors:
        """`tensors(factors)` to send; with `scale/layer` (n,), where agents differ in rank or scale."""
        scales = {f"scale/{k}": s for k, s in self.scale.items()} if self.ranks else {}
        return self.tensors(factors) | scales


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that holds the agents of all of `adapters`, in order."""
    first = adapters[0]

    def join(field: str) -> Tensors:
        return {k: torch.cat([getattr(a, field)[k] for a in adapters]) for k in getattr(first, field)}

    return Adapter(join("A"), join("B"), join("scale"), join("extras"), join("ranks"))


class Group(NamedTuple):
    """Receivers with the same number of senders, whose work goes through one batched call.

    Agents with the same row of the mixing matrix (all of them on a complete graph) are computed once:
    receiver `receivers[g]` takes the result of row `expand[g]`.
    """

    receivers: Tensor
    """(g,) positions on this process's agent axis."""
    senders: Tensor
    """(u, m) positions on the inbox's sender axis, in ascending agent order, self included."""
    weights: Tensor
    """(u, m) float64 mixing weights."""
    expand: Tensor
    """(g,) for every receiver its row of `senders`."""

    def split(self, key: Tensor) -> Iterator[tuple[int, Group]]:
        """This group in parts whose receivers have the same `key` (n,), each with its key."""
        own = key[self.receivers]
        for value in own.unique().tolist():
            chosen = own == value
            rows, expand = self.expand[chosen].unique(return_inverse=True)
            yield value, Group(self.receivers[chosen], self.senders[rows], self.weights[rows], expand)


@dataclass(frozen=True)
class Inbox:
    """What arrived in one round for the n agents of this process.

    `tensors`: name -> (k, ...), the messages of k distinct senders in ascending agent order. `groups` says
    who listens to whom with which weight; sums run over senders in ascending agent order.
    """

    tensors: Tensors
    groups: tuple[Group, ...]
    num_receivers: int

    @staticmethod
    def from_weights(tensors: Tensors, weights: np.ndarray, senders: Sequence[int], receivers: Sequence[int]) -> Inbox:
        """The inbox of `receivers` (agent numbers) under `weights` (N, N), given the messages of `senders`.

        `senders` are the agents on the leading axis of `tensors`, ascending.
        """
        position = {agent: k for k, agent in enumerate(senders)}
        rows: dict[int, dict[tuple, list[int]]] = {}
        for local, agent in enumerate(receivers):
            heard = np.flatnonzero(weights[agent])
            key = (tuple(heard.tolist()), weights[agent, heard].tobytes())
            rows.setdefault(len(heard), {}).setdefault(key, []).append(local)
        groups = []
        for same_degree in rows.values():
            keys = list(same_degree)
            pairs = sorted((local, row) for row, key in enumerate(keys) for local in same_degree[key])
            groups.append(
                Group(
                    receivers=torch.tensor([local for local, _ in pairs]),
                    senders=torch.tensor([[position[j] for j in heard] for heard, _ in keys]),
                    weights=torch.from_numpy(np.stack([np.frombuffer(raw, dtype=np.float64) for _, raw in keys])),
                    expand=torch.tensor([row for _, row in pairs]),
                )
            )
        return Inbox(tensors, tuple(groups), len(receivers))

    def average(self, name: str) -> Tensor:
        """(n, ...) weighted sum of the senders' tensor `name` for every receiver."""
        x = self.tensors[name]
        out = x.new_empty((self.num_receivers, *x.shape[1:]))
        for group in self.groups:
            shape = (-1, *[1] * (x.dim() - 1))
            weights = group.weights.to(device=x.device, dtype=x.dtype)
            senders = group.senders.to(x.device)
            # Separate multiply and add: a fused one rounds differently in vector bodies and tails, and the
            # result of an agent must not depend on how many agents share the call.
            total = x[senders[:, 0]] * weights[:, 0].view(shape)
            for j in range(1, senders.shape[1]):
                total = total + x[senders[:, j]] * weights[:, j].view(shape)
            out[group.receivers] = total[group.expand]
        return out

    def stacked(self, names: Sequence[str], group: Group) -> Tensor:
        """(L, u, m, ...) tensors `names` (equal shapes) of the senders of every row of `group`."""
        return torch.stack([self.tensors[name] for name in names])[:, group.senders]

    def scales(self, layers: Sequence[str], group: Group) -> Tensor | None:
        """(L, u, m) LoRA scales of the senders, where agents differ in rank or scale and so say them; else None."""
        return self.stacked([f"scale/{k}" for k in layers], group) if f"scale/{layers[0]}" in self.tensors else None


def average_all(inbox: Inbox, names: Iterator[str] | Sequence[str]) -> Tensors:
    """name -> (n, ...) weighted sums, for every name."""
    return {name: inbox.average(name) for name in names}


def average_tensors(adapter: Adapter, inbox: Inbox) -> Tensors:
    """name -> (n, ...) weighted averages of all trained tensors in the inbox, as `adapter`'s own.

    Between agents of different ranks factors are averaged as if filled with zeros, and cut to the receiver's rank
    (HetLoRA's aggregation, Cho et al., arXiv 2401.06432); B is averaged as s_j B_j and divided by the own s_i.
    """
    names = [name for name in inbox.tensors if not name.startswith("scale/")]
    if not adapter.ranks:
        return average_all(inbox, names)
    scaled = {k: inbox.tensors[k] for k in names}
    for name in names:
        if name.startswith("B/"):
            scaled[name] = scaled[name] * inbox.tensors[f"scale/{name[2:]}"][:, None, None]
    mixed = average_all(replace(inbox, tensors=scaled), names)
    for name in names:
        if name.startswith("B/"):
            mixed[name] = mixed[name] / adapter.scale[name[2:]][:, None, None]
    return adapter.trim(mixed)


def take(prefix: str, tensors: Tensors) -> Tensors:
    """Those of `tensors` whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def put(prefix: str, tensors: Tensors) -> Tensors:
    """`tensors` under names with `prefix` in front."""
    return {prefix + name: t for name, t in tensors.items()}


def leave(prefix: str, tensors: Tensors) -> Tensors:
    """`tensors` but for those whose names start with `prefix`: what belongs to the algorithm underneath."""
    return {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def turned(tensors: Tensors, frames: Tensors) -> Tensors:
    """Factors (n, ...), or gradients of factors, in the frame that `frames`, layer -> (n, r, r), turn to.

    Names end as in `Adapter.tensors()`.
    """
    out = {}
    for key, tensor in tensors.items():
        *_, group, name = key.split("/")
        if group == "A" and name in frames:
            tensor = frames[name] @ tensor
        elif group == "B" and name in frames:
            tensor = tensor @ frames[name].mT
        out[key] = tensor
    return out


def _no_state(adapter: Adapter) -> State:
    return {}


def _train_all(round_: int) -> frozenset[Factor]:
    return ALL_FACTORS


def _no_message(adapter: Adapter, state: State, round_: int) -> Tensors:
    return {}


def _keep(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
    return adapter, state


def _as_it_is(inbox: Inbox) -> Inbox:
    return inbox


def _no_steer(state: State, gradients: Tensors, round_: int) -> tuple[Tensors, State]:
    return gradients, state


def _keep_moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
    return first, second


def reset_moments(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
    """The moments of A and B start at 0 again after every mixing; the optimizer's step count goes on."""

    def zeros(moments: Tensors) -> Tensors:
        return {k: t if k.startswith("extras/") else torch.zeros_like(t) for k, t in moments.items()}

    return zeros(first), zeros(second)


class Algorithm(NamedTuple):
    """A decentralized LoRA algorithm as pure functions (in the manner of optax).

    `topology` says who talks: "graph" (the run's mixing matrix), "server" (the complete graph with
    sample-size weights), "none" (nobody), "pooled" (one agent that holds all data).
    `order` is the order of a round: "adapt-combine" trains, then mixes; "combine-adapt" mixes, then trains.
    """

    name: str
    topology: Literal["graph", "server", "none", "pooled"] = "graph"
    order: Literal["adapt-combine", "combine-adapt"] = "adapt-combine"
    init: Callable[[Adapter], State] = _no_state
    """adapter -> state."""
    trains: Callable[[int], frozenset[Factor]] = _train_all
    """round -> which factors the local steps may change."""
    message: Callable[[Adapter, State, int], Tensors] = _no_message
    """(adapter, state, round) -> name -> (n, ...): what every agent sends."""
    combine: Callable[[Adapter, State, Inbox, int], tuple[Adapter, State]] = _keep
    """(adapter, state, inbox, round) -> (adapter, state)."""
    steer: Callable[[State, Tensors, int], tuple[Tensors, State]] = _no_steer
    """(state, raw gradients, round) -> (gradients, state), before every optimizer step."""
    moments: Callable[[State, Tensors, Tensors], tuple[Tensors, Tensors]] = _keep_moments
    """(state, first, second) -> what becomes of the optimizer's moments after `combine`; names as in
    `Adapter.tensors()`; SGD passes its momentum as `first` and an empty `second`."""
    decode: Callable[[Inbox], Inbox] = _as_it_is
    """What arrived, as the factors and other tensors that it stands for: `combine` begins with it."""
    stacks: frozenset[str] = frozenset()
    """What `combine` needs from every sender apart, not only as the weighted average: with several exchanges
    in a round it is forwarded whole, while the rest of a message is averaged on the way."""
    relay: Callable[[Adapter, Inbox, int], tuple[Tensors, Tensor]] | None = None
    """(adapter, inbox, round) -> the message of the next of several exchanges in a round, and (n,) the norm of
    what it leaves out. None: nothing is left out, and the exchanges are done as one (`graphs.compose`)."""
    turn: Callable[[Adapter, Inbox, Adapter], Tensors] | None = None
    """(old adapter, inbox, new adapter) -> layer -> (n, r, r) the orthogonal P that takes the frame of the plain
    factor average to that of the new factors, A' ~ P A, B' ~ B P^T. None: the frame is that of the average."""
    paced: Callable[[int], Algorithm] | None = None
    """rounds -> the same algorithm on a schedule that takes as many rounds to reach everybody."""

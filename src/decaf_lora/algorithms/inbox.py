"""What arrived in an exchange, from whom, and with which weight?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter, Tensors


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

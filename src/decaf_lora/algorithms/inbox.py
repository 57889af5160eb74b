"""What arrived in an exchange, from whom, and with which weight?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, factor_and_layer, owner

SMALL = 2**14
"""Numbers that a receiver averages up to which all receivers are served at once: 37 times faster for 320 receivers of
48 numbers. Beyond it the copies that this takes cost more than the calls that it saves."""


class Group(NamedTuple):
    """g receivers that hear the same number m of senders, so that one batched call serves them all.

    Receivers with equal rows of the mixing matrix (on a complete graph: all) share one of u distinct rows, whose result
    is computed once: `receivers[k]` takes the result of row `expand[k]`.
    """

    receivers: Tensor
    """(g,) positions on this process's agent axis."""
    senders: Tensor
    """(u, m) positions on the inbox's sender axis, in ascending agent order, self included."""
    weights: Tensor
    """(u, m) float64 mixing weights."""
    expand: Tensor
    """(g,) for every receiver its row of `senders` and `weights`."""

    def split(self, key: Tensor) -> Iterator[tuple[int, Group]]:
        """Splits this group by a key of the receivers; yields (value, the receivers that have it).

        Args:
            key: (n,) integers, one for each agent of this process.
        """
        own = key[self.receivers]
        for value in own.unique().tolist():
            chosen = own == value
            rows, expand = self.expand[chosen].unique(return_inverse=True)
            yield value, Group(self.receivers[chosen], self.senders[rows], self.weights[rows], expand)


def routes(weights: np.ndarray, senders: Sequence[int], receivers: Sequence[int]) -> tuple[Group, ...]:
    """Who listens to whom, with which weight, as groups of receivers.

    The weight of a neighbour that is missing among the senders goes to the receiver itself, so every row keeps its sum.

    Args:
        weights: (N, N) mixing weights.
        senders: agent numbers, ascending.
        receivers: agent numbers, ascending.

    Raises:
        ValueError: a receiver misses a neighbour and is itself not among the senders.
    """
    position = {agent: k for k, agent in enumerate(senders)}
    rows: dict[int, dict[tuple, list[int]]] = {}
    for local, agent in enumerate(receivers):
        row = weights[agent]
        if missing := [j for j in np.flatnonzero(row).tolist() if j not in position]:
            if agent not in position:
                raise ValueError(f"agent {agent} does not send to itself, and hears nothing of {missing}")
            row = row.copy()
            row[agent] += row[missing].sum()
            row[missing] = 0
        heard = np.flatnonzero(row)
        key = (tuple(heard.tolist()), row[heard].tobytes())
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
    return tuple(groups)


@dataclass(frozen=True)
class Inbox:
    """What arrived in one exchange for the n agents of this process.

    Sums run over the senders in ascending order of agents, so that their rounding is the same in every engine.
    """

    tensors: Tensors
    """name -> (k, ...), the messages of k distinct senders in ascending agent order."""
    groups: tuple[Group, ...]
    """Who listens to whom with which weight."""
    num_receivers: int
    """n."""
    senders: tuple[int, ...] = ()
    """(k,) agent numbers of the senders."""
    own: tuple[int, ...] = ()
    """(n,) position of each receiver's own message on the sender axis; empty if some receiver's own is missing."""
    exchange: int = 0
    """Number, from 0, of the exchange that took place. In a mesh it may be a later one than was started."""
    forget: frozenset[int] = frozenset()
    """Neighbours for whom state that is kept by neighbour must be set to 0 before this exchange is added: their records
    of past exchanges differ from this agent's, or the two have missed each other too often."""
    carried: Tensors = field(default_factory=dict)
    """`A/layer` (n, q, d_in), `B/layer` (n, d_out, q): products B A that a truncating rule adds to the mixed ones, with
    weight 1, in units of the receiver's own LoRA scale."""
    waited: Mapping[int, float] = field(default_factory=dict)
    """Neighbour -> seconds until it was certain whether the neighbour takes part. Empty where agents keep step."""
    missed: Mapping[int, Mapping[int, str]] = field(default_factory=dict)
    """Exchange, from 0 -> neighbour that was not heard in it -> why. Besides the exchange that took place, those that
    were started and left for it."""
    rejected: tuple[str, ...] = ()
    """One line for each message that was refused: whose message, and why."""

    @staticmethod
    def from_weights(
        tensors: Tensors,
        weights: np.ndarray,
        senders: Sequence[int],
        receivers: Sequence[int],
        exchange: int = 0,
        groups: tuple[Group, ...] | None = None,
    ) -> Inbox:
        """The inbox of some agents, from the messages of their senders.

        Args:
            tensors: name -> (k, ...), with `senders` on the leading axis.
            weights: (N, N); the weight of a neighbour that is missing among the senders goes to the receiver itself.
            senders: agent numbers, ascending; engines include the receivers.
            receivers: agent numbers, ascending.
            exchange: number of the exchange.
            groups: the result of `routes`, from engines that keep it; None: computed here.

        Raises:
            ValueError: as `routes` does.
        """
        if groups is None:
            groups = routes(weights, senders, receivers)
        position = {agent: k for k, agent in enumerate(senders)}
        own = tuple(position[agent] for agent in receivers) if position.keys() >= set(receivers) else ()
        return Inbox(tensors, groups, len(receivers), tuple(senders), own, exchange)

    def notes(self) -> dict[str, Any]:
        """What the record says of the round of an agent that does not see all others, in JSON's types."""
        missed = {str(e + 1): {str(j): why for j, why in those.items()} for e, those in self.missed.items()}
        return {
            "weights": self.weights_of_first(),
            "waited": {str(j): seconds for j, seconds in self.waited.items()} or None,
            "missed": missed or None,
            "rejected": list(self.rejected) or None,
        }

    def weights_of_first(self) -> dict[str, float]:
        """Neighbour that the first receiver heard, by number -> weight of the neighbour's message."""
        if not self.groups:
            return {}
        group = next(group for group in self.groups if 0 in group.receivers.tolist())
        row = int(group.expand[group.receivers.tolist().index(0)])
        heard = [self.senders[k] for k in group.senders[row].tolist()]
        own = self.senders[self.own[0]] if self.own else None
        return {str(j): w for j, w in zip(heard, group.weights[row].tolist(), strict=True) if j != own}

    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """For every receiver the positions (m,) of its senders on the sender axis, and their weights (m,), float64."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for group in self.groups:
            for receiver, row in zip(group.receivers.tolist(), group.expand.tolist(), strict=True):
                found[receiver] = group.senders[row], group.weights[row]
        return [found[receiver] for receiver in range(self.num_receivers)]

    def reweighted(self, rows: Sequence[tuple[Tensor, Tensor]]) -> Inbox:
        """The same messages with other weights.

        Args:
            rows: as `rows` gives them, for every receiver; senders in any order.
        """
        by_size: dict[int, list[tuple[int, Tensor, Tensor]]] = {}
        for receiver, (senders, weights) in enumerate(rows):
            order = senders.argsort()
            by_size.setdefault(len(senders), []).append((receiver, senders[order], weights[order]))
        groups = []
        for same in by_size.values():
            receivers, heard, given = zip(*same, strict=True)
            everyone = torch.arange(len(same))
            groups.append(Group(torch.tensor(receivers), torch.stack(heard), torch.stack(given), everyone))
        return replace(self, groups=tuple(groups))

    def average(self, name: str) -> Tensor:
        """(n, ...) weighted sum of the senders' tensor `name` for every receiver."""
        return self._averages([name])[0]

    def averages(self, names: Iterable[str]) -> Tensors:
        """name -> (n, ...) weighted sums, as `average` gives them; many small tensors are summed at once."""
        names, alike = list(names), dict[tuple[Any, ...], list[str]]()
        for name in names:
            x = self.tensors[name]
            alike.setdefault((x.shape, x.dtype, x.device), []).append(name)
        found = Tensors()
        for same in alike.values():
            x = self.tensors[same[0]]
            step = lowrank.pieces_of(x.numel(), x.device)
            for start in range(0, len(same), step):
                some = same[start : start + step]
                found.update(zip(some, self._averages(some), strict=True))
        return {name: found[name] for name in names}

    def _averages(self, names: Sequence[str]) -> Sequence[Tensor]:
        """The weighted sums of tensors of one shape, dtype and device."""
        x = torch.stack([self.tensors[name] for name in names])  # (L, k, ...)
        out = x.new_empty((len(names), self.num_receivers, *x.shape[2:]))
        for group in self.groups:
            weights = group.weights.to(x.dtype)
            if out[:, :1].numel() <= SMALL:
                _sum_at_once(x, group, weights, out)
            else:
                _sum_one_by_one(x, group, weights, out)
        return out.unbind()

    def stacked(self, names: Sequence[str], group: Group) -> Tensor:
        """(L, u, m, ...) the L tensors `names`, of equal shapes, of the m senders in each of the u rows of `group`."""
        return torch.stack([self.tensors[name] for name in names])[:, group.senders]

    def scales(self, layers: Sequence[str], group: Group) -> Tensor | None:
        """(L, u, m) LoRA scales of the senders. None where agents do not differ in rank or scale, and so send none."""
        return self.stacked([f"scale/{k}" for k in layers], group) if f"scale/{layers[0]}" in self.tensors else None


# Both of these multiply and add separately: a fused operation rounds differently in vector bodies and tails, and the
# result of an agent must not depend on how many agents or tensors share the call. So they give the same bits.


def _sum_at_once(x: Tensor, group: Group, weights: Tensor, out: Tensor) -> None:
    """Writes the receivers' weighted sums of `x` (L, k, ...) to `out` (L, n, ...), in as few calls as there are terms.

    Copies of the messages are made, a cacheful at a time.
    """
    step = lowrank.pieces_of(out[:, :1].numel(), x.device)
    for start in range(0, len(group.senders), step):
        rows = slice(start, start + step)
        heard, given = group.senders[rows].T, weights[rows].T.to(x.device)[(..., *[None] * (x.dim() - 2))]
        total = x[:, heard[0]] * given[0]
        for senders, weight in zip(heard[1:], given[1:], strict=True):
            total += x[:, senders] * weight
        here = (group.expand >= start) & (group.expand < start + step)
        out[:, group.receivers[here]] = total[:, group.expand[here] - start]


def _sum_one_by_one(x: Tensor, group: Group, weights: Tensor, out: Tensor) -> None:
    """As `_sum_at_once`, without a copy of a message."""
    term, first = torch.empty_like(out[:, 0]), dict[int, int]()
    for receiver, row in zip(group.receivers.tolist(), group.expand.tolist(), strict=True):
        if row in first:
            out[:, receiver] = out[:, first[row]]
            continue
        first[row], total = receiver, out[:, receiver]
        for number, (k, weight) in enumerate(zip(group.senders[row].tolist(), weights[row].tolist(), strict=True)):
            torch.mul(x[:, k], weight, out=term if number else total)
            if number:
                total += term


def average_tensors(adapter: Adapter, inbox: Inbox) -> Tensors:
    """The receivers' weighted averages of all trained tensors in the inbox.

    Where agents differ in rank, factors are averaged as if filled up with zeros, and cut to the receiver's rank
    (HetLoRA's aggregation, Cho et al., arXiv 2401.06432). Where they differ in scale, s_j B_j is averaged and divided
    by the receiver's own s_i.

    Args:
        adapter: of the n receivers; gives their ranks and scales.
        inbox: what arrived.

    Returns:
        name -> (n, ...).
    """
    names = [name for name in inbox.tensors if owner(name) != "scale"]
    if not adapter.ranks:
        return inbox.averages(names)
    tensors = {name: inbox.tensors[name] for name in names}
    layers = {name: layer for name in names for factor, layer in [factor_and_layer(name)] if factor == "B"}
    for name, layer in layers.items():
        tensors[name] = tensors[name] * inbox.tensors[f"scale/{layer}"][:, None, None]
    mixed = replace(inbox, tensors=tensors).averages(names)
    for name, layer in layers.items():
        mixed[name] = mixed[name] / adapter.scale[layer][:, None, None]
    return adapter.trim(mixed)

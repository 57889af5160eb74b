"""How far apart are the agents, and what is their average? Measured from the factors, mostly without dense matrices.

mean product  Pbar = (1/N) sum_j s_j B_j A_j
consensus distance = sqrt( (1/N) sum_i || s_i B_i A_i - Pbar ||_F^2 ), over all adapted layers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.errors import UserError
from decaf_lora.precision import double, work_device

AVERAGED = "averaged"
"""The name of the averaged model, in place of an agent's number."""


def distance(adapter: Adapter) -> float:
    """The consensus distance: the root mean square, over agents, of the distance to the mean product, all layers."""
    n, total = adapter.num_agents, 0.0
    for layers in adapter.shape_groups():
        if 2 * n * adapter.A[layers[0]].shape[1] > sum(_dimensions(adapter, layers[0])):
            total += sum(_dense_squares(adapter, layer) for layer in layers)
            continue
        a = double(torch.stack([adapter.A[k] for k in layers]))
        b = double(torch.stack([adapter.B[k] * adapter.scale[k][:, None, None] for k in layers]))
        # Differences to the first agent's product take the part that all share out of the sums. Otherwise large sums
        # would cancel, and with them the digits of a small distance.
        inner = _centred_gram(a, b)
        trace = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
        total += float((trace - inner.sum((-2, -1)) / n).clamp_min(0).sum())
    return (total / n) ** 0.5


def _dimensions(adapter: Adapter, layer: str) -> tuple[int, int]:
    return adapter.B[layer].shape[1], adapter.A[layer].shape[2]


def _dense_squares(adapter: Adapter, layer: str) -> float:
    """Sum of the squared distances of n products to their mean, from dense products.

    It is for many agents, where the Gram matrix of their factors, (2 n r)^2 numbers, would be larger than the layer.
    """
    a, b = double(adapter.A[layer]), double(adapter.B[layer] * adapter.scale[layer][:, None, None])
    mean = torch.einsum("nor,nri->oi", b, a) / len(a)
    return sum(float((b[i] @ a[i] - mean).square().sum()) for i in range(len(a)))


def _centred_gram(a: Tensor, b: Tensor) -> Tensor:
    """(L, n, n) inner products of the differences B_i A_i - B_0 A_0; a (L, n, r, d_in), b (L, n, d_out, r)."""
    # B_i A_i - B_0 A_0 = (B_i - B_0) A_i + B_0 (A_i - A_0)
    left = torch.cat([b - b[:, :1], b[:, :1].expand_as(b)], -1)
    right = torch.cat([a, a - a[:, :1]], -2)
    layers, n, rank, _ = right.shape
    rows = right.flatten(1, 2)
    columns = left.transpose(1, 2).flatten(2, 3)
    gram = (columns.mT @ columns) * (rows @ rows.mT)
    return gram.view(layers, n, rank, n, rank).sum((2, 4))


def agree(adapter: Adapter) -> bool:
    """Whether all hold the same adapter, as at a common start and behind a server: it is the averaged one, too."""
    tensors = [*adapter.tensors().values(), *adapter.scale.values(), *adapter.ranks.values()]
    return all(bool((t == t[:1]).all()) for t in tensors)


def averaged(adapter: Adapter) -> Adapter:
    """The averaged model, as the adapter of one agent: the mean of the products, truncated to the adapters' rank.

    Where agents differ, it has the rank and scale of `largest`. Extras are averaged plainly.
    """
    a, b = dict(adapter.A), dict(adapter.B)
    n, like = adapter.num_agents, largest(adapter)
    for layers in adapter.shape_groups():
        stack_a = torch.stack([adapter.A[k] for k in layers])
        stack_b = torch.stack([adapter.B[k] for k in layers])
        scale = torch.stack([adapter.scale[k] for k in layers])
        out = lowrank.mix_truncate(stack_a, stack_b, scale / (n * scale[:, like, None]), stack_a.shape[-2])
        for index, layer in enumerate(layers):
            a[layer], b[layer] = out.A[index][None], out.B[index][None]
    return Adapter(
        a,
        b,
        {k: s[like, None] for k, s in adapter.scale.items()},
        {k: t.mean(0, keepdim=True) for k, t in adapter.extras.items()},
    )


def chosen(adapters: Adapter, agent: int | str, attackers: Sequence[int] = ()) -> Adapter:
    """One agent's adapter, or the averaged one (`AVERAGED`), alone on the leading axis.

    Args:
        adapters: of all agents.
        agent: a number, or `AVERAGED`.
        attackers: agents that are no part of the average.

    Raises:
        UserError: there is no such agent.
    """
    check_agent(agent, adapters.num_agents)
    if isinstance(agent, int):
        return adapters.select([agent])
    honest = [one for one in range(adapters.num_agents) if one not in attackers]
    return averaged(adapters.select(honest) if attackers else adapters)


def check_agent(agent: int | str, num_agents: int) -> None:
    """Raises UserError unless `agent` is a number from 0 to `num_agents` - 1, or `AVERAGED`."""
    if agent != AVERAGED and not (isinstance(agent, int) and 0 <= agent < num_agents):
        raise UserError(f"agent: {agent!r} is not in this run; use 0 to {num_agents - 1} or '{AVERAGED}'.")


def rms(values: Tensor | None) -> float | None:
    """The root mean square of what was measured of each agent; None if nothing was."""
    return None if values is None else float(double(values).square().mean().sqrt())


def largest(adapter: Adapter) -> int:
    """The agent whose ranks have the largest sum over all layers; of several the first."""
    return int(torch.stack([adapter.rank_of(k) for k in adapter.layers]).sum(0).argmax())


def neighbour_distance(adapter: Adapter, inbox: Inbox) -> float | None:
    """Root mean square distance of the first receiver's product to the products that its neighbours sent, all layers.

    None where the messages do not hold both factors, or no neighbour's message arrived.
    """
    if not _holds_products(adapter, inbox) or not inbox.own:
        return None
    own = inbox.own[0]
    others = [k for k in range(len(inbox.senders)) if k != own]
    if not others:
        return None
    squares = 0.0
    for layer in adapter.layers:
        a, b = inbox.tensors[f"A/{layer}"], inbox.tensors[f"B/{layer}"]
        scale = inbox.tensors.get(f"scale/{layer}", adapter.scale[layer][:1].expand(len(a)))
        b = b * scale[:, None, None]
        squares += float(double(lowrank.product_distance(a[others], b[others], a[own], b[own])).square().sum())
    return (squares / len(others)) ** 0.5


def _holds_products(adapter: Adapter, inbox: Inbox) -> bool:
    return all(f"A/{k}" in inbox.tensors and f"B/{k}" in inbox.tensors for k in adapter.layers)


def interference_and_tail(adapter: Adapter, inbox: Inbox) -> tuple[Tensor, Tensor] | None:
    """What two rules would lose in mixing these messages, whatever the rule that sent them.

    Interference is the error that mixing the factors (DLoRA) makes in the mixed product. The tail is what truncating
    the mixed product to rank r (DeCAF) cuts off.

    Args:
        adapter: of the n receivers; gives layers, ranks and scales.
        inbox: what arrived.

    Returns:
        Interference (n,) and tail (n,), Frobenius norms over all layers, in float64 on the CPU. None for messages that
        do not hold both factors.
    """
    if not _holds_products(adapter, inbox):
        return None
    device = work_device(next(iter(inbox.tensors.values())).device)
    squares = torch.zeros(2, inbox.num_receivers, dtype=torch.float64, device=device)
    for layers in adapter.shape_groups():
        scale = double(torch.stack([adapter.scale[k] for k in layers]))
        for whole in inbox.groups:
            for rank, group in whole.split(adapter.rank_of(layers[0])):
                a = inbox.stacked([f"A/{k}" for k in layers], group)
                b = inbox.stacked([f"B/{k}" for k in layers], group)
                weights, theirs = group.weights.to(a), inbox.scales(layers, group)
                if theirs is not None:
                    b = b * theirs[..., None, None]
                tail = lowrank.mix_truncate(a, b, weights, rank).tail
                both = double(torch.stack([lowrank.interference(a, b, weights), tail]))[:, :, group.expand]
                both = both * scale[:, group.receivers] if theirs is None else both
                squares[:, group.receivers] += both.square().sum(1)
    interference, tail = squares.sqrt().cpu()
    return interference, tail

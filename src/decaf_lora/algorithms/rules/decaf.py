"""DeCAF: consensus on the product, truncated SVD back to rank r.

    Z_i = sum_j Pi_ij s_j B_j A_j ;   (U, S, V) = TSVD_r(Z_i) ;   s_i B_i A_i = U S V^T

Saadati, Jiang, Waite, Ganguly, Balu, Hegde, Sarkar, arXiv 2505.21382. Messages are the factors, r (d_in +
d_out) numbers per layer, never a dense update. Mixing the product has no consensus interference; the price is
the truncation tail, the part of Z_i beyond rank r.

The paper leaves open how U S V^T is split into B and A. The product is the same for every split (gauge); the
training after it is not, since Adam works per coordinate. `gauge` selects the split (lowrank.py has the formulas).
The default is the gauge that our study supports (docs/study-decaf.md); the literal reading of the paper would be
"balanced". Adam's moments belong to the old frame of the factors: `moments` keeps them, resets them, or transports
them into the new frame.

With several exchanges in a round the factors are stacked and forwarded, and truncated once, at the end:
Z_i = sum_j (W_m .. W_1)_ij s_j B_j A_j. `relay_rank` R bounds the stack: between two exchanges it is cut to rank R,

    (A_i, B_i) <- TSVD_R(sum_j (W_t)_ij B_j A_j),    and the norm of what was cut is recorded as `recompression`.

`truncation_feedback` f keeps what a truncation cuts, and adds f times it to the agent's next mix (feedback.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, factor_and_layer, owner
from decaf_lora.algorithms.contract import Combined, Order, Round, Rule, Setting, reset_moments
from decaf_lora.algorithms.inbox import Group, Inbox
from decaf_lora.algorithms.rules.dlora import send_factors
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import Messages, with_options
from decaf_lora.errors import UserError, unknown
from decaf_lora.kinds import Kind

GAUGES: tuple[str, ...] = (
    "balanced",
    "balanced-rotated",
    "orthonormal",
    "orthonormal-rotated",
    "anchored",
)
"""How a truncated product is split into factors; see the formulas at the top of the file."""
DEFAULT_GAUGE = "balanced-rotated"


def decaf(
    gauge: str = "rotated",
    order: Order = "adapt-combine",
    moments: Literal["keep", "reset", "transport"] = "keep",
    reference: Literal["average", "own"] = "average",
    relay_rank: int | None = None,
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    truncation_feedback: float | None = None,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Product gossip with truncation.

    Args:
        gauge: how the truncated product is split into factors: one of `GAUGES`, or "rotated" for `DEFAULT_GAUGE`.
        order: train then mix, or mix then train.
        moments: what happens to Adam's moments after mixing, when the frame of the factors has changed.
        reference: the frame that rotated and anchored gauges turn to: the neighbourhood's plain factor average, or the
            agent's own factors before mixing.
        relay_rank: with several exchanges in a round, the rank to which stacks are cut between them, at least 1 (below
            the adapters' rank it counts as that). None: stacks are forwarded whole.
        tracking: lay gradient tracking over it (transforms/tracking.py), with `tracking_gamma`.
        tracking_gamma: in (0, 1], how far a correction moves at an update.
        truncation_feedback: how much of what was cut comes back, in (0, 1] (transforms/feedback.py); None: off.
        quasi_global: the decay of quasi-global momentum (transforms/quasi_global.py); None: off.
        messages: "full" as they are, or "int8" (transforms/int8.py).

    Raises:
        UserError: an option is unknown or out of range, or two do not go together; names the fields.
    """
    if gauge == "rotated":
        gauge = DEFAULT_GAUGE
    if gauge not in GAUGES:
        raise unknown("algorithm.gauge", gauge, (*GAUGES, "rotated"))
    if moments not in ("keep", "reset", "transport"):
        raise unknown("algorithm.moments", moments, ("keep", "reset", "transport"))
    if relay_rank is not None and relay_rank < 1:
        raise UserError(f"algorithm.relay_rank: {relay_rank} is below 1; give a rank, or leave it unset.")

    def init(adapter: Adapter, setting: Setting) -> Tensors:
        # The norm of A's rows is fixed here for the whole run. Averages of unrelated frames shrink: a norm taken from
        # them would collapse the adapters of agents that start independently.
        state = {
            f"a_scale/{k}": (a.square().sum(-1).sum(-1) / adapter.rank_of(k).to(a)).sqrt() for k, a in adapter.A.items()
        }
        if moments == "transport":
            for k, a in adapter.A.items():
                state[f"frame/{k}"] = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).repeat(len(a), 1, 1)
        return state

    def combine(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> Combined:
        new_a, new_b, state, rest = dict(adapter.A), dict(adapter.B), dict(state), Tensors()
        for layers in _pieces(adapter, inbox):
            old_a = torch.stack([adapter.A[k] for k in layers])
            old_b = torch.stack([adapter.B[k] for k in layers])
            a_scale = torch.stack([state[f"a_scale/{k}"] for k in layers])
            scale = torch.stack([adapter.scale[k] for k in layers])
            mixed_a, mixed_b = torch.zeros_like(old_a), torch.zeros_like(old_b)
            added = _stacked_products(inbox.carried, layers) if inbox.carried else None
            left = None if added is None else tuple(torch.zeros_like(x) for x in added)
            for whole in inbox.groups:
                for rank, group in whole.split(adapter.rank_of(layers[0])):
                    to = group.receivers
                    own = (old_a[:, to, :rank], old_b[:, to, :, :rank]) if reference == "own" else None
                    carried = None if added is None else (added[0][:, to], added[1][:, to])
                    mixed_a[:, to, :rank], mixed_b[:, to, :, :rank], *cut = _mix(
                        inbox, group, layers, gauge, rank, own, a_scale[:, to], scale[:, to], carried
                    )
                    if left is not None:
                        left[0][:, to], left[1][:, to] = cut
            if left is not None:
                rest |= {f"A/{k}": t for k, t in zip(layers, left[0], strict=True)}
                rest |= {f"B/{k}": t for k, t in zip(layers, left[1], strict=True)}
            for index, layer in enumerate(layers):
                new_a[layer], new_b[layer] = mixed_a[index], mixed_b[index]
            if moments == "transport":
                frames = lowrank.frame_change(old_a, old_b, mixed_a, mixed_b)
                state.update({f"frame/{k}": _within(adapter, k, frames[i]) for i, k in enumerate(layers)})
        extras = inbox.averages([name for name in inbox.tensors if owner(name) == "extras"])
        return Combined(replace(adapter, A=new_a, B=new_b).with_tensors(extras), state, rest)

    def transport(state: Tensors, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        return _rotate(state, first, power=1), _rotate(state, second, power=2)

    def relay(adapter: Adapter, inbox: Inbox, round_: Round) -> tuple[Tensors, Tensor]:
        return _recompress(adapter, inbox, relay_rank or 1)

    rule = Rule(
        "decaf",
        order=order,
        init=init,
        message=send_factors,
        combine=combine,
        relay=None if relay_rank is None else relay,
        # All other gauges turn the new factors onto the plain factor average: its frame is theirs.
        turn=_turn if reference == "own" or gauge in ("balanced", "orthonormal") else None,
        stacks=frozenset({"A", "B"}),
        truncates=True,
    )
    rules = {"keep": rule.moments, "reset": reset_moments, "transport": transport}
    return with_options(
        rule._replace(moments=rules[moments]),
        tracking=tracking,
        tracking_gamma=tracking_gamma,
        quasi_global=quasi_global,
        messages=messages,
        truncation_feedback=truncation_feedback,
    )


def decaf_tracked(
    gauge: str = "rotated",
    order: Order = "adapt-combine",
    moments: Literal["keep", "reset", "transport"] = "keep",
    reference: Literal["average", "own"] = "average",
    relay_rank: int | None = None,
    tracking_gamma: float = 1.0,
    truncation_feedback: float | None = None,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """DeCAF with gradient tracking; arguments and errors as those of `decaf`."""
    return decaf(
        gauge,
        order,
        moments,
        reference,
        relay_rank,
        tracking=True,
        tracking_gamma=tracking_gamma,
        truncation_feedback=truncation_feedback,
        quasi_global=quasi_global,
        messages=messages,
    )


def _pieces(adapter: Adapter, inbox: Inbox) -> Iterator[list[str]]:
    """Names of layers of one shape, few enough for what a CPU combines at a time to stay in its cache."""
    for layers in adapter.shape_groups():
        A, B = inbox.tensors[f"A/{layers[0]}"], inbox.tensors[f"B/{layers[0]}"]
        most = max((group.senders.numel() for group in inbox.groups), default=1)
        step = lowrank.pieces_of(most * (A[0].numel() + B[0].numel()), A.device)
        yield from (layers[start : start + step] for start in range(0, len(layers), step))


def _stacked_products(tensors: Tensors, layers: list[str]) -> tuple[Tensor, Tensor]:
    """Factors of L layers of one shape, stacked: A (L, n, q, d_in), B (L, n, d_out, q)."""
    return torch.stack([tensors[f"A/{k}"] for k in layers]), torch.stack([tensors[f"B/{k}"] for k in layers])


def _mix(
    inbox: Inbox,
    group: Group,
    layers: list[str],
    gauge: str,
    rank: int,
    own: tuple[Tensor, Tensor] | None,
    a_scale: Tensor,
    scale: Tensor,
    carried: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, ...]:
    """The new factors of L layers of one shape, for the g receivers of a group.

    Args:
        inbox, group: what arrived, and the receivers.
        layers: names of the L layers.
        gauge: one of `GAUGES`.
        rank: of the receivers, r.
        own: the frame to turn to, A (L, g, r, d_in) and B (L, g, d_out, r); None: the neighbourhood's average.
        a_scale, scale: (L, g) each receiver's norm of a row of A, and LoRA scale.
        carried: products to add to the mixed ones, A (L, g, q, d_in) and B (L, g, d_out, q); None: none.

    Returns:
        A (L, g, r, d_in), B (L, g, d_out, r), then A and B of rank q of what the truncation cut (rank 0 if nothing is
        carried).
    """
    a = inbox.stacked([f"A/{k}" for k in layers], group)
    b = inbox.stacked([f"B/{k}" for k in layers], group)
    theirs = inbox.scales(layers, group)
    weights, expand = group.weights.to(a), group.expand
    if theirs is not None:
        weights = weights * theirs.to(weights)
    if own is not None or carried is not None or not all(bool((x == x[:, :1]).all()) for x in (a_scale, scale)):
        # Receivers differ in frame, scale or carried product, so one result cannot serve all that have an equal row of
        # the mixing matrix.
        a, b, weights = a[:, expand], b[:, expand], weights[..., expand, :]
        expand = torch.arange(len(group.receivers))
    else:
        a_scale, scale = (x[:, :1].expand(-1, a.shape[1]) for x in (a_scale, scale))
    if theirs is not None:
        weights = weights / scale.to(weights)[..., None]
    out = lowrank.mix_truncate(
        a,
        b,
        weights,
        rank,
        gauge=cast(lowrank.Gauge, gauge.replace("-", "_")),
        reference=own,
        a_scale=a_scale,
        carried=carried,
        rest=0 if carried is None else carried[0].shape[-2],
    )
    return tuple(x[:, expand] for x in (out.A, out.B, out.rest_a, out.rest_b))


def _recompress(adapter: Adapter, inbox: Inbox, rank: int) -> tuple[Tensors, Tensor]:
    """What an agent sends on between two exchanges: the mixed products cut to a rank, all other tensors averaged.

    `rank` is raised to the adapters' own and limited to the full rank of a layer.

    Returns:
        The message, name -> (n, ...), and the Frobenius norm (n,) of what was cut, over all layers.
    """
    stacked = {f"{factor}/{k}" for factor in "AB" for k in adapter.layers}
    message = inbox.averages([k for k in inbox.tensors if k not in stacked and owner(k) != "scale"])
    cut = torch.zeros(inbox.num_receivers, dtype=torch.float64)
    for layers in adapter.shape_groups():
        a, b = adapter.A[layers[0]], adapter.B[layers[0]]
        kept = min(max(rank, a.shape[1]), a.shape[2], b.shape[1])
        new_a = a.new_empty(len(layers), inbox.num_receivers, kept, a.shape[2])
        new_b = b.new_empty(len(layers), inbox.num_receivers, b.shape[1], kept)
        scale = torch.stack([adapter.scale[k] for k in layers]).cpu().double()
        for group in inbox.groups:
            sent_a, sent_b = (inbox.stacked([f"{factor}/{k}" for k in layers], group) for factor in "AB")
            weights, theirs = group.weights.to(sent_a), inbox.scales(layers, group)
            if theirs is not None:  # the factors sent on hold s B A itself, so their scale is 1
                weights, scale = weights * theirs.to(weights), torch.ones_like(scale)
            out = lowrank.mix_truncate(sent_a, sent_b, weights, kept, gauge="balanced_rotated")
            new_a[:, group.receivers], new_b[:, group.receivers] = out.A[:, group.expand], out.B[:, group.expand]
            tail = out.tail[:, group.expand].cpu().double() * scale[:, group.receivers]
            cut[group.receivers] += tail.square().sum(0)
        message |= {f"A/{k}": t for k, t in zip(layers, new_a, strict=True)}
        message |= {f"B/{k}": t for k, t in zip(layers, new_b, strict=True)}
        if adapter.ranks:
            message |= {f"scale/{k}": torch.ones_like(adapter.scale[k]) for k in layers}
    return message, cut.sqrt()


def _turn(old: Adapter, inbox: Inbox, new: Adapter) -> Tensors:
    """layer -> (n, r, r): the frame change from the plain factor average of the inbox to the new factors."""
    frames, mean = {}, inbox.averages(f"{factor}/{layer}" for layer in new.layers for factor in "AB")
    for layer in new.layers:
        a, b, rank = mean[f"A/{layer}"], mean[f"B/{layer}"], new.A[layer].shape[1]
        a, b = a[:, :rank], b[..., :rank]
        if new.ranks:
            a, b = new.trim({f"A/{layer}": a, f"B/{layer}": b}).values()
        frames[layer] = _within(new, layer, lowrank.frame_change(a, b, new.A[layer], new.B[layer]))
    return frames


def _within(adapter: Adapter, layer: str, frames: Tensor) -> Tensor:
    """`frames` (n, r, r) restricted to each agent's own rank; the identity beyond it."""
    if not adapter.ranks:
        return frames
    inside = torch.arange(frames.shape[-1]) < adapter.rank_of(layer)[:, None]
    both = (inside[:, :, None] & inside[:, None, :]).to(frames.device)
    return torch.where(both, frames, torch.eye(frames.shape[-1], dtype=frames.dtype, device=frames.device))


def _rotate(state: Tensors, moments: Tensors, power: int) -> Tensors:
    """Moments (n, ...) in the new frame: P m for A, m P^T for B.

    power: 1 for the first moment; 2 for the second, which is turned by the elementwise square of P.
    """
    turned = {}
    for key, tensor in moments.items():
        factor, layer = factor_and_layer(key)
        if factor == "A":
            tensor = state[f"frame/{layer}"].pow(power) @ tensor
        elif factor == "B":
            tensor = tensor @ state[f"frame/{layer}"].pow(power).mT
        turned[key] = tensor
    return turned


KINDS = {
    "decaf": Kind(decaf, "mix the products, and truncate them to the rank"),
    "decaf_tracked": Kind(decaf_tracked, "decaf with gradient tracking"),
}

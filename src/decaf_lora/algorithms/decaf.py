"""DeCAF: consensus on the product, truncated SVD back to rank r.

    Z_i = sum_j Pi_ij s_j B_j A_j ;   (U, S, V) = TSVD_r(Z_i) ;   s_i B_i A_i = U S V^T

Saadati, Jiang, Waite, Ganguly, Balu, Hegde, Sarkar, arXiv 2505.21382. Messages are the factors, r (d_in +
d_out) numbers per layer, never a dense update. Mixing the product has no consensus interference; the price is
the truncation tail, the part of Z_i beyond rank r.

The paper leaves open how U S V^T is split into B and A. The product is the same for every split (gauge),
the training after it is not, since Adam works per coordinate. `gauge` selects (lowrank.py has the formulas);
the default is the choice that our study supports (docs/study-decaf.md), and differs from the literal
balanced reading of the paper. `moments` says what becomes of Adam's moments, which live in the old frame:
kept, reset, or rotated along with the factors.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor

from decaf_lora import lowrank
from decaf_lora.algorithms.base import Adapter, Algorithm, Group, Inbox, State, Tensors, average_all
from decaf_lora.algorithms.dlora import send_factors
from decaf_lora.errors import unknown

GAUGES: tuple[str, ...] = (
    "balanced",
    "balanced-rotated",
    "orthonormal",
    "orthonormal-rotated",
    "anchored",
)
DEFAULT_GAUGE = "balanced-rotated"


def decaf(
    gauge: str = "rotated",
    order: Literal["adapt-combine", "combine-adapt"] = "adapt-combine",
    moments: Literal["keep", "reset", "transport"] = "keep",
    reference: Literal["average", "own"] = "average",
) -> Algorithm:
    """Product gossip with truncation.

    gauge: one of `GAUGES`, or "rotated", the default rotated one. order: train then mix, or mix then train.
    moments: what becomes of Adam's moments after the factors changed frame. reference: the frame that rotated
    gauges turn to, the neighbourhood's plain factor average or the agent's own factors before mixing.
    """
    if gauge == "rotated":
        gauge = DEFAULT_GAUGE
    if gauge not in GAUGES:
        raise unknown("algorithm.gauge", gauge, (*GAUGES, "rotated"))
    if moments not in ("keep", "reset", "transport"):
        raise unknown("algorithm.moments", moments, ("keep", "reset", "transport"))

    def init(adapter: Adapter) -> State:
        # A's scale is a constant of the run: averages of unrelated frames shrink, and a scale taken from
        # them collapses the adapter when agents start independently.
        state = {f"a_scale/{k}": a.square().sum(-1).mean(-1).sqrt() for k, a in adapter.A.items()}
        if moments == "transport":
            for k, a in adapter.A.items():
                state[f"frame/{k}"] = torch.eye(a.shape[1], dtype=a.dtype, device=a.device).repeat(len(a), 1, 1)
        return state

    def combine(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
        new_a, new_b, state = dict(adapter.A), dict(adapter.B), dict(state)
        for layers in adapter.shape_groups():
            old_a = torch.stack([adapter.A[k] for k in layers])
            old_b = torch.stack([adapter.B[k] for k in layers])
            a_scale = torch.stack([state[f"a_scale/{k}"] for k in layers])
            mixed_a, mixed_b = torch.empty_like(old_a), torch.empty_like(old_b)
            for group in inbox.groups:
                own = (old_a[:, group.receivers], old_b[:, group.receivers]) if reference == "own" else None
                mixed_a[:, group.receivers], mixed_b[:, group.receivers] = _mix(
                    inbox, group, layers, gauge, own, a_scale[:, group.receivers]
                )
            for index, layer in enumerate(layers):
                new_a[layer], new_b[layer] = mixed_a[index], mixed_b[index]
            if moments == "transport":
                frames = lowrank.frame_change(old_a, old_b, mixed_a, mixed_b)
                state.update({f"frame/{k}": frames[index] for index, k in enumerate(layers)})
        extras = average_all(inbox, [name for name in inbox.tensors if name.startswith("extras/")])
        return Adapter(new_a, new_b, adapter.scale, adapter.extras).with_tensors(extras), state

    def transport(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        return _rotate(state, first, power=1), _rotate(state, second, power=2)

    def reset(state: State, first: Tensors, second: Tensors) -> tuple[Tensors, Tensors]:
        def zeros(moments: Tensors) -> Tensors:
            return {k: t if k.startswith("extras/") else torch.zeros_like(t) for k, t in moments.items()}

        return zeros(first), zeros(second)

    algorithm = Algorithm(name="decaf", order=order, init=init, message=send_factors, combine=combine)
    rules = {"keep": algorithm.moments, "reset": reset, "transport": transport}
    return algorithm._replace(moments=rules[moments])


def _mix(
    inbox: Inbox,
    group: Group,
    layers: list[str],
    gauge: str,
    own: tuple[Tensor, Tensor] | None,
    a_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """(L, g, r, d_in), (L, g, d_out, r): the new factors of layers of one shape for the group's receivers."""
    a = inbox.stacked([f"A/{k}" for k in layers], group)
    b = inbox.stacked([f"B/{k}" for k in layers], group)
    weights, expand = group.weights.to(a), group.expand
    if own is not None or not bool((a_scale == a_scale[:, :1]).all()):
        # Frame or scale differ between receivers, so equal rows of the mixing matrix cannot be shared.
        a, b, weights = a[:, expand], b[:, expand], weights[expand]
        expand = torch.arange(len(group.receivers))
    else:
        a_scale = a_scale[:, :1].expand(-1, a.shape[1])
    out = lowrank.mix_truncate(
        a, b, weights, a.shape[-2], gauge=cast(lowrank.Gauge, gauge.replace("-", "_")), reference=own, a_scale=a_scale
    )
    return out.A[:, expand], out.B[:, expand]


def _rotate(state: State, moments: Tensors, power: int) -> Tensors:
    """Carries moments (n, ...) into the new frame: A' = P A, B' = B P^T, elementwise squares for the second."""
    turned = {}
    for key, tensor in moments.items():
        group, name = key.split("/", 1)
        if group == "A":
            tensor = state[f"frame/{name}"].pow(power) @ tensor
        elif group == "B":
            tensor = tensor @ state[f"frame/{name}"].pow(power).mT
        turned[key] = tensor
    return turned

"""How do several PEFT adapters become one? Their products are averaged and cut to a rank; no model, no data.

    merged update of a layer = the best rank-r approximation of  sum_j w_j s_j B_j A_j,    sum_j w_j = 1

Adapters may have any ranks and scalings. Averaging the factors A and B themselves would be another thing: the product
of averages is not the average of products.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.adapters.saved import Saved, layers_of
from decaf_lora.errors import UserError


@dataclass(frozen=True)
class Merged:
    """What several adapters became."""

    adapter: Adapter
    """The merged adapter, alone on the leading axis."""
    config: dict[str, Any]
    """Its adapter_config.json."""
    weights: tuple[float, ...]
    """What each adapter counts; their sum is 1."""
    rank: int
    lost: dict[str, float]
    """Layer -> norm of what the truncation to `rank` cut, as a share of the norm of the layer's averaged update."""
    lost_in_all: float
    """The same of all layers together."""


def average(found: Sequence[Saved], weights: Sequence[float] | None = None, rank: int | None = None) -> Merged:
    """The average of adapters that are alike (`alike.check_alike`), without reading or writing a file.

    Args:
        found: the adapters.
        weights: what each counts, in proportion; None: equally much.
        rank: of the result; None: the largest rank of the adapters.

    Raises:
        UserError: weights or a rank that make no sense.
    """
    shares = _shares(weights, len(found))
    largest = max(one.rank(layer) for one in found for layer in layers_of(one.tensors))
    most = max(min(_shape(found[0], layer)) for layer in layers_of(found[0].tensors))
    if rank is not None and not 1 <= rank <= most:
        raise UserError(f"rank: {rank} is not a rank of these layers; give 1 to {most}.")
    return _merge(found, shares, largest if rank is None else rank)


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1 / count,) * count
    if len(weights) != count:
        raise UserError(f"weights: {len(weights)} given for {count} adapters; give one for each.")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not sum(weights) > 0:
        raise UserError(
            f"weights: {', '.join(f'{w:g}' for w in weights)} do not make an average; give numbers of at least 0 that "
            "are not all 0."
        )
    return tuple(w / sum(weights) for w in weights)


def _merge(found: Sequence[Saved], shares: tuple[float, ...], rank: int) -> Merged:
    layers = layers_of(found[0].tensors)
    scales = {one.scale(layer) for one in found for layer in layers}
    scale = scales.pop() if len(scales) == 1 else 1.0
    a: Tensors = {}
    b: Tensors = {}
    ranks: dict[str, int] = {}
    lost: dict[str, float] = {}
    tails, norms = [], []
    for layer in layers:
        factors = [(one.tensors[f"{layer}.lora_A.weight"], one.tensors[f"{layer}.lora_B.weight"]) for one in found]
        ranks[layer] = min(rank, factors[0][0].shape[1], factors[0][1].shape[0])
        mix = [w * one.scale(layer) / scale for w, one in zip(shares, found, strict=True)]
        a[layer], b[layer], tail, norm = _average(factors, mix, ranks[layer])
        tails.append(scale * tail)
        norms.append(scale * norm)
        lost[layer] = tail / norm if norm else 0.0
    whole = math.hypot(*norms)
    counts = torch.tensor(shares, dtype=torch.float64)
    extras = {
        name: torch.tensordot(counts, torch.stack([one.tensors[name].double() for one in found]), 1)[None].to(tensor)
        for name, tensor in found[0].tensors.items()
        if ".lora_" not in name
    }
    adapter = Adapter(a, b, {layer: torch.tensor([scale]) for layer in layers}, extras)
    in_all = math.hypot(*tails) / whole if whole else 0.0
    return Merged(adapter, _config(found, rank, scale, ranks), shares, rank, lost, in_all)


def _average(
    factors: Sequence[tuple[Tensor, Tensor]], mix: Sequence[float], rank: int
) -> tuple[Tensor, Tensor, float, float]:
    """The best rank-`rank` approximation of sum_j mix_j B_j A_j.

    Returns:
        A (1, rank, d_in), B (1, d_out, rank), and the Frobenius norms of what was cut and of the whole sum.
    """
    largest = max(len(a) for a, _ in factors)
    # Smaller ranks are filled up with zeros. float64, so that adapters that nearly cancel each other keep their digits.
    stack_a = torch.stack([pad(a.double(), (0, 0, 0, largest - len(a))) for a, _ in factors])
    stack_b = torch.stack([pad(b.double(), (0, largest - len(a))) for a, b in factors])
    out = lowrank.mix_truncate(stack_a, stack_b, torch.tensor(mix, dtype=torch.float64), rank)
    kept = float(lowrank.product_norm(out.A, out.B))
    tail = float(out.tail)
    dtype = torch.promote_types(factors[0][0].dtype, torch.float32)
    return out.A[None].to(dtype), out.B[None].to(dtype), tail, math.hypot(kept, tail)


def _shape(saved: Saved, layer: str) -> tuple[int, int]:
    """(d_out, d_in) of a layer."""
    a, b = (saved.tensors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
    return b.shape[0], a.shape[1]


def _config(found: Sequence[Saved], rank: int, scale: float, ranks: dict[str, int]) -> dict[str, Any]:
    """The first adapter's configuration with one rank and one lora_alpha / r for all layers.

    A layer that is too small for the rank has its own, with the same lora_alpha / r.
    """
    from peft import LoraConfig

    small = {layer: own for layer, own in ranks.items() if own != rank}
    said = ("base_model_name_or_path", "revision")
    named = [{k: v for k, v in one.config.items() if k in said and v} for one in found]
    values = {
        **found[0].config,
        **collections.ChainMap(*named),
        "r": rank,
        "lora_alpha": _whole(scale * rank),
        "use_rslora": False,
        "rank_pattern": {_literally(layer): own for layer, own in small.items()},
        "alpha_pattern": {_literally(layer): _whole(scale * own) for layer, own in small.items()},
        "target_modules": layers_of(found[0].tensors),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    known = LoraConfig.__dataclass_fields__
    return {name: value for name, value in values.items() if name in known or name == "peft_type"}


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def _literally(layer: str) -> str:
    """A pattern of PEFT that matches this layer alone."""
    return "^" + layer.replace(".", r"\.")


def describe(merged: Merged, count: int) -> str:
    """One line for people: what was merged, and what the truncation lost."""
    counts = ", ".join(f"{w:.3g}" for w in merged.weights)
    told = f"{count} adapters (weights {counts}) at rank {merged.rank}"
    worst = max(merged.lost, key=merged.lost.__getitem__, default=None)
    if worst is None or merged.lost[worst] < 1e-6:
        return f"{told}; nothing was lost"
    return f"{told}; the cut lost {merged.lost_in_all:.1%} of the update, at most {merged.lost[worst]:.1%}, in {worst}"

"""Truncation error feedback: what DeCAF's truncation cuts is not dropped but added to the next mix. No extra bytes.

    Z_i = sum_j Pi_ij s_j B_j A_j + f s_i R_i ;   s_i B_i A_i = TSVD_r(Z_i) ;   s_i R_i <- TSVD_r(Z_i - TSVD_r(Z_i))

R_i = 0 at the start. It is the next r singular directions of the same Z_i, so it costs no second SVD, stays a product
of rank r, which needs no frame, and is never sent. f in (0, 1] is the leak. With f = 1, and where rank 2 r holds Z_i,
nothing is lost: Pi is doubly stochastic, so sum_i s_i (B_i A_i + R_i) does not change by mixing. What lies beyond
rank 2 r is lost as before, and so is what a relay cuts between the exchanges of a round. The records' `tail` stays
what truncating the messages alone would cut.

Error feedback: Seide, Fu, Droppo, Li and Yu, Interspeech 2014; Karimireddy, Rebjock, Stich and Jaggi, arXiv 1901.09847,
there for compressed gradients. The leak, the low rank of the memory, and its use on the product consensus are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import put
from decaf_lora.algorithms.contract import State
from decaf_lora.errors import UserError

PREFIX = "feedback/"
"""Of the names in the state: feedback/A/LAYER (n, r, d_in) and feedback/B/LAYER (n, d_out, r), R_i."""


def check(leak: float | None) -> None:
    """UserError for a leak that is none."""
    if leak is not None and not 0 < leak <= 1:
        raise UserError(f"algorithm.truncation_feedback: {leak:g} is not above 0 and at most 1.")


def init(adapter: Adapter) -> State:
    """R = 0."""
    factors = adapter.tensors(frozenset({"A", "B"}))
    return put(PREFIX, {k: torch.zeros_like(t) for k, t in factors.items()})


def carried(state: State, layers: list[str], receivers: Tensor, leak: float) -> tuple[Tensor, Tensor]:
    """(L, g, r, d_in), (L, g, d_out, r): f R of layers of one shape, for some agents."""
    a, b = (torch.stack([state[f"{PREFIX}{factor}/{k}"] for k in layers])[:, receivers] for factor in "AB")
    return a, leak * b


def kept(layers: list[str], a: Tensor, b: Tensor) -> State:
    """The state of new R, (L, n, r, d_in) and (L, n, d_out, r)."""
    return {f"{PREFIX}A/{k}": t for k, t in zip(layers, a, strict=True)} | {
        f"{PREFIX}B/{k}": t for k, t in zip(layers, b, strict=True)
    }

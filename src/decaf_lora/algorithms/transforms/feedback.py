"""Truncation error feedback: what DeCAF's truncation cuts is not dropped but added to the next mix. No extra bytes.

    Z_i = sum_j Pi_ij s_j B_j A_j + f s_i R_i ;   s_i B_i A_i = TSVD_r(Z_i) ;   s_i R_i <- TSVD_r(Z_i - TSVD_r(Z_i))

R_i = 0 at the start. R_i holds the next r singular directions of the same Z_i, so it costs no second SVD. It is kept as
a product of rank r, which needs no frame, and is never sent. f in (0, 1] is the leak. With f = 1, and where rank 2 r
holds Z_i, nothing is lost: Pi is doubly stochastic, so mixing does not change sum_i s_i (B_i A_i + R_i). What lies
beyond rank 2 r is lost as before, and so is what a relay cuts between the exchanges of a round. The records' `tail`
still says what truncating the messages alone would cut.

Error feedback: Seide, Fu, Droppo, Li and Yu, Interspeech 2014; Karimireddy, Rebjock, Stich and Jaggi, arXiv 1901.09847,
there for compressed gradients. The leak, the low rank of the memory, and its use on the product consensus are ours.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Change, Round, Rule, Setting, Transform
from decaf_lora.algorithms.inbox import Inbox
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError


def feedback(leak: float = 1.0) -> Transform:
    """Truncation error feedback. The state holds R_i as A/LAYER (n, r, d_in) and B/LAYER (n, d_out, r).

    Args:
        leak: f in (0, 1], how much of what was cut comes back.

    Raises:
        UserError: `leak` is out of range, or the rule truncates nothing.
    """
    if not 0 < leak <= 1:
        raise UserError(f"algorithm.truncation_feedback: {leak:g} is not above 0 and at most 1.")

    def check(rule: Rule) -> None:
        if not rule.truncates:
            raise UserError(
                f"algorithm.truncation_feedback: {rule.name} truncates nothing; leave it out, or use decaf."
            )

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        return {name: torch.zeros_like(t) for name, t in adapter.tensors(frozenset({"A", "B"})).items()}

    def receive(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> tuple[Inbox, Tensors]:
        carried = {name: leak * t if name.startswith("B/") else t for name, t in state.items()}
        return replace(inbox, carried=carried), state

    def after(state: Tensors, change: Change, round_: Round) -> Tensors:
        return dict(change.rest)

    return Transform("feedback", init, receive=receive, after=after, check=check)


def _asked(truncation_feedback: float | None = None) -> Transform | None:
    return None if truncation_feedback is None else feedback(truncation_feedback)


KINDS = {"feedback": TransformKind(feedback, "truncation error feedback", "feedback:1", place=10, asked=_asked)}

"""Which transforms do the options of dlora, dlora_fa and decaf stand for, and in which order?"""

from __future__ import annotations

from typing import Literal

from decaf_lora.algorithms.contract import Rule
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.algorithms.transforms.feedback import feedback
from decaf_lora.algorithms.transforms.int8 import int8
from decaf_lora.algorithms.transforms.quasi_global import quasi_global as quasi_global_momentum
from decaf_lora.algorithms.transforms.tracking import tracking as gradient_tracking
from decaf_lora.errors import unknown

Messages = Literal["full", "int8"]


def with_options(
    rule: Rule,
    *,
    tracking: bool,
    tracking_gamma: float,
    quasi_global: float | None,
    messages: str,
    truncation_feedback: float | None = None,
) -> Algorithm:
    """`rule` with the options that are set, from the inside: feedback, quasi-global momentum, tracking, int8.

    int8 comes last, so that corrections are coded too.
    """
    if messages not in ("full", "int8"):
        raise unknown("algorithm.messages", messages, ("full", "int8"))
    chosen = [
        None if truncation_feedback is None else feedback(truncation_feedback),
        None if quasi_global is None else quasi_global_momentum(quasi_global),
        gradient_tracking(tracking_gamma) if tracking else None,
        int8() if messages == "int8" else None,
    ]
    return chain(rule, *(transform for transform in chosen if transform is not None))

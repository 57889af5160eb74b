"""Which transforms lie over a rule, and in which order? The options that dlora, dlora_fa and decaf share."""

from __future__ import annotations

from typing import Literal

from decaf_lora.algorithms.contract import Algorithm
from decaf_lora.algorithms.transforms.int8 import quantized
from decaf_lora.algorithms.transforms.quasi_global import quasi_global_momentum
from decaf_lora.algorithms.transforms.tracking import tracked
from decaf_lora.errors import unknown

Messages = Literal["full", "int8"]


def with_options(
    algorithm: Algorithm, tracking: bool, tracking_gamma: float, quasi_global: float | None, messages: str
) -> Algorithm:
    """`algorithm` with the options that are set: quasi-global momentum, over it tracking, around all int8 messages."""
    if messages not in ("full", "int8"):
        raise unknown("algorithm.messages", messages, ("full", "int8"))
    if quasi_global is not None:
        algorithm = quasi_global_momentum(algorithm, quasi_global)
    if tracking:
        algorithm = tracked(algorithm, tracking_gamma)
    return quantized(algorithm) if messages == "int8" else algorithm

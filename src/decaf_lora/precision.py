"""In which precision is something computed? One rule for what sums or factorizes in float64, one for forward passes.

Decompositions, averages and sums over many steps need more digits than float32 has. Apple's GPUs have no float64, so
there such work goes to the CPU. On any other device it stays where it is.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


Precision = Literal["float32", "bfloat16"]
"""Of forward and backward passes; bfloat16 is autocast."""


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass in `precision`."""
    if precision == "float32":
        return contextlib.nullcontext()  # not every device has an autocast to switch off
    return torch.autocast(device.type, dtype=torch.bfloat16)


def work_device(device: torch.device) -> torch.device:
    """The device on which float64 work on tensors of `device` is done."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def double(x: Tensor) -> Tensor:
    """`x` in float64, contiguous, on its `work_device`; the very same tensor if `x` is that already."""
    # The move comes before the conversion, since a device without float64 cannot convert.
    return x.to(work_device(x.device)).to(torch.float64, memory_format=torch.contiguous_format)

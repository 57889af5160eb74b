"""On which device is float64 computed? One rule for everything that sums or factorizes in float64.

Decompositions, averages and sums over many steps need more digits than float32 has. Apple's GPUs have no float64, so
there such work goes to the CPU. On any other device it stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


def work_device(device: torch.device) -> torch.device:
    """The device on which float64 work on tensors of `device` is done."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def double(x: Tensor) -> Tensor:
    """`x` in float64, contiguous, on its `work_device`; the very same tensor if `x` is that already."""
    # The move comes before the conversion, since a device without float64 cannot convert.
    return x.to(work_device(x.device)).to(torch.float64, memory_format=torch.contiguous_format)

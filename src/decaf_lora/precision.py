"""Where is there float64? One rule, for all that sums or factorizes in it.

Decompositions, averages and sums over many steps need more digits than float32 has. Apple's GPUs have no float64, so
what is computed in it goes to the CPU there, and on any other device stays where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


def work_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what lies on `device`."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def double(x: Tensor) -> Tensor:
    """`x` in float64 on its work device, contiguous; the same tensor if it is that already."""
    # First the device: on the way there a device without float64 must not be asked for it.
    return x.to(work_device(x.device)).to(torch.float64, memory_format=torch.contiguous_format)

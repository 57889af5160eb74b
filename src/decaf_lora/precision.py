"""In which precision is something computed? One rule for what sums or factorizes in float64, one for passes.

Decompositions, averages and sums over many steps need more digits than float32 has. Apple's GPUs have no float64, so
there such work goes to the CPU. On any other device it stays where it is.

On a CPU, attention over short sequences is computed in float32 where the rest of a pass is in bfloat16: PyTorch's
backward of attention multiplies head by head, and a small product takes far longer to set up in bfloat16 than to
compute (20 tokens, 12 heads of 32: 12.2 ms in bfloat16, 1.6 ms in float32).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Types of devices that have no float64."""


Precision = Literal["float32", "bfloat16"]
"""Of forward and backward passes; bfloat16 is autocast."""


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context of a forward pass in `precision`."""
    if precision == "float32":
        return contextlib.nullcontext()  # not every device has an autocast to switch off
    return torch.autocast(device.type, dtype=torch.bfloat16)


SHORT = 128
"""Keys up to which attention and its backward pass are as fast in float32 on a CPU as in bfloat16, or faster: measured
with heads of 32, 64 and 128 numbers."""

_attention = functional.scaled_dot_product_attention
_passes, _lock = 0, threading.Lock()


def _short_in_float32(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **named: Any
) -> Tensor:
    """`scaled_dot_product_attention`; bfloat16 attention over at most `SHORT` keys computes in float32."""
    kind, half = query.device.type, torch.bfloat16
    rounded = query.dtype == torch.float32 and torch.is_autocast_enabled(kind)
    computed = torch.get_autocast_dtype(kind) if rounded else query.dtype
    if kind != "cpu" or key.shape[-2] > SHORT or computed != half:
        return _attention(query, key, value, attn_mask, *more, **named)
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.float()
    with torch.autocast(kind, enabled=False):  # it would round the inputs
        return _attention(query.float(), key.float(), value.float(), attn_mask, *more, **named).to(half)


@contextlib.contextmanager
def short_attention(device: torch.device, formats: Collection[torch.dtype]) -> Iterator[None]:
    """The context of a forward and a backward pass on `device`: short attention in float32 where that is faster.

    PyTorch's function is replaced for the time of the pass. A TorchFunctionMode would not reach activations that the
    backward pass computes again, and checkpointing refuses what it computes in another format than the first time.

    Args:
        device: of the model.
        formats: in which the pass computes.
    """
    global _attention, _passes
    if device.type != "cpu" or torch.bfloat16 not in formats:
        yield
        return
    with _lock:  # passes of several threads may overlap
        if not _passes:
            _attention = functional.scaled_dot_product_attention
            functional.scaled_dot_product_attention = _short_in_float32
        _passes += 1
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if not _passes:
                functional.scaled_dot_product_attention = _attention


def work_device(device: torch.device) -> torch.device:
    """The device on which float64 work on tensors of `device` is done."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def double(x: Tensor) -> Tensor:
    """`x` in float64, contiguous, on its `work_device`; the very same tensor if `x` is that already."""
    # The move comes before the conversion, since a device without float64 cannot convert.
    return x.to(work_device(x.device)).to(torch.float64, memory_format=torch.contiguous_format)

"""Where do random numbers come from?

Every draw is named: its generator is a pure function of (seed, keys), for instance (seed, "batches", agent, epoch).
There is no global seed and no generator state to save. So exactly the same numbers are drawn by a resumed run, with
another number of processes, and with another number of agents a pass.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # graphs and partitions draw with numpy alone, and must not wait for torch
    import torch


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed from `seed` and the keys that name the draw; the same on all platforms and versions."""
    text = "\x1f".join([str(int(seed)), *(f"{type(key).__name__}:{key}" for key in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *keys: int | str, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """A fresh `torch.Generator` for the draw named by `keys`."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))


def numpy_generator(seed: int, *keys: int | str) -> np.random.Generator:
    """A fresh `numpy.random.Generator` for the draw named by `keys`."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *keys)))

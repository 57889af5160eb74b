"""Adapters of random numbers, small and in float64, and what they stand for."""

import dataclasses

import torch

from decaf_lora.adapters.adapter import Adapter

LAYERS = {"x": (2, 6, 5), "y": (2, 6, 5), "z": (3, 4, 8)}  # r, d_in, d_out


def make_adapter(n, seed=0, common_a=False, unequal=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def draw_a(r, d):
        return draw(1, r, d).repeat(n, 1, 1) if common_a else draw(n, r, d)

    adapter = Adapter(
        A={k: draw_a(r, i) for k, (r, i, _) in LAYERS.items()},
        B={k: draw(n, o, r) for k, (r, _, o) in LAYERS.items()},
        scale={k: torch.full((n,), 2.0, dtype=torch.float64) for k in LAYERS},
        extras={"head.weight": draw(n, 3, 4)},
    )
    if not unequal:
        return adapter
    scales = {k: 0.5 + torch.arange(n, dtype=torch.float64) % 4 for k in LAYERS}
    ranks = {k: 1 + torch.arange(n) % r for k, (r, _, _) in LAYERS.items()}
    adapter = dataclasses.replace(adapter, scale=scales, ranks=ranks)
    return adapter.with_tensors(adapter.trim(adapter.tensors()))


def products(adapter, layer):
    return adapter.scale[layer][:, None, None] * (adapter.B[layer] @ adapter.A[layer])


def random_gradients(adapter, trained, seed):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(t.shape, generator=generator, dtype=t.dtype) for k, t in adapter.tensors(trained).items()}

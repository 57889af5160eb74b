"""Payloads: how does a message become bytes, and which bytes may become a message?

Payloads are safetensors files, so nothing that arrives is ever executed. Before any of it is used, a payload is
compared with a template of the messages of its exchange.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from decaf_lora.adapters.names import Tensors
from decaf_lora.engines.base import Sizes
from decaf_lora.engines.mesh.outcome import RejectionError

LARGEST = 100.0
"""A message whose norm is more than this many times that of the own message is refused. Many messages begin at 0, so
the own norm counts as at least 1, and as at least a root mean square of 0.01."""


def own_part(message: Tensors, sizes: Sizes, agent: int) -> Tensors:
    """The part of a message that travels: without what lies beyond the agent's own size.

    Args:
        message: name -> (1, ...).
        sizes: of every agent, where agents differ.
        agent: number of the agent that sends it.
    """
    return {name: _cut(name, tensor, sizes, agent) for name, tensor in message.items()}


def pack(message: Tensors, sizes: Sizes, agent: int) -> bytes:
    """The bytes of `own_part`."""
    return save({name: tensor.cpu().contiguous() for name, tensor in own_part(message, sizes, agent).items()})


def norm(message: Tensors) -> float:
    """Frobenius norm of all floating-point tensors of a message together; not finite if one of them is not."""
    floats = [t for t in message.values() if t.is_floating_point()]
    return math.sqrt(sum(float(t.double().square().sum()) for t in floats))


@dataclass(frozen=True)
class Template:
    """What the messages of an exchange look like. Only names, shapes and dtypes count, not the values."""

    message: Tensors
    """name -> (1, ...), of this agent."""
    sizes: Sizes

    def unpack(self, payload: bytes, sender: int, own_norm: float) -> Tensors:
        """A neighbour's message, filled up with zeros beyond the neighbour's own size.

        Args:
            payload: bytes of a safetensors file.
            sender: number of the neighbour.
            own_norm: norm of this agent's message, for comparison.

        Returns:
            name -> (1, ...).

        Raises:
            RejectionError: the payload is no message of this kind; says why.
        """
        try:
            tensors = load(payload)
        except (SafetensorError, ValueError, KeyError) as error:
            raise RejectionError(f"it is no safetensors file ({str(error).splitlines()[0]:.80})") from None
        if tensors.keys() != self.message.keys():
            other = sorted(tensors.keys() ^ self.message.keys())[0]
            where = "has a tensor too many" if other in tensors else "lacks a tensor"
            raise RejectionError(f"it {where}: {other:.80}")
        out = {}
        for name, own in self.message.items():
            got, expected = tensors[name], _cut(name, own, self.sizes, sender)
            if got.dtype != expected.dtype or got.shape != expected.shape:
                raise RejectionError(f"{name} is {_kind(got)}, not {_kind(expected)}")
            if got.is_floating_point() and not torch.isfinite(got).all():
                raise RejectionError(f"{name} is not finite")
            out[name] = _fill(got, own)
        numbers = sum(t.numel() for t in out.values())
        if (theirs := norm(out)) > LARGEST * max(own_norm, 1.0, 0.01 * math.sqrt(numbers)):
            raise RejectionError(f"its norm is {theirs:.3g}, over {LARGEST:g} times the own {own_norm:.3g}")
        return out

    def facts(self) -> bytes:
        """SHA-256 over names, shapes and dtypes, which both ends of an edge must share."""
        named = sorted((name, str(t.dtype), list(t.shape[1:])) for name, t in self.message.items())
        return hashlib.sha256(json.dumps(named).encode()).digest()


def _cut(name: str, tensor: Tensor, sizes: Sizes, agent: int) -> Tensor:
    if name not in sizes:
        return tensor
    axis, own = sizes[name]
    return tensor.narrow(axis, 0, own[agent])


def _fill(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.shape == like.shape:
        return tensor
    whole = torch.zeros(like.shape, dtype=like.dtype)
    whole[tuple(slice(0, n) for n in tensor.shape)] = tensor
    return whole


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

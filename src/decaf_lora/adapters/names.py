"""How are tensors named? As a path with `/` between its parts: first the owner, last the layer or parameter.

    A/LAYER  B/LAYER  extras/PARAMETER      the trained tensors of an adapter, and core/LAYER where there are cores
    scale/LAYER                             an agent's LoRA scaling, where agents differ
    tracking/A/LAYER  int8/code/A/LAYER     what a transform adds to a message: the transform's name comes first
    rule/a_scale/LAYER                      the state of an algorithm in a checkpoint: the part's name comes first

Names of layers and parameters hold dots, never slashes.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

Tensors = dict[str, Tensor]
"""Tensors by name; the agents of this process are the leading axis of each."""


def owner(name: str) -> str:
    """The first part of a name: `tracking` of `tracking/A/layer`."""
    return name.split("/", 1)[0]


def factor_and_layer(name: str) -> tuple[str, str]:
    """The last two parts of a name: `A` and `layer` of `int8/code/A/layer`. The factor of a one-part name is ""."""
    front, _, layer = name.rpartition("/")
    return front.rpartition("/")[2], layer


def take(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors whose names start with `prefix`, without the prefix."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def put(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` with `prefix` put before every name."""
    return {prefix + name: t for name, t in tensors.items()}


def leave(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors whose names do not start with `prefix`."""
    return {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def flattened(parts: Mapping[str, Tensors]) -> Tensors:
    """Nested part -> name -> tensor to flat `part/name` -> tensor."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def parted(tensors: Mapping[str, Tensor], parts: Mapping[str, object]) -> dict[str, Tensors]:
    """Flat `part/name` -> tensor to nested part -> name -> tensor, an entry for each of `parts`; undoes `flattened`."""
    return {part: take(f"{part}/", tensors) for part in parts}

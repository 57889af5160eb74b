"""How are tensors named? A path of parts with `/` between them: whose it is first, the layer or parameter last.

    A/LAYER  B/LAYER  extras/PARAMETER      the trained tensors of an adapter
    scale/LAYER                             an agent's LoRA scaling, where agents differ
    tracking/A/LAYER  int8/code/A/LAYER     what a transform adds to a message: its own name in front
    rule/a_scale/LAYER                      the state of an algorithm in a checkpoint: the part's name in front

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
    """The last two parts of a name: `A` and `layer` of `int8/code/A/layer`; no factor of a name with one part."""
    front, _, layer = name.rpartition("/")
    return front.rpartition("/")[2], layer


def take(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Those of `tensors` whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def put(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` under names with `prefix` in front."""
    return {prefix + name: t for name, t in tensors.items()}


def leave(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` but for those whose names start with `prefix`."""
    return {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def flattened(parts: Mapping[str, Tensors]) -> Tensors:
    """part -> name -> tensor as `part/name` -> tensor."""
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def parted(tensors: Mapping[str, Tensor], parts: Mapping[str, object]) -> dict[str, Tensors]:
    """`part/name` -> tensor as part -> name -> tensor, with an entry for each of `parts`: undoes `flattened`."""
    return {part: take(f"{part}/", tensors) for part in parts}

"""How are tensors named? A path of parts, such as `A/layer` or `track/c/A/layer`: owner first, layer last."""

from __future__ import annotations

from decaf_lora.adapters.adapter import Tensors


def take(prefix: str, tensors: Tensors) -> Tensors:
    """Those of `tensors` whose names start with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def put(prefix: str, tensors: Tensors) -> Tensors:
    """`tensors` under names with `prefix` in front."""
    return {prefix + name: t for name, t in tensors.items()}


def leave(prefix: str, tensors: Tensors) -> Tensors:
    """`tensors` but for those whose names start with `prefix`: what belongs to the algorithm underneath."""
    return {name: t for name, t in tensors.items() if not name.startswith(prefix)}

"""Which adapters may be merged? Those of one base, one set of layers, equal heads, and one order of labels."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decaf_lora.adapters.saved import Saved, layers_of
from decaf_lora.errors import UserError, listed


def check_alike(found: Sequence[Saved], compare_bases: bool = True) -> None:
    """Checks that adapters may be merged; warns of what cannot be compared.

    Args:
        found: the adapters.
        compare_bases: whether their configurations must name the same base model.

    Raises:
        UserError: names what differs, and in which two adapters.
    """
    for one in found:
        _check_tensors(one)
    if compare_bases:
        _check_bases(found)
    for other in found[1:]:
        _check_layers(found[0], other)
        _check_heads(found[0], other)
    if _heads(found[0]):
        _check_labels(found)


def _check_layers(first: Saved, other: Saved) -> None:
    pair = f"{first.directory} and {other.directory}"
    one, two = set(layers_of(first.tensors)), set(layers_of(other.tensors))
    if one != two:
        raise UserError(
            f"merge: {pair} adapt different layers; {_some(one - two, first)}{_some(two - one, other)} "
            "Train them with the same lora.target_modules."
        )
    for layer in sorted(one):
        sizes = [_sizes(saved, layer) for saved in (first, other)]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"merge: {pair} are of different models; {layer} is {sizes[0]} in one, {sizes[1]} in the other."
            )


def _check_heads(first: Saved, other: Saved) -> None:
    heads = [_heads(first), _heads(other)]
    for name in sorted(heads[0].keys() | heads[1].keys()):
        if heads[0].get(name) != heads[1].get(name):
            shapes = " and ".join(str(of.get(name, "missing")) for of in heads)
            raise UserError(
                f"merge: {first.directory} and {other.directory} differ in {name}, which is trained in full ({shapes})."
            )


def _heads(saved: Saved) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that were trained in full."""
    return {name: tuple(tensor.shape) for name, tensor in saved.tensors.items() if ".lora_" not in name}


def labels_of(directory: Path) -> list[str] | None:
    """The names of the classes in the order of the head's outputs.

    They are read from labels.json, else from config.json. None if neither file holds them.
    """
    for name in ("labels.json", "config.json"):
        try:
            given = json.loads((directory / name).read_text(encoding="utf-8"))["id2label"]
            return [str(given[number]) for number in sorted(given, key=int)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None


def _check_tensors(saved: Saved) -> None:
    """UserError for tensors that do not fit the configuration, or that belong to something else than a linear layer."""
    path = saved.directory / "adapter_model.safetensors"
    layers = layers_of(saved.tensors)
    if not layers:
        raise UserError(f"merge: {path} has no LoRA layers.")
    expected = {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    for name in sorted(expected ^ {name for name in saved.tensors if ".lora_" in name}):
        fault = "is missing" if name in expected else "is not supported; only LoRA of linear layers can be merged"
        raise UserError(f"merge: {path}: {name} {fault}.")
    for layer in layers:
        a, b = (saved.tensors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
        if a.dim() != 2 or b.dim() != 2 or not len(a) == b.shape[1] == saved.rank(layer):
            shapes = f"{tuple(b.shape)} times {tuple(a.shape)}"
            raise UserError(f"merge: {path}: {layer} is {shapes}, its rank in adapter_config.json {saved.rank(layer)}.")


def _check_bases(found: Sequence[Saved]) -> None:
    for field in ("base_model_name_or_path", "revision", "task_type"):
        given = [(saved, _same(saved.config.get(field))) for saved in found]
        known = [(saved, value) for saved, value in given if value]
        if field == "base_model_name_or_path":
            for saved, value in given:
                if not value:
                    warnings.warn(
                        f"merge: {saved.directory} does not say which base model it belongs to; it is taken to be the "
                        "others'.",
                        stacklevel=4,
                    )
        for saved, value in known[1:]:
            if value != known[0][1]:
                hint = (
                    "; if they are the same model under two names, say so with --base" if field != "task_type" else ""
                )
                raise UserError(
                    f"merge: {known[0][0].directory} and {saved.directory} have different {field}: {known[0][1]} and "
                    f"{value}{hint}."
                )


def _same(value: Any) -> str:
    """The name of a model, by which two are compared; of a directory its resolved path."""
    path = Path(str(value)).expanduser() if value else None
    return str(path.resolve()) if path is not None and path.is_dir() else str(value or "")


def _check_labels(found: Sequence[Saved]) -> None:
    """UserError where the heads of two adapters have their classes in different orders."""
    orders = [(saved, labels_of(saved.directory)) for saved in found]
    known = [(saved, labels) for saved, labels in orders if labels]
    for saved, labels in known[1:]:
        if labels != known[0][1]:
            raise UserError(
                f"merge: the heads of {known[0][0].directory} and {saved.directory} have their classes in different "
                f"orders: {listed(known[0][1])} and {listed(labels)}. Train them with the same task.classes."
            )
    if len(known) < len(orders):
        silent = next(saved for saved, labels in orders if not labels)
        warnings.warn(
            f"merge: {silent.directory} does not say which class each output of its head is for (no labels.json); the "
            "order is taken to be the others'.",
            stacklevel=4,
        )


def _sizes(saved: Saved, layer: str) -> str:
    a, b = (saved.tensors[f"{layer}.lora_{factor}.weight"] for factor in "AB")
    return f"{b.shape[0]} x {a.shape[1]}"


def _some(names: set[str], saved: Saved) -> str:
    return f"only {saved.directory} adapts {listed(sorted(names))}." if names else ""

"""What does each field of a LoRA configuration mean here? One rule, for a run's own and for saved adapters.

A field is honoured, has no effect on what an adapter computes, or is refused by name unless it is off. So an adapter
never means something else here than it means in PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from decaf_lora.errors import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

HONOURED = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "lora_dropout"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
    }
)
WITHOUT_EFFECT = frozenset(
    {
        # What an adapter is called, and where it comes from.
        *("base_model_name_or_path", "revision", "peft_type", "peft_version", "task_type", "auto_mapping"),
        # How PEFT holds an adapter. The layout of a base weight matters only to code that writes into the weight.
        *("inference_mode", "runtime_config", "megatron_core", "fan_in_fan_out"),
        # Settings of options that are refused where they are on: `init_lora_weights` and `use_qalora`.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
    }
)
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` under which the saved factors are all that an adapter adds to its base."""

MOST = 2**31
"""The largest rank and alpha that are taken for one. Larger numbers are faults of a file, and fit no tensor."""


def check_own(config: LoraConfig) -> None:
    """Checks a run's own configuration.

    Raises:
        UserError: a field is not supported, or its value has no meaning.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for field in _refused(values):
        raise UserError(f"lora.{field}: this option of LoraConfig is not supported; leave it out.")
    if config.init_lora_weights not in (True, "gaussian"):
        raise UserError(
            f"lora.init_lora_weights: {config.init_lora_weights!r} is not supported; use true or 'gaussian'."
        )
    for field, fault in _faults(values):
        raise UserError(f"lora.{field}: {fault}")


def check_saved(values: Any, path: str, field: str) -> dict[str, Any]:
    """The fields of an adapter that means the same here as in PEFT.

    Args:
        values: the content of adapter_config.json.
        path: where the content was read, for errors.
        field: the option that named the adapter, for errors.

    Raises:
        UserError: another type of adapter than LoRA, a field that is not supported, or a value without a meaning.
    """
    if not isinstance(values, dict):
        raise UserError(f"{field}: {path} holds no fields ({type(values).__name__}); it is no configuration of PEFT.")
    if values.get("peft_type") != "LORA":
        raise UserError(f"{field}: {path} is of an adapter of type {values.get('peft_type')}, not LORA.")
    for name in ("r", "lora_alpha"):
        if name not in values:
            raise UserError(f"{field}: {path} has no {name}; save the adapter again with PEFT.")
    for name in _refused(values):
        raise UserError(
            f"{field}: {path} has {name} {values[name]!r}, which is not supported; only plain LoRA can be taken over."
        )
    start = values.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise UserError(f"{field}: {path} has init_lora_weights {start!r}: {_how_to_convert(str(start))}")
    for name, fault in _faults(values):
        raise UserError(f"{field}: {path}: {name}: {fault}")
    return dict(values)


def _refused(values: Mapping[str, Any]) -> list[str]:
    """Fields that are neither honoured nor without effect, and that are not off; also fields of later PEFT versions."""
    defaults = _defaults()
    asked = sorted(values.keys() - HONOURED - WITHOUT_EFFECT)
    off: list[Any] = [None, False, [], {}, ""]
    return [name for name in asked if values[name] != defaults.get(name) and values[name] not in off]


@functools.cache
def _defaults() -> dict[str, Any]:
    """The fields of a `LoraConfig` in which nothing was set."""
    from peft import LoraConfig

    return {f.name: getattr(LoraConfig(), f.name) for f in dataclasses.fields(LoraConfig)}


def _faults(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, fault) for every number and every pattern that has no meaning."""
    found: list[tuple[str, str]] = []
    ranks = {"r": values["r"]} | _pattern(values, "rank_pattern", found)
    alphas = {"lora_alpha": values["lora_alpha"]} | _pattern(values, "alpha_pattern", found)
    for name, rank in ranks.items():
        if isinstance(rank, bool) or not isinstance(rank, numbers.Integral) or not 1 <= int(rank) <= MOST:
            found.append((name, f"{_short(rank)} is no rank; give a whole number of at least 1."))
    for name, alpha in alphas.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MOST:
            found.append((name, f"{_short(alpha)} is no scaling; give a number above 0."))
    dropout = values.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        found.append(("lora_dropout", f"{_short(dropout)} is no share of inputs; give a number from 0 to below 1."))
    if not isinstance(values.get("use_rslora", False), bool):
        found.append(("use_rslora", f"{values['use_rslora']!r} is neither true nor false."))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(values.get(name), str) and (fault := _not_a_pattern(values[name])):
            found.append((name, fault))
    for pattern in [p for p in _listed(values.get("layers_pattern")) if isinstance(p, str)]:
        if fault := _not_a_pattern(pattern):
            found.append(("layers_pattern", fault))
    for name, (kinds, inner, what) in _KINDS.items():
        value = values.get(name)
        listed = isinstance(value, list | tuple | set) and all(type(one) is inner for one in value)
        if value is not None and not listed and not (type(value) is inner and inner in kinds):
            found.append((name, f"{value!r} is neither unset nor {what}."))
    return found


_KINDS: dict[str, tuple[tuple[type, ...], type, str]] = {
    "target_modules": ((str,), str, "a pattern or a list of names"),
    "exclude_modules": ((str,), str, "a pattern or a list of names"),
    "modules_to_save": ((), str, "a list of names"),
    "layers_to_transform": ((int,), int, "a number or a list of numbers"),
    "layers_pattern": ((str,), str, "a name or a list of names"),
}
"""Fields that name layers: what may stand alone, what in a list, and how to say so."""


def _short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def left_out(values: Mapping[str, Any], layers: Sequence[str]) -> list[str]:
    """Those of an adapter's `layers` that PEFT would not adapt under these fields, and whose factors it would drop."""
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = values.get("target_modules")
    if targets is None or targets == "all-linear":  # what these mean depends on the model; all layers that are there
        targets = [layer.rpartition(".")[2] for layer in layers]
    names = {name: values.get(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")}
    asked = types.SimpleNamespace(**names, target_modules=targets, target_parameters=None)
    return [layer for layer in layers if not check_target_module_exists(asked, layer)]


def _pattern(values: Mapping[str, Any], field: str, found: list[tuple[str, str]]) -> dict[str, Any]:
    """`field.pattern` -> value of a field that maps patterns to numbers; adds to `found` what is no such mapping."""
    given = values.get(field) or {}
    if not isinstance(given, Mapping):
        found.append((field, f"{given!r} is no mapping of layers to numbers."))
        return {}
    for pattern in given:
        if fault := _not_a_pattern(pattern):
            found.append((field, fault))
    return {f"{field}.{pattern}": value for pattern, value in given.items()}


def _not_a_pattern(text: str) -> str | None:
    """Why `text` is no regular expression; None if it is one."""
    try:
        re.compile(text)
    except re.error as error:
        return f"{text!r} is no regular expression ({error}); escape what is meant literally with a backslash."
    return None


def _how_to_convert(start: str) -> str:
    name = start.lower()
    if name == "eva":
        return "EVA leaves the base as it is, so the adapter is a plain one; set the field to true to take it over."
    if name == "loftq":
        return "LoftQ changes the base model. Save the changed base, take it as task.model, and set the field to true."
    if name.startswith(("pissa", "olora", "corda", "lora_ga")):
        return (
            "this start changes the base model, so the factors alone are not the adapter. Convert it with PEFT, where "
            "the adapter before training was saved too: model.save_pretrained(DIR, "
            "path_initial_model_for_weight_conversion=INITIAL_ADAPTER)."
        )
    return "this start is not known here and may change the base model; save the adapter with PEFT as plain LoRA."

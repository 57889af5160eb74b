"""What does a PEFT directory hold? Its configuration and tensors, read and checked before anything uses them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from decaf_lora.adapters.fields import check_saved, left_out
from decaf_lora.adapters.files import read_safetensors, refuse_pointer, tensor_names
from decaf_lora.adapters.names import Tensors
from decaf_lora.errors import UserError

PREFIX = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""


@dataclass(frozen=True)
class Saved:
    """An adapter as PEFT saved it: fields of adapter_config.json, and tensors by name without PEFT's prefix."""

    directory: Path
    config: dict[str, Any]
    tensors: Tensors

    def rank(self, layer: str) -> int:
        """The rank that the configuration gives to a layer."""
        return int(self._of(layer, "rank_pattern", "r"))

    def scale(self, layer: str) -> float:
        """The LoRA scaling s of a layer, in W0 + s B A."""
        root = math.sqrt if self.config.get("use_rslora") else float
        return float(self._of(layer, "alpha_pattern", "lora_alpha")) / root(self.rank(layer))

    def _of(self, layer: str, patterns: str, otherwise: str) -> Any:
        from peft.utils.other import get_pattern_key

        given = self.config.get(patterns) or {}
        return given.get(get_pattern_key(list(given), layer), self.config[otherwise])


def read_config(directory: Path, field: str = "init_adapters") -> dict[str, Any]:
    """The fields of the adapter_config.json of a PEFT directory.

    Args:
        directory: of the adapter.
        field: the option that named it, for errors.

    Raises:
        UserError: the file is missing or no JSON, or the adapter would mean something else here than in PEFT
            (`fields.check_saved`).
    """
    path = Path(directory) / "adapter_config.json"
    refuse_pointer(path, field)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{field}: {path} cannot be read ({error}); give a directory written by PEFT's save_pretrained."
        ) from error
    return check_saved(values, str(path), field)


def rank_fields(directory: Path, field: str = "init_adapters") -> dict[str, Any]:
    """The fields that give the layers of a saved adapter their ranks and scales.

    Patterns that match no layer of the adapter are left out.

    Raises:
        UserError: as `read_config` does; or the weights are missing or damaged.
    """
    from peft.utils.other import get_pattern_key

    config = read_config(directory, field)
    layers = layers_of(tensor_names(_weights(Path(directory), field), field))
    fields: dict[str, Any] = {name: config[name] for name in ("r", "lora_alpha", "use_rslora") if name in config}
    for name in ("rank_pattern", "alpha_pattern"):
        given = config.get(name) or {}
        fields[name] = {k: v for k, v in given.items() if any(get_pattern_key([k], layer) == k for layer in layers)}
    return fields


def read_adapter(directory: Path, field: str = "init_adapters") -> Saved:
    """The adapter in a PEFT directory.

    Args:
        directory: of the adapter.
        field: the option that named it, for errors.

    Raises:
        UserError: as `read_config` does; or the weights are missing, damaged, no floating-point numbers, not finite,
            or of layers that the configuration leaves out (the message names the file and the tensor).
    """
    directory = Path(directory)
    config = read_config(directory, field)
    path = _weights(directory, field)
    tensors = read_safetensors(path, field)
    if lost := left_out(config, layers_of(tensors)):
        raise UserError(
            f"{field}: {path} holds factors of {len(lost)} layers (first: {lost[0]}) that target_modules, "
            "exclude_modules and layers_to_transform of adapter_config.json leave out, so that PEFT would not use "
            "them; mend the file that is wrong."
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{field}: {path}: {name} is of {kind}, not of floating-point numbers.")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise UserError(f"{field}: {path}: {name} holds numbers that are not finite (NaN or infinity).")
    return Saved(directory, config, {k.removeprefix(PREFIX): t for k, t in tensors.items()})


def layers_of(names: Iterable[str]) -> list[str]:
    """The adapted layers among the names of an adapter's tensors, without PEFT's prefix."""
    end = ".lora_A.weight"
    return sorted(name.removeprefix(PREFIX).removesuffix(end) for name in names if name.endswith(end))


def _weights(directory: Path, field: str) -> Path:
    """The file of an adapter's tensors. Raises UserError if it is missing, or only an older PEFT's pickle is there."""
    path, old = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    if path.exists():
        return path
    if old.exists():
        raise UserError(
            f"{field}: {old} is in the format of an older PEFT, which can hold programs and is not read. Convert it "
            "where you trust it: PeftModel.from_pretrained(BASE, DIR).save_pretrained(DIR) writes "
            "adapter_model.safetensors."
        )
    raise UserError(f"{field}: {path} does not exist; give a directory written by PEFT's save_pretrained.")

"""What lies in a Trainer's checkpoint for the exchanges to go on from? One file beside the adapter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from decaf_lora.adapters.names import Tensors
from decaf_lora.errors import UserError

FILE = "gossip.safetensors"


def write(checkpoint: Path, tensors: Tensors, values: Mapping[str, Any]) -> None:
    """Writes the file aside, then renames it; nothing if the checkpoint is not there."""
    if not checkpoint.is_dir():
        return
    aside = checkpoint / f".{FILE}.tmp"
    save_file({k: t.cpu().contiguous() for k, t in tensors.items()}, aside, {"gossip": json.dumps(dict(values))})
    os.replace(aside, checkpoint / FILE)


def read(checkpoint: Path, expected: Mapping[str, Any], device: torch.device) -> tuple[Tensors, dict[str, Any]]:
    """The tensors, and the values that were written with them.

    Raises:
        UserError: there is no such file, it is broken, or one of the `expected` values is another one.
    """
    path = checkpoint / FILE
    if not path.is_file():
        raise UserError(
            f"resume: there is no {path}, without which the exchanges cannot go on; resume from a checkpoint that has "
            f"it, with GossipCallback(resume=CHECKPOINT) if it lies elsewhere."
        )
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["gossip"])
            tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"resume: {path} cannot be read ({error}); resume from an earlier checkpoint.") from error
    for field, value in expected.items():
        if values.get(field) != value:
            if field == "adapter":
                raise UserError(
                    f"resume: {path} belongs to another adapter than the one that was loaded; give "
                    "GossipCallback(resume=CHECKPOINT) the checkpoint that the Trainer resumes from."
                )
            raise UserError(f"{field}: the checkpoint {checkpoint} has {values.get(field)}, now it is {value}.")
    return tensors, values

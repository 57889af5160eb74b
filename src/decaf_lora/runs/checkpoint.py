"""How does a run stop and go on? Checkpoints: a folder a checkpoint, written aside and renamed.

`checkpoints/round-000010/` holds `tensors.safetensors` and `values.json`; nothing is pickled. A folder that
carries its final name is complete. The newest `KEEP` are kept.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from decaf_lora.adapters.names import Tensors
from decaf_lora.errors import UserError

KEEP = 2


def save(directory: Path, tensors: Tensors, values: dict[str, Any]) -> Path:
    """Writes a checkpoint below `directory`, named after its round and step, and drops older ones."""
    name = f"round-{values['round']:06d}"
    if values["step_in_round"]:
        name += f"-step-{values['step_in_round']:06d}"
    directory.mkdir(parents=True, exist_ok=True)
    final, aside = directory / name, directory / f".{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        flat = {k: t.detach().to("cpu").contiguous().clone() for k, t in tensors.items()}
        save_file(flat, aside / "tensors.safetensors")
        (aside / "values.json").write_text(json.dumps(values, indent=2))
        for path in aside.iterdir():
            _sync(path)
        if final.exists():  # the same moment, saved again after a resume
            shutil.rmtree(final)
        os.replace(aside, final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"checkpoint: cannot write {final} ({reason}); free disk space or choose another --out. "
            "Earlier checkpoints are kept."
        ) from error
    for old in all_of(directory)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def all_of(directory: Path) -> list[Path]:
    """The complete checkpoints below `directory`, oldest first."""
    return sorted(p for p in directory.glob("round-*") if (p / "values.json").exists())


def load_latest(directory: Path) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest checkpoint that reads whole; None if there is none."""
    for path in reversed(all_of(directory)):
        try:
            values = json.loads((path / "values.json").read_text())
            return load_file(path / "tensors.safetensors"), values
        except (OSError, ValueError, SafetensorError):  # torn by a crash of the machine: take the one before
            continue
    return None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

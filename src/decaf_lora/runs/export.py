"""What does a run leave? An agent's adapter or the averaged model, for PEFT or merged."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

from decaf_lora import config as configs
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError
from decaf_lora.runs import checkpoint
from decaf_lora.runs.build import build_run
from decaf_lora.runs.folder import disk


def export(directory: Path, agent: int | str, to: Path, *, merge: bool = False) -> Path:
    """Writes an agent's adapter, or the averaged model, of a run's newest checkpoint as a PEFT directory.

    With `merge` the whole model is written with the adapter folded in, to load without PEFT.
    """
    if not (directory / "config.yaml").exists():
        raise UserError(f"export: {directory} holds no run (no config.yaml); give the folder of one run.")
    if not (directory / "run.json").exists():
        runs = sorted(p.parent.name for p in directory.glob("*/run.json"))
        some = f" It is a comparison; give one of its runs, e.g. {directory / runs[0]}." if runs else ""
        raise UserError(f"export: {directory} holds no run.{some}")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"to: {to} is not an empty folder; choose another.")
    found = checkpoint.load_latest(directory / "checkpoints")
    if found is None:
        raise UserError(f"export: {directory} has no checkpoint yet; go on with the run first (--resume).")
    engine = build_run(configs.load(RunConfig, directory / "config.yaml"))
    with contextlib.closing(engine):
        engine.restore(*found)
        with disk(to):
            engine.save_adapter(to, agent)
    if merge:
        _merge(engine.task, to)
    return to


def _merge(task: Any, to: Path) -> None:
    from peft import PeftModel

    # A copy: the task's model may serve other runs of this process.
    merged = PeftModel.from_pretrained(copy.deepcopy(task.model), str(to)).merge_and_unload()
    with disk(to):
        for path in to.iterdir():
            path.unlink()
        merged.save_pretrained(to)
        tokenizer = getattr(task, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(to)

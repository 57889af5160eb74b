"""How does a run stop and go on? Each checkpoint is a folder, which is written aside and then renamed.

`checkpoints/round-000010/` holds `tensors.safetensors`, `values.json` and their checksums in `SHA256SUMS` (`sha256sum
-c` reads it); nothing is pickled. A folder that carries its final name is complete. The newest `KEEP` are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from decaf_lora.adapters.names import Tensors
from decaf_lora.errors import UserError, remedy

FORMAT = 1
"""Version of the content of a run's folder; a folder of another version is refused."""
KEEP = 2
"""Number of checkpoints that are kept."""
TENSORS, VALUES, SUMS = "tensors.safetensors", "values.json", "SHA256SUMS"

_NAME = re.compile(r"round-(\d+)(?:-step-(\d+))?")


class Damaged(Exception):  # noqa: N818 - it says what a file is
    """A checkpoint cannot be used; the message names the file and what is wrong with it."""


def save(directory: Path, tensors: Tensors, values: dict[str, Any]) -> Path:
    """Writes a checkpoint below `directory`, named after its round and step, and drops older ones.

    Args:
        directory: the run's `checkpoints/`.
        tensors: from `Run.snapshot`.
        values: from `Run.snapshot`, with "round" and "step_in_round"; more JSON values may be added.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: the checkpoint cannot be written; earlier ones are kept.
    """
    name = f"round-{values['round']:06d}"
    if values["step_in_round"]:
        name += f"-step-{values['step_in_round']:06d}"
    final, aside = directory / name, directory / f".{name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        flat = {k: t.detach().to("cpu").contiguous().clone() for k, t in tensors.items()}
        save_file(flat, aside / TENSORS)
        (aside / VALUES).write_text(json.dumps({"format": FORMAT, **values}, indent=2), encoding="utf-8")
        (aside / SUMS).write_text("".join(f"{_hash(aside / file)}  {file}\n" for file in (TENSORS, VALUES)))
        for path in aside.iterdir():
            _sync(path)
        _sync(aside)
        old = directory / f".{name}.old"
        if final.exists():  # the same moment, saved again after a resume
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(aside, final)
        _sync(directory)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"checkpoint: cannot write {final} ({reason}); {remedy(error)} or choose another --out. "
            "Earlier checkpoints are kept."
        ) from error
    for path in all_of(directory)[:-KEEP]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def all_of(directory: Path) -> list[Path]:
    """The checkpoints below `directory`, oldest first. `load` tells whether one is whole."""
    for old in directory.glob(".round-*.old"):  # the program died between two renames
        final = old.with_name(old.name[1:].removesuffix(".old"))
        if not final.exists():
            with contextlib.suppress(OSError):  # a reader may not write here
                os.replace(old, final)
    return sorted((p for p in directory.glob("round-*") if _NAME.fullmatch(p.name)), key=moment_of)


def moment_of(path: Path) -> tuple[int, int]:
    """Round and step of a checkpoint, from its name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """The checkpoint in `path`, checked against its checksums.

    Raises:
        Damaged: a file is missing, changed or does not read.
        UserError: it was written in another format.
    """
    try:
        values = json.loads((path / VALUES).read_bytes())
        before = isinstance(values, dict) and "format" not in values and not (path / SUMS).exists()
        if before or (isinstance(values, dict) and values.get("format", FORMAT) != FORMAT):
            found = "none, from before there were checksums" if before else str(values["format"])
            raise UserError(
                f"checkpoint: {path} has format {found}; this program reads {FORMAT}. Use the program that wrote "
                f"it{_version(values)}."
            )
        sums = {file: hash_ for hash_, _, file in (line.partition("  ") for line in _lines(path / SUMS))}
        for file in (TENSORS, VALUES):
            if sums.get(file) != _hash(path / file):
                raise Damaged(f"{path / file} does not match its checksum in {SUMS}")
        if not isinstance(values, dict) or (values.get("round"), values.get("step_in_round")) != moment_of(path):
            raise Damaged(f"{path / VALUES} is not of the moment that its folder names")
        return load_file(path / TENSORS), values
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename or path} is missing") from error
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(f"{path} does not read ({' '.join(str(error).split())})") from error


def load_latest(
    directory: Path, refuse: Callable[[Path], str | None] = lambda path: None
) -> tuple[Tensors, dict[str, Any]] | None:
    """The newest checkpoint below `directory` that can be used; None if there is none at all.

    A checkpoint that is damaged or refused is passed over, with a warning.

    Args:
        directory: the run's `checkpoints/`.
        refuse: gives, for the path of a checkpoint, the reason why it cannot be used; None if it can.

    Raises:
        UserError: there are checkpoints, but none can be used; names what is wrong with the newest one.
    """
    faults: list[str] = []
    for path in reversed(all_of(directory)):
        try:
            if reason := refuse(path):
                raise Damaged(reason)
            found = load(path)
        except Damaged as fault:
            faults.append(str(fault))
            continue
        if faults:
            warnings.warn(f"checkpoint: {faults[0]}; the run goes back to the older {path.name}.", stacklevel=2)
        return found
    if faults:
        raise UserError(
            f"checkpoint: {faults[0]}, and no other checkpoint can be used; bring a good copy back, or remove "
            f"{directory} to start from the beginning with --resume."
        )
    return None


def _version(values: dict[str, Any]) -> str:
    version = values.get("versions", {}).get("decaf-lora") if isinstance(values.get("versions"), dict) else None
    return f" (decaf-lora {version})" if version else ""


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

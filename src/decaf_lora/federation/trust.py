"""Which organiser does this agent trust, and which version has it seen? Told once by telephone, kept afterwards.

The answers are kept beside the agent's key, in NAME.trust: a JSON object, federation -> organiser's public key, newest
version seen, and its digest. Whoever can change that file can also change the key beside it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from decaf_lora.errors import UserError
from decaf_lora.federation import keys
from decaf_lora.federation.file import Signed


def accept(signed: Signed, kept: Path, told: str | None = None) -> None:
    """Accepts a federation file with a valid signature, and remembers its organiser and version.

    Args:
        signed: what `file.read_signed` has read.
        kept: file of what was accepted before; need not exist.
        told: the fingerprint that the person at this machine was told; needed the first time.

    Raises:
        UserError: the organiser differs from the one that was told, or that was trusted before; or the file is older
            than the newest one seen, or a second file of the same version.
    """
    known = _read(kept)
    before = known.get(signed.name)
    found = keys.fingerprint(signed.organiser)
    if told is not None and keys.read_fingerprint(told) != found:
        raise UserError(
            f"trust: the file is signed by {found}, not by {keys.read_fingerprint(told)}; ask the organiser, by "
            "telephone, for the fingerprint."
        )
    if before is None and told is None:
        raise UserError(
            f"trust: the file is signed by {found}. Ask the organiser by telephone whether that is right, and say so "
            f"once: --trust {found}"
        )
    if before is not None:
        _not_replaced(signed, before, found, kept)
    entry = {"organiser": signed.organiser, "version": signed.version, "digest": signed.digest()}
    if entry != before:
        _write(kept, {**known, signed.name: entry})


def _not_replaced(signed: Signed, before: dict[str, Any], found: str, kept: Path) -> None:
    if before["organiser"] != signed.organiser:
        raise UserError(
            f"trust: the file is signed by {found}, and {signed.name} was signed by "
            f"{keys.fingerprint(before['organiser'])} until now. If the organiser tells you by telephone that the key "
            f"is a new one, remove {kept} and give --trust {found}."
        )
    if signed.version < before["version"]:
        raise UserError(
            f"federation: the file is version {signed.version}, and version {before['version']} was seen before; ask "
            "the organiser for the newest."
        )
    if signed.version == before["version"] and signed.digest() != before["digest"]:
        raise UserError(
            f"federation: this is not the version {signed.version} that was seen before; the organiser has sealed two "
            "files with one number, and must seal once more."
        )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
        for entry in known.values():
            keys.fingerprint(entry["organiser"])
            if not isinstance(entry["version"], int) or not isinstance(entry["digest"], str):
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"trust: {path} is damaged; restore it, or remove it and give --trust.") from error
    return known


def _write(path: Path, known: dict[str, dict[str, Any]]) -> None:
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(json.dumps(known, indent=2))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"trust: cannot write {path} ({error.strerror}).") from error

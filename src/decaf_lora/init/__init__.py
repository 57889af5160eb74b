"""How does a person begin with data of their own? `decaf init` writes a commented configuration for a file.

write("text", "visits.csv", Path("visits.yaml"))
"""

from __future__ import annotations

import os
from pathlib import Path

from decaf_lora.errors import UserError


def write(kind: str, data: str, out: Path | None = None, model: str | None = None, **given: str | None) -> list[str]:
    """Looks at a file or folder, and writes the configuration of a run on it, with comments.

    Args:
        kind: "text" (a table of texts and labels), "images" (a folder or table of images) or "llm" (prompts and
            answers, or texts).
        data: the file, or folder.
        out: the configuration to write; None: named after the data, in this folder. It must not exist.
        model: the base model; None: a small one of the Hub.
        given: text_column, label_column, site_column, delimiter, encoding, subset, where they should not be detected.

    Returns:
        What was assumed, a line each.

    Raises:
        UserError: the data cannot be read, it is not clear which column is what, or the file exists.
    """
    from decaf_lora.init.found import Asked, find
    from decaf_lora.init.written import yaml_of

    out = named_after(data) if out is None else out
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"out: {out} does not end in .yaml; `decaf run` would not take it for a configuration.")
    if out.exists():
        raise UserError(f"out: {out} exists already; remove it, or choose another with --out.")
    asked = Asked(kind, data, model, **given)
    try:
        found = find(asked)
    except UserError as error:
        raise UserError(str(error).removeprefix("task.")) from error
    text = yaml_of(found, asked, out)
    try:
        with open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"out: cannot write {out} ({error.strerror}).") from error
    return found.assumed


def named_after(data: str) -> Path:
    """NAME.yaml for the data NAME.csv, or the folder NAME."""
    name = Path(data.rstrip("/")).name or "data"
    stem = name.partition(".")[0] or name.strip(".") or "data"
    return Path(f"{stem}.yaml")


__all__ = ["named_after", "write"]

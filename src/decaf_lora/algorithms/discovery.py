"""Which kinds do the files of a room bring? Each lists its own as `KINDS`, so that a new one is one file."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def discovered(room: ModuleType) -> dict[str, Any]:
    """Name -> kind, from the modules of a package in alphabetical order."""
    found: dict[str, Any] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(room.__path__)):
        found |= getattr(importlib.import_module(f"{room.__name__}.{module}"), "KINDS", {})
    return found

"""Which kinds do the modules of a package define? Each module lists its own as `KINDS`, so a new kind is one file."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any


def discovered(room: ModuleType) -> dict[str, Any]:
    """Name -> kind, from all modules of the package `room`, in alphabetical order of the modules."""
    found: dict[str, Any] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(room.__path__)):
        found |= getattr(importlib.import_module(f"{room.__name__}.{module}"), "KINDS", {})
    return found

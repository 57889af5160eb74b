"""How does a package offer names whose modules take long to import, without importing them?"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from decaf_lora.extras import missing


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562).

    Args:
        package: its `__name__`.
        homes: name -> module of the package that has it, imported when the name is first used; "" if the name is itself
            a module.

    Returns:
        A function of a name, which raises AttributeError for others, and UserError where a library is missing that an
        extra brings.
    """

    def found(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f"{package}.{homes[name] or name}")
        except ImportError as error:
            line = missing(error)
            if line is None:
                raise
            raise line from error
        return getattr(module, name) if homes[name] else module

    return found

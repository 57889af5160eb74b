"""Runs on disk: from a configuration to a finished folder, one run or several, stopped and resumed."""

import importlib
from typing import TYPE_CHECKING, Any

_LAZY = {"Folder": "folder", "Subscriber": "events", "Progress": "events", "Interrupted": "events", "follow": "events"}

if TYPE_CHECKING:
    from decaf_lora.runs.events import Interrupted, Progress, Subscriber, follow
    from decaf_lora.runs.folder import Folder


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"decaf_lora.runs.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'decaf_lora.runs' has no attribute {name!r}")


__all__ = ["Folder", "Interrupted", "Progress", "Subscriber", "follow"]

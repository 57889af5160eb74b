"""Runs on disk: from a configuration to a finished folder, one run or several, stopped and resumed."""

from typing import TYPE_CHECKING

from decaf_lora.lazy import lazy

_LAZY = {"Folder": "folder", "Subscriber": "events", "Progress": "events", "Interrupted": "events", "follow": "events"}

if TYPE_CHECKING:
    from decaf_lora.runs.events import Interrupted, Progress, Subscriber, follow
    from decaf_lora.runs.folder import Folder

__getattr__ = lazy(__name__, _LAZY)


__all__ = ["Folder", "Interrupted", "Progress", "Subscriber", "follow"]

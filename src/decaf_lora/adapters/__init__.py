"""LoRA adapters: the value that all share, the layers that hold many agents' at once, and PEFT's files."""

import importlib
from typing import TYPE_CHECKING, Any

from decaf_lora.adapters.adapter import Adapter, concatenate

if TYPE_CHECKING:
    from decaf_lora.adapters.merged_files import merge
    from decaf_lora.adapters.peft_io import load_peft, save_peft
    from decaf_lora.adapters.saved import rank_fields, read_adapter, read_config
    from decaf_lora.adapters.stacked import Attached, attach

_LAZY = {
    "Attached": "stacked",
    "attach": "stacked",
    "load_peft": "peft_io",
    "merge": "merged_files",
    "rank_fields": "saved",
    "read_adapter": "saved",
    "read_config": "saved",
    "save_peft": "peft_io",
}


def __getattr__(name: str) -> Any:
    # Algorithms need the value alone; peft takes seconds to import.
    if name in _LAZY:
        return getattr(importlib.import_module(f"decaf_lora.adapters.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'decaf_lora.adapters' has no attribute {name!r}")


__all__ = [
    "Adapter",
    "Attached",
    "attach",
    "concatenate",
    "load_peft",
    "merge",
    "rank_fields",
    "read_adapter",
    "read_config",
    "save_peft",
]

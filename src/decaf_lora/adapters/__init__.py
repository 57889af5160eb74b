"""LoRA adapters: the value that all share, the layers that hold many agents' at once, and PEFT's files."""

from typing import TYPE_CHECKING

from decaf_lora.adapters.adapter import Adapter, concatenate
from decaf_lora.lazy import lazy

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

# Algorithms need the value alone; peft takes seconds to import.
__getattr__ = lazy(__name__, _LAZY)


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

"""Tasks: model + data + loss + score. `make` builds the task that a configuration names.

The other functions load a pretrained model or tokenizer by name, for the tasks of this package and your own.
"""

from decaf_lora.tasks.base import Batch, Task
from decaf_lora.tasks.pretrained import (
    checkpoint_layers,
    family_targets,
    loading_by,
    max_tokens,
    pretrained_model,
    pretrained_tokenizer,
)
from decaf_lora.tasks.registry import KINDS, digits, files_state, make, refuse_unused

__all__ = [
    "KINDS",
    "Batch",
    "Task",
    "checkpoint_layers",
    "digits",
    "family_targets",
    "files_state",
    "loading_by",
    "make",
    "max_tokens",
    "pretrained_model",
    "pretrained_tokenizer",
    "refuse_unused",
]

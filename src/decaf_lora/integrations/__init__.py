"""How does a training script that exists already become decentralized?"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from decaf_lora.integrations.trainer import GossipCallback


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import, and the package's other rooms do not need its Trainer.
    if name == "GossipCallback":
        return importlib.import_module("decaf_lora.integrations.trainer").GossipCallback
    raise AttributeError(f"module 'decaf_lora.integrations' has no attribute {name!r}")


__all__ = ["GossipCallback"]

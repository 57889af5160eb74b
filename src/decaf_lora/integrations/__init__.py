"""How does a training script that exists already become decentralized?"""

from typing import TYPE_CHECKING

from decaf_lora.lazy import lazy

if TYPE_CHECKING:
    from decaf_lora.integrations.trainer import GossipCallback

# transformers takes seconds to import, and the package's other rooms do not need its Trainer.
__getattr__ = lazy(__name__, {"GossipCallback": "trainer"})


__all__ = ["GossipCallback"]

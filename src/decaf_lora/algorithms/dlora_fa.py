"""DLoRA-FA: A frozen at the common start and never sent, B mixed. Half the bytes of DLoRA.

    A_i = A_0                   B_i <- sum_j Pi_ij B_j

Saadati et al., arXiv 2505.21382; which factor is frozen follows LoRA-FA (arXiv 2308.03303) and FFA-LoRA
(arXiv 2403.12313). With one A for all agents, averaging B is averaging the product exactly. Independent
starts have no common A: agents then mix B's of different frames, which is allowed and loses accuracy.
"""

from typing import Literal

from decaf_lora.adapters.adapter import Adapter, Factor, Tensors
from decaf_lora.algorithms.contract import Algorithm, State
from decaf_lora.algorithms.dlora import average_factors, with_moments
from decaf_lora.algorithms.transforms.options import Messages, with_options

_TRAINED: frozenset[Factor] = frozenset({"B", "extras"})


def dlora_fa(
    order: Literal["adapt-combine", "combine-adapt"] = "adapt-combine",
    moments: Literal["keep", "reset"] = "keep",
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Gossip on B with a frozen common A; options as for `dlora`."""

    def message(adapter: Adapter, state: State, round_: int) -> Tensors:
        return adapter.message(_TRAINED)

    algorithm = Algorithm(
        name="dlora_fa", order=order, trains=lambda round_: _TRAINED, message=message, combine=average_factors
    )
    algorithm = with_moments(algorithm, moments)
    return with_options(algorithm, tracking, tracking_gamma, quasi_global, messages)

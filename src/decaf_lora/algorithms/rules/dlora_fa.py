"""DLoRA-FA: A frozen at the common start and never sent, B mixed. Half the bytes of DLoRA.

    A_i = A_0                   B_i <- sum_j Pi_ij B_j

Saadati et al., arXiv 2505.21382; which factor is frozen follows LoRA-FA (arXiv 2308.03303) and FFA-LoRA
(arXiv 2403.12313). With one A for all agents, averaging B averages the products exactly. With independent starts
there is no common A: agents then mix B's of different frames, which is allowed and loses accuracy.
"""

from typing import Literal

from decaf_lora.adapters.adapter import Adapter, Factor
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Order, Round, Rule
from decaf_lora.algorithms.rules.dlora import average_factors, with_moments
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import Messages, with_options
from decaf_lora.kinds import Kind

_TRAINED: frozenset[Factor] = frozenset({"B", "extras"})


def dlora_fa(
    order: Order = "adapt-combine",
    moments: Literal["keep", "reset"] = "keep",
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Gossip on B with a frozen common A; arguments and errors as those of `dlora`."""

    def message(adapter: Adapter, state: Tensors, round_: Round) -> Tensors:
        return adapter.message(_TRAINED)

    rule = Rule("dlora_fa", order=order, trains=lambda round_: _TRAINED, message=message, combine=average_factors)
    rule = with_moments(rule, moments)
    return with_options(
        rule, tracking=tracking, tracking_gamma=tracking_gamma, quasi_global=quasi_global, messages=messages
    )


KINDS = {"dlora_fa": Kind(dlora_fa, "A frozen and never sent, B mixed")}

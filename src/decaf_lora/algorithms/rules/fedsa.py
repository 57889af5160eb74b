"""FedSA-LoRA on a graph: A is shared, B stays the agent's own. Half the bytes of DLoRA, and a model for each agent.

    A_i <- sum_j Pi_ij A_j      B_i = B_i, trained by the agent and never sent

Guo, Zeng, Wang et al., arXiv 2410.01463, there with a server: A learns what the agents have in common, B
what is their own. Extras are mixed as in DLoRA; the transform `personal_head` keeps them, too, and then A alone is
shared. What tells such models from others is each agent's score on data like its own (`test: alike`); the averaged
model mixes personal factors and means little.
"""

from __future__ import annotations

from typing import Literal

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Order, Round, Rule
from decaf_lora.algorithms.rules.dlora import average_factors, with_moments
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import Messages, with_options
from decaf_lora.kinds import Kind


def fedsa(
    order: Order = "adapt-combine",
    moments: Literal["keep", "reset"] = "keep",
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Gossip on A with personal B; arguments and errors as those of `dlora`. Tracking corrects A's drift alone."""

    def message(adapter: Adapter, state: Tensors, round_: Round) -> Tensors:
        return adapter.message(frozenset({"A", "extras"}))

    rule = Rule("fedsa", order=order, message=message, combine=average_factors, personal=frozenset({"B"}))
    return with_options(
        with_moments(rule, moments),
        tracking=tracking,
        tracking_gamma=tracking_gamma,
        quasi_global=quasi_global,
        messages=messages,
    )


KINDS = {"fedsa": Kind(fedsa, "mix A, keep B personal")}

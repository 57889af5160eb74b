"""DLoRA: mix each factor on its own (also called Dec-LoRA).

    A_i <- sum_j Pi_ij A_j      B_i <- sum_j Pi_ij B_j

Saadati et al., arXiv 2505.21382; Ghiasvand et al. (Dec-LoRA), arXiv 2501.15361. The mean of the products is
not the product of the means; the difference, the consensus interference, is recorded every round.
"""

from typing import Literal

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Combined, Order, Round, Rule, reset_moments
from decaf_lora.algorithms.inbox import Inbox, average_tensors
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import Messages, with_options
from decaf_lora.errors import UserError
from decaf_lora.kinds import Kind


def send_factors(adapter: Adapter, state: Tensors, round_: Round) -> Tensors:
    """`Rule.message`: both factors and the extras."""
    return adapter.message()


def average_factors(adapter: Adapter, state: Tensors, inbox: Inbox, round_: Round) -> Combined:
    """`Rule.combine`: every tensor that was sent is replaced by its weighted average."""
    return Combined(adapter.with_tensors(average_tensors(adapter, inbox)), state)


def with_moments(rule: Rule, moments: str) -> Rule:
    """`rule` with Adam's moments kept ("keep") or set to 0 ("reset") after mixing.

    Averages of factors change no frame, so there is nothing to transport. Raises UserError for anything else.
    """
    if moments not in ("keep", "reset"):
        raise UserError(f"algorithm.moments: {rule.name} takes keep or reset, not {moments!r}.")
    return rule._replace(moments=reset_moments) if moments == "reset" else rule


def dlora(
    order: Order = "adapt-combine",
    moments: Literal["keep", "reset"] = "keep",
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Factor-wise gossip.

    Args:
        order: train then mix, or mix then train.
        moments: whether Adam's moments are kept or set to 0 after mixing.
        tracking: lay gradient tracking over it (transforms/tracking.py), with `tracking_gamma`.
        tracking_gamma: in (0, 1], how far a correction moves at an update.
        quasi_global: the decay of quasi-global momentum (transforms/quasi_global.py); None: off.
        messages: "full" as they are, or "int8" (transforms/int8.py).

    Raises:
        UserError: an option is out of range; names the field.
    """
    rule = with_moments(Rule("dlora", order=order, message=send_factors, combine=average_factors), moments)
    return with_options(
        rule, tracking=tracking, tracking_gamma=tracking_gamma, quasi_global=quasi_global, messages=messages
    )


KINDS = {"dlora": Kind(dlora, "mix each factor on its own")}

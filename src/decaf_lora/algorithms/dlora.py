"""DLoRA: mix each factor on its own (also called Dec-LoRA).

    A_i <- sum_j Pi_ij A_j      B_i <- sum_j Pi_ij B_j

Saadati et al., arXiv 2505.21382; Ghiasvand et al. (Dec-LoRA), arXiv 2501.15361. The mean of the products is
not the product of the means; the difference, the consensus interference, is recorded every round.
"""

from typing import Literal

from decaf_lora.adapters.adapter import Adapter, Tensors
from decaf_lora.algorithms.contract import Algorithm, State, reset_moments
from decaf_lora.algorithms.inbox import Inbox, average_tensors
from decaf_lora.algorithms.transforms.options import Messages, with_options
from decaf_lora.errors import UserError


def send_factors(adapter: Adapter, state: State, round_: int) -> Tensors:
    """Both factors and the extras."""
    return adapter.message()


def average_factors(adapter: Adapter, state: State, inbox: Inbox, round_: int) -> tuple[Adapter, State]:
    """Every tensor that was sent is replaced by its weighted average."""
    return adapter.with_tensors(average_tensors(adapter, inbox)), state


def with_moments(algorithm: Algorithm, moments: str) -> Algorithm:
    """`algorithm` with Adam's moments kept or reset after mixing; factor averages change no frame."""
    if moments not in ("keep", "reset"):
        raise UserError(f"algorithm.moments: {algorithm.name} takes keep or reset, not {moments!r}.")
    return algorithm._replace(moments=reset_moments) if moments == "reset" else algorithm


def dlora(
    order: Literal["adapt-combine", "combine-adapt"] = "adapt-combine",
    moments: Literal["keep", "reset"] = "keep",
    tracking: bool = False,
    tracking_gamma: float = 1.0,
    quasi_global: float | None = None,
    messages: Messages = "full",
) -> Algorithm:
    """Factor-wise gossip.

    order: train then mix, or mix then train. moments: what becomes of Adam's moments after mixing. tracking: see
    tracking.py; quasi_global (mu): quasi_global.py; messages: int8.py.
    """
    algorithm = Algorithm(name="dlora", order=order, message=send_factors, combine=average_factors)
    algorithm = with_moments(algorithm, moments)
    return with_options(algorithm, tracking, tracking_gamma, quasi_global, messages)

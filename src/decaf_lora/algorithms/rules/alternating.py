"""Alternating training: B for T rounds, then A for T rounds, and so on; the other factor is frozen meanwhile.

    rounds 1 .. T, 2 T + 1 .. 3 T, ...:     B_i <- sum_j Pi_ij B_j      (A_i is not trained)
    rounds T + 1 .. 2 T, ...:               A_i <- sum_j Pi_ij A_j      (B_i is not trained)

While A is equal everywhere, averaging B averages the products exactly, and the reverse. RoLoRA (Chen, Guo, Ju, Dalal,
Zhu and Khisti, arXiv 2409.02346) has a server and T = 1, and sends the trained factor alone, which is
`mixes="trained"`. On a graph the frozen factors are equal only where averages are exact, so ADF-LoRA (arXiv
2511.18291) and TAD-LoRA (arXiv 2602.00451) mix both in every round: `mixes="both"`, at twice the bytes. TAD-LoRA
takes T ~ 1 / sqrt(1 - sigma_2), sigma_2 being the share of a disagreement that a round leaves: `interval="auto"`,
rounded, at least 1. B comes first, since it starts at 0 and A then has no gradient; extras are trained and sent in
all rounds.
"""

from __future__ import annotations

from typing import Literal

from decaf_lora.adapters.adapter import Adapter, Factor
from decaf_lora.adapters.names import Tensors
from decaf_lora.algorithms.contract import Round, Rule, Setting
from decaf_lora.algorithms.rules.dlora import average_factors
from decaf_lora.algorithms.transforms.chain import Algorithm
from decaf_lora.algorithms.transforms.table import Messages, with_options
from decaf_lora.errors import UserError, unknown
from decaf_lora.kinds import Kind


def alternating(
    interval: int | Literal["auto"] = 1,
    mixes: Literal["trained", "both"] = "trained",
    messages: Messages = "full",
) -> Algorithm:
    """Gossip on factors that are trained in turn.

    Args:
        interval: T, rounds until the other factor's turn, at least 1; "auto" takes it from the graph.
        mixes: send the factor that is trained (RoLoRA), or both (ADF-LoRA, TAD-LoRA).
        messages: "full" as they are, or "int8" (transforms/int8.py).

    Raises:
        UserError: an option is out of range; and in a run with "auto", if the graph mixes nothing.
    """
    if interval != "auto" and interval < 1:
        raise UserError(f"algorithm.interval: {interval} is below 1; give a number of rounds, or auto.")
    if mixes not in ("trained", "both"):
        raise unknown("algorithm.mixes", mixes, ("trained", "both"))

    def taking(rounds: int) -> Rule:
        def trains(round_: Round) -> frozenset[Factor]:
            return frozenset({"B" if (round_.number - 1) // rounds % 2 == 0 else "A", "extras"})

        def message(adapter: Adapter, state: Tensors, round_: Round) -> Tensors:
            return adapter.message(trains(round_) if mixes == "trained" else frozenset({"A", "B", "extras"}))

        return Rule("alternating", trains=trains, message=message, combine=average_factors)

    if interval != "auto":
        return with_options(taking(interval), messages=messages)

    def fitted(setting: Setting) -> Rule:
        gap = 1 - setting.sigma_2
        if gap < 1e-9:
            raise UserError("algorithm.interval: auto has no answer, as this graph mixes nothing; give a number.")
        return taking(max(1, round(gap**-0.5)))

    return with_options(taking(1)._replace(fitted=fitted), messages=messages)


KINDS = {"alternating": Kind(alternating, "train B, then A, in turn (RoLoRA, ADF-LoRA, TAD-LoRA)")}

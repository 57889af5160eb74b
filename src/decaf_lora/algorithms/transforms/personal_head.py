"""A personal head: modules that are trained in full (extras, such as a classification head) stay with their agent.

    B_i and A_i are mixed as the rule does;   extras_i = extras_i, trained by the agent and never sent

Collins, Hassani, Mokhtari and Shakkottai (FedRep), arXiv 2102.07078, and Arivazhagan et al. (FedPer), arXiv
1912.00818: a common representation below, a head of its own for each agent. With `fedsa` A alone is shared. Nor do
such agents send corrections of the head where tracking lies over the rule.
"""

from __future__ import annotations

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors, leave
from decaf_lora.algorithms.contract import Round, Setting, Transform
from decaf_lora.algorithms.transforms.kind import TransformKind
from decaf_lora.errors import UserError


def personal_head() -> Transform:
    """Leaves the extras out of the messages. A run raises UserError if the model trains no module in full."""

    def init(adapter: Adapter, trained: Tensors, message: Tensors, setting: Setting) -> Tensors:
        if not adapter.extras:
            raise UserError(
                "algorithm.transforms: personal_head: no module is trained in full here (lora.modules_to_save), so "
                "there is no head; leave it out."
            )
        return {}

    def send(adapter: Adapter, state: Tensors, message: Tensors, round_: Round) -> tuple[Tensors, Tensors]:
        return leave("extras/", message), state

    return Transform("personal_head", init, send=send, personal=frozenset({"extras"}))


KINDS = {
    "personal_head": TransformKind(personal_head, "modules trained in full stay with their agent", place=5),
}

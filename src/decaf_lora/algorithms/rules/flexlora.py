"""FlexLoRA: a server averages the products with sample-size weights, and cuts the average to each agent's rank.

    Z = sum_j (n_j / n) s_j B_j A_j ;   (U, S, V) = TSVD_{r_i}(Z) ;   s_i B_i A_i = U S V^T

Bai, Chen, Qian, Yao and Li, arXiv 2402.11505; HLoRA is the same rule. It is DeCAF on the complete graph with the
weights n_j / n, and runs the same code, for agents of unequal ranks, too. The server of the paper gives out A = V^T
and B = U S; its gauge here is "orthonormal", with A at its usual norm instead of 1, as AdamW's steps are of one size
for both factors. An agent sends its adapter once a round, to the server.
"""

from decaf_lora.algorithms.rules.decaf import decaf
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.kinds import Kind


def flexlora(gauge: str = "orthonormal") -> Algorithm:
    """Server averaging of the products.

    Args:
        gauge: how the truncated product is split into factors, as for `decaf`.

    Raises:
        UserError: the gauge is unknown.
    """
    return chain(decaf(gauge=gauge).rule._replace(name="flexlora", topology="server"))


KINDS = {"flexlora": Kind(flexlora, "a server averages the products by sample size, and truncates them")}

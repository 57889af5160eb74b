"""FedAvg of LoRA factors (FedIT): a server averages A and B with sample-size weights.

    A <- sum_j (n_j / n) A_j    B <- sum_j (n_j / n) B_j

McMahan et al., arXiv 1602.05629; Zhang et al. (FedIT), arXiv 2305.05644. The update is that of DLoRA on the complete
graph with the weights n_j / n, and runs the same code; with equal sample sizes the two are equal. An agent sends its
adapter once a round, to the server.
"""

from decaf_lora.algorithms.contract import Rule
from decaf_lora.algorithms.rules.dlora import average_factors, send_factors
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.kinds import Kind


def fedavg() -> Algorithm:
    """Server averaging of both factors, weighted by sample size; every agent takes part in every round."""
    return chain(Rule("fedavg", topology="server", message=send_factors, combine=average_factors))


KINDS = {"fedavg": Kind(fedavg, "a server averages both factors by sample size")}

"""Local training: every agent on its own data, no exchange (the lower baseline).

A_i <- A_i - lr dA_i        B_i <- B_i - lr dB_i
"""

from decaf_lora.algorithms.contract import Rule
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.kinds import Kind


def local() -> Algorithm:
    """Every agent trains alone and sends nothing."""
    return chain(Rule("local", topology="none"))


KINDS = {"local": Kind(local, "every agent on its own data, no exchange")}

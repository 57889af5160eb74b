"""Local training: every agent on its own data, no exchange (the lower baseline).

A_i <- A_i - lr dA_i        B_i <- B_i - lr dB_i
"""

from decaf_lora.algorithms.contract import Algorithm


def local() -> Algorithm:
    """Every agent trains alone and sends nothing."""
    return Algorithm(name="local", topology="none")

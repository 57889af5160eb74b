"""Centralized training: one agent that holds all the data (the upper baseline).

    A <- A - lr dA              B <- B - lr dB

The one agent takes as many optimizer steps as any agent of the other rules, and sees in each step as many examples as
all N of them together (batch N b). So its score is what the agents could reach if they pooled their data.
"""

from decaf_lora.algorithms.contract import Rule
from decaf_lora.algorithms.transforms.chain import Algorithm, chain
from decaf_lora.kinds import Kind


def centralized() -> Algorithm:
    """One agent trains on the union of all shards."""
    return chain(Rule("centralized", topology="pooled"))


KINDS = {"centralized": Kind(centralized, "one agent that holds all the data")}

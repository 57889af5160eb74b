"""Differential privacy of every training example: how are local steps made private, and what has a run spent?

Example-level DP-SGD (Abadi et al., arXiv 1607.00133) by every agent on its own examples. All that an agent sends
(models, heads, what tracking and other transforms add) is computed from its noisy gradients and from what it has
received, so all of it is covered.
"""

from .accounting import Account
from .trainer import PrivateTrainer, trainer_class

__all__ = ["Account", "PrivateTrainer", "trainer_class"]

"""Engines: where do agents live and how do messages travel?"""

from decaf_lora.engines.base import Engine
from decaf_lora.engines.simulate import Simulate

__all__ = ["Engine", "Simulate"]

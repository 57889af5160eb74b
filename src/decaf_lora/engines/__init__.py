"""Engines: where do agents live and how do messages travel?"""

from decaf_lora.engines.base import Engine
from decaf_lora.engines.simulate import Simulate
from decaf_lora.engines.torchrun import Processes, Torchrun, connect

__all__ = ["Engine", "Processes", "Simulate", "Torchrun", "connect"]

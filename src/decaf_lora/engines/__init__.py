"""Engines: where do agents live and how do messages travel?"""

from decaf_lora.engines.base import Engine, InStep, Pending, Sizes
from decaf_lora.engines.launch import Processes, connect
from decaf_lora.engines.simulate import Simulate
from decaf_lora.engines.torchrun import Torchrun

__all__ = ["Engine", "InStep", "Pending", "Processes", "Simulate", "Sizes", "Torchrun", "connect"]

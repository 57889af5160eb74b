"""The command `decaf`."""

from decaf_lora.cli.main import main

__all__ = ["main"]

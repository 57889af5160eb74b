"""Which learning rate, which rank? A search over fields of a run, without its test set."""

from decaf_lora.tune.searching import Found, search

__all__ = ["Found", "search"]

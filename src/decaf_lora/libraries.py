"""How do the large libraries come in fast? Where they are needed first, and while Python's garbage collector waits.

torch, transformers and peft make millions of objects that stay. The collector would go over them again and again while
they come in, which is a fifth of the time that they take, and would find nothing.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """A context, for imports only, in which nothing is collected."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load_peft() -> None:
    """Imports peft, and with it what transformers needs to load a model."""
    if "peft" not in sys.modules:
        with uncollected():
            import peft  # noqa: F401

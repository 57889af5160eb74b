"""How does transformers keep quiet while it loads? Our own remarks are errors, or one warning."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def transformers_quiet() -> Iterator[None]:
    """A context without transformers' remarks on what it loads, such as a freshly drawn head."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

"""Data: where examples come from, and how text and images become batches."""

import importlib
from typing import TYPE_CHECKING, Any

from decaf_lora.extras import missing

if TYPE_CHECKING:
    from decaf_lora.data.examples import Examples, load, needs_text, needs_tokens, spread
    from decaf_lora.data.images import Pixels, decode_image, image_folder
    from decaf_lora.data.labels import alike, needs_classes
    from decaf_lora.data.mapping import preprocess
    from decaf_lora.data.reading import READERS, looks_local
    from decaf_lora.data.tokens import Ragged, warn_truncated

_LAZY = {
    "READERS": "reading",
    "Examples": "examples",
    "Pixels": "images",
    "Ragged": "tokens",
    "alike": "labels",
    "decode_image": "images",
    "image_folder": "images",
    "load": "examples",
    "looks_local": "reading",
    "needs_classes": "labels",
    "needs_text": "examples",
    "needs_tokens": "examples",
    "preprocess": "mapping",
    "spread": "examples",
    "warn_truncated": "tokens",
}


def __getattr__(name: str) -> Any:
    # `datasets` takes seconds to import, with pandas and pyarrow; the demo reads no table.
    if name in _LAZY:
        try:
            return getattr(importlib.import_module(f"decaf_lora.data.{_LAZY[name]}"), name)
        except ImportError as error:
            raise missing(error) or error from error
    raise AttributeError(f"module 'decaf_lora.data' has no attribute {name!r}")


__all__ = [
    "READERS",
    "Examples",
    "Pixels",
    "Ragged",
    "alike",
    "decode_image",
    "image_folder",
    "load",
    "looks_local",
    "needs_classes",
    "needs_text",
    "needs_tokens",
    "preprocess",
    "spread",
    "warn_truncated",
]

"""Data: where examples come from, and how text and images become batches."""

from typing import TYPE_CHECKING

from decaf_lora.lazy import lazy

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

# `datasets` takes seconds to import, with pandas and pyarrow; the demo reads no table.
__getattr__ = lazy(__name__, _LAZY)


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

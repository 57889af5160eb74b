"""Data: where examples come from, and how text and images become batches."""

from decaf_lora.data.examples import Examples, load, needs_text, needs_tokens, spread
from decaf_lora.data.images import Pixels, decode_image, image_folder
from decaf_lora.data.labels import alike, needs_classes
from decaf_lora.data.mapping import preprocess
from decaf_lora.data.reading import READERS, looks_local
from decaf_lora.data.tokens import Ragged, warn_truncated

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

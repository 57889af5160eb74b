"""How do images become pixel values? `Pixels` decodes and processes them when a batch asks for them.

Images of more than 8 bits a channel (scans, depth maps) do not say which values are black and white, and PIL would cut
their values off at 255. So such images are scaled here, and a data set whose values do not fit the scale is refused.
"""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image, Value
from numpy.typing import NDArray
from torch import Tensor

from decaf_lora.config import TaskConfig
from decaf_lora.data.content import of_each_image
from decaf_lora.data.mapping import preprocess
from decaf_lora.data.places import place
from decaf_lora.errors import UserError


class Pixels:
    """Pixel values on demand: called with indices (m,), returns (m, channels, h, w).

    Images are decoded and processed when a batch asks for them. The first ones are kept in memory, since few-shot
    learning of a large set comes back to few of its images.

    Args:
        rows: the examples.
        column: of the images.
        processor: image processor of transformers.
        workers: threads that decode; 0: none besides the caller's.
        folder: where relative paths of images count from.
        cache: bytes of pixel values to keep.
        pixel_range: the values that become 0 and 255, of images of more than 8 bits a channel; None: the usual ones.
    """

    def __init__(
        self,
        rows: Dataset,
        column: str,
        processor: Any,
        workers: int = 0,
        folder: str = "",
        cache: float = 2**29,
        pixel_range: tuple[float, float] | None = None,
    ) -> None:
        self._rows, self._column, self._processor, self._folder = rows, column, processor, folder
        self._range = pixel_range
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._cache = cache
        self._kept: Tensor | None = None
        self._place = np.full(len(rows), -1)
        self._used = 0

    def __call__(self, indices: NDArray[np.int64]) -> Tensor:
        wanted, where = np.unique(indices, return_inverse=True)
        place = self._place[wanted]
        new = place < 0
        parts = []
        if new.any():
            parts.append(self._decode(wanted[new]))
            self._keep(wanted[new], parts[0])
        if not new.all():
            assert self._kept is not None
            parts.append(self._kept[torch.from_numpy(place[~new])])
        order = np.argsort(np.concatenate([np.flatnonzero(new), np.flatnonzero(~new)]))
        return torch.cat(parts)[torch.from_numpy(order[where])]

    def contents(self) -> list[bytes]:
        """A hash of the bytes of each image."""
        return of_each_image(self._rows, self._column, self._folder)

    def _keep(self, indices: NDArray[np.int64], pixels: Tensor) -> None:
        """Keeps as many of these m images (m, channels, h, w) as there is room for."""
        if self._kept is None:
            room = min(len(self._rows), int(self._cache // (pixels[0].numel() * pixels.element_size())))
            self._kept = pixels.new_empty(room, *pixels.shape[1:])
        count = min(len(indices), len(self._kept) - self._used)
        self._kept[self._used : self._used + count] = pixels[:count]
        self._place[indices[:count]] = np.arange(self._used, self._used + count)
        self._used += count

    def _decode(self, indices: NDArray[np.int64]) -> Tensor:
        files = self._rows[indices.tolist()][self._column]

        def pixels(file: Any) -> Tensor:
            return self._processor(images=[decode_image(file, self._folder, self._range)], return_tensors="pt")[
                "pixel_values"
            ]

        return torch.cat(list(self._pool.map(pixels, files) if self._pool else map(pixels, files)))


def decode_image(file: dict[str, Any], folder: str = "", pixel_range: tuple[float, float] | None = None) -> Any:
    """Decodes an image to a PIL image in RGB.

    Args:
        file: {"bytes": ..., "path": ...}; the path counts if there are no bytes.
        folder: where a relative path counts from.
        pixel_range: the values that become 0 and 255, of an image of more than 8 bits a channel; None: 0 and 65535 for
            whole numbers, 0 and 1 for others.
    """
    image = _opened(file, folder)
    if image.mode not in _DEEP:
        return image.convert("RGB")
    low, high = pixel_range or _DEEP[image.mode]
    scaled = (np.asarray(image, np.float64) - low) * (255 / (high - low))
    return PIL.Image.fromarray(np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)).convert("RGB")


_DEEP = dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N", "I"), (0.0, 65535.0)) | {"F": (0.0, 1.0)}
"""PIL's modes of more than 8 bits a channel -> the values that are usually black and white."""


def _opened(file: dict[str, Any], folder: str) -> Any:
    return Image().decode_example(_located(file, folder))


def _located(file: dict[str, Any], folder: str) -> dict[str, Any]:
    if file["bytes"] is None and file["path"] and "://" not in file["path"]:
        return {"bytes": None, "path": str(Path(folder) / file["path"])}
    return file


def _is_cut(file: dict[str, Any], folder: str) -> bool:
    """Whether PIL keeps only the upper 8 of an image's 16 bits a channel, as of all that have colours or alpha."""
    file = _located(file, folder)
    with PIL.Image.open(file["path"] if file["bytes"] is None else io.BytesIO(file["bytes"])) as image:
        return image.mode not in _DEEP and any(";16" in str(part[3]) for part in getattr(image, "tile", ()))


def image_folder(config: TaskConfig) -> str:
    """The folder where relative image paths in the data count from: that of the file which lists them."""
    path = Path(config.data or "").expanduser()
    return str((path.parent if path.is_file() else path).resolve()) if path.exists() else ""


def holds_images(rows: Dataset, column: str) -> None:
    """UserError if a column holds neither images nor their bytes or paths."""
    feature = rows.features[column]
    words = ("string", "large_string", "binary", "large_binary")
    is_struct = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if not (isinstance(feature, Image) or is_struct or (isinstance(feature, Value) and feature.dtype in words)):
        raise UserError(
            f"task.image_column: column {column!r} holds {feature}, not images; name a column of images, of their "
            "bytes, or of paths."
        )


def readable_images(config: TaskConfig, split: str, rows: Dataset, column: str) -> Dataset:
    """Checks that all images decode, and that their values fit the scale from black to white.

    Args:
        config: `skip_bad` says whether to leave out images that do not decode.
        split: "train" or "test", for messages.
        rows: the examples.
        column: of the images.

    Returns:
        `rows`, without the images that do not decode.

    Raises:
        UserError: images do not decode (unless `skip_bad`), or have values outside the scale.
    """
    checked = preprocess(
        rows.select_columns([column]),
        _decodes,
        config,
        f"Checking {split} images",
        column=column,
        folder=image_folder(config),
    )
    fine = np.array(checked["decodes"][:], bool)
    low, high, cut = (np.array(checked[name][:], float)[fine] for name in ("low", "high", "cut"))
    _check_range(config, split, low, high, cut > 0)
    bad = np.flatnonzero(~fine)
    if not bad.size:
        return rows
    files = rows[bad[:5].tolist()][column]
    names = [Path(f["path"]).name if f["path"] else place(rows, int(i)) for f, i in zip(files, bad, strict=False)]
    more = f" and {bad.size - 5} more" if bad.size > 5 else ""
    message = f"{bad.size} of {len(rows)} {split} images do not decode: {', '.join(names)}{more}"
    if not config.skip_bad:
        raise UserError(f"task.data: {message}; mend or remove them, or leave them out with task.skip_bad.")
    if bad.size == len(rows):
        raise UserError(f"task.data: {message}; none is left.")
    warnings.warn(f"task.skip_bad: {message}; they are left out.", stacklevel=4)
    return rows.select(np.flatnonzero(fine))


def _decodes(batch: dict[str, list[Any]], column: str, folder: str) -> dict[str, list[Any]]:
    """For each image whether it decodes, its lowest and highest value, and whether it was cut to 8 bits a channel.

    The values are of images with more than 8 bits a channel, on the scale from the usual black, 0, to the usual white,
    1. They are NaN for all other images.
    """

    def check(file: Any) -> tuple[bool, float, float, bool]:
        try:
            image = _opened(file, folder)
            colours = image.convert("RGB")
            cut = _is_cut(file, folder)
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, and more
            return False, np.nan, np.nan, False
        if image.mode not in _DEEP and not cut:
            return True, np.nan, np.nan, False
        values = np.asarray(colours if cut else image, np.float64)
        if not np.isfinite(values).all():
            return False, np.nan, np.nan, cut
        white = 255.0 if cut else _DEEP[image.mode][1]
        return True, values.min() / white, values.max() / white, cut

    decodes, low, high, cut = zip(*map(check, batch[column]), strict=True)
    return {"decodes": list(decodes), "low": list(low), "high": list(high), "cut": list(cut)}


def _check_range(config: TaskConfig, split: str, low: NDArray[Any], high: NDArray[Any], cut: NDArray[Any]) -> None:
    """UserError for images whose values lie outside the scale, or are on another than the only one that can be read;
    a warning if they fill little of it."""
    if cut.any() and config.pixel_range not in (None, (0, 65535)):
        raise UserError(
            f"task.pixel_range: {cut.sum()} of {len(cut)} {split} images have 16 bits a channel and colours or "
            "transparency, and can be read on the scale from 0 to 65535 only; convert them to 8 bits a channel, or "
            "leave task.pixel_range out."
        )
    if cut.any() and config.pixel_range is None and high[cut].max() < 0.25:
        warnings.warn(
            f"task.data: {cut.sum()} of {len(cut)} {split} images have 16 bits a channel and use only "
            f"{high[cut].max():.1%} of the scale from 0 to 65535; convert them to 8 bits a channel if they should not "
            "be dark.",
            stacklevel=4,
        )
    deep = ~np.isnan(low) & ~cut
    if config.pixel_range is not None or not deep.any():
        return
    lowest, highest = low[deep].min(), high[deep].max()
    if lowest < 0 or highest > 1:
        raise UserError(
            f"task.pixel_range: {deep.sum()} of {len(deep)} {split} images have more than 8 bits a channel, and values "
            "beyond 0 to 65535 (whole numbers) or 0 to 1 (others); set task.pixel_range to the values that are black "
            "and white."
        )
    if highest < 0.25:
        warnings.warn(
            f"task.pixel_range: {deep.sum()} of {len(deep)} {split} images have more than 8 bits a channel and use "
            f"only {highest:.1%} of the scale from black to white; set task.pixel_range if they should not be dark.",
            stacklevel=4,
        )

"""How do images become pixel values? `Pixels` decodes and processes them when a batch asks for them."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from numpy.typing import NDArray
from torch import Tensor

from decaf_lora.config import TaskConfig
from decaf_lora.data.mapping import preprocess
from decaf_lora.errors import UserError


class Pixels:
    """Images as a processor makes them: called with indices (m,), gives pixel values (m, channels, h, w).

    Images are decoded and processed for the batch that asks for them, by `workers` threads. The first ones that
    fit into `cache` bytes are kept: few-shot learning of a large set comes back to few of its images.
    """

    def __init__(
        self, rows: Dataset, column: str, processor: Any, workers: int = 0, folder: str = "", cache: float = 2**29
    ) -> None:
        self._rows, self._column, self._processor, self._folder = rows, column, processor, folder
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

    def _keep(self, indices: NDArray[np.int64], pixels: Tensor) -> None:
        """Takes as many of these images (m, channels, h, w) as there is room for."""
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
            return self._processor(images=[decode_image(file, self._folder)], return_tensors="pt")["pixel_values"]

        return torch.cat(list(self._pool.map(pixels, files) if self._pool else map(pixels, files)))


def decode_image(file: dict[str, Any], folder: str = "") -> Any:
    """A PIL image in RGB of {"bytes": ..., "path": ...}; a relative path counts from `folder`."""
    if file["bytes"] is None and file["path"] and "://" not in file["path"]:
        file = {"bytes": None, "path": str(Path(folder) / file["path"])}
    return Image().decode_example(file).convert("RGB")


def image_folder(config: TaskConfig) -> str:
    """Where relative image paths in the data count from: beside the file that lists them."""
    path = Path(config.data or "").expanduser()
    return str((path.parent if path.is_file() else path).resolve()) if path.exists() else ""


def _decodes(batch: dict[str, list[Any]], column: str, folder: str) -> dict[str, list[bool]]:
    def check(file: Any) -> bool:
        try:
            decode_image(file, folder)
        except Exception:  # decoders raise OSError, SyntaxError, ValueError, struct.error, and more
            return False
        return True

    return {"decodes": [check(file) for file in batch[column]]}


def readable_images(config: TaskConfig, split: str, rows: Dataset, column: str) -> Dataset:
    """`rows` without the images that do not decode; UserError names them unless `config.skip_bad`."""
    checked = preprocess(
        rows.select_columns([column]),
        _decodes,
        config,
        f"Checking {split} images",
        column=column,
        folder=image_folder(config),
    )
    fine = np.array(checked["decodes"][:], bool)
    bad = np.flatnonzero(~fine)
    if not bad.size:
        return rows
    files = rows[bad[:5].tolist()][column]
    names = [Path(f["path"]).name if f["path"] else f"row {i}" for f, i in zip(files, bad, strict=False)]
    more = f" and {bad.size - 5} more" if bad.size > 5 else ""
    message = f"{bad.size} of {len(rows)} {split} images do not decode: {', '.join(names)}{more}"
    if not config.skip_bad:
        raise UserError(f"task.data: {message}; mend or remove them, or leave them out with task.skip_bad.")
    if bad.size == len(rows):
        raise UserError(f"task.data: {message}; none is left.")
    warnings.warn(f"task.skip_bad: {message}; they are left out.", stacklevel=4)
    return rows.select(np.flatnonzero(fine))

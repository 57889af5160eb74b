"""Where do examples come from?

`load` reads what a user names (a data set of the Hub, a folder, a file) with `datasets.load_dataset`, numbers
its labels, and cuts it into training and test examples. Nothing is dropped or renumbered in silence: a mistake
is a `UserError` that names the field, anything left out is counted in one warning. Tables stay memory-mapped
on disk; token sequences are read from there as one `Ragged` array, images are decoded by `Pixels` when a
batch asks for them.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
from numpy.typing import NDArray
from torch import Tensor

from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError, unknown
from decaf_lora.randomness import numpy_generator

READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
"""File suffix -> the reader of `datasets`. A text file holds one example a paragraph."""

Labels = NDArray[np.int64]


class Examples(NamedTuple):
    """Training and test examples, numbered alike in the tables and the label arrays."""

    train: Dataset
    test: Dataset
    labels: Labels
    """(num_train,) class numbers; zeros if the data is used without labels."""
    test_labels: Labels
    """(num_test,)"""
    classes: list[str]
    """Names of the classes; empty if the data is used without labels."""
    named: bool
    """Whether the data or the user gave the names; false if they are just numbers."""


def load(
    config: TaskConfig,
    columns: Iterable[tuple[str, str]],
    *,
    label: str | None = None,
    image: str | None = None,
) -> Examples:
    """The examples that `config` names, with the columns that a task needs.

    `columns` are pairs (field of the configuration, column); `label` and `image` are columns as well.
    Raises UserError for data that cannot be read, splits and columns that do not exist, empty splits, missing
    values, labels that are no classes or unseen in training, and images that do not decode.
    """
    wanted = list(columns)
    wanted += [("label_column", label)] if label is not None else []
    wanted += [("image_column", image)] if image is not None else []
    splits = _read(config)
    for name, rows in splits.items():
        if len(rows) == 0:
            split = getattr(config, f"{name}_split") or name
            raise UserError(f"task.{name}_split: the split {split!r} holds no example; choose or make another.")
        for field, column in wanted:
            if column not in rows.column_names:
                raise unknown(f"task.{field}", column, rows.column_names)
            if column != label:
                _refuse_missing(field, column, name, rows)
    if image is not None:
        splits = {k: _readable_images(config, k, rows.cast_column(image, Image(decode=False)), image)
                  for k, rows in splits.items()}  # fmt: skip
    if label is None:
        zeros = {k: np.zeros(len(rows), np.int64) for k, rows in splits.items()}
        numbers, classes, named = zeros, list[str](), False
    else:
        numbers, classes, named = _numbered(config, splits, label)
    if config.test_share is not None:
        splits, numbers = _held_out(config, splits["train"], numbers["train"])
    for name, limit in (("train", config.max_train), ("test", config.max_test)):
        if limit is not None and limit < 1:
            limit = math.ceil(limit * len(splits[name]))
        if limit is not None and limit < len(splits[name]):
            kept = np.sort(spread(numbers[name], config.data_seed, f"max_{name}")[: int(limit)])
            splits[name], numbers[name] = splits[name].select(kept), numbers[name][kept]
    _warn_of_absent_classes(numbers, classes)
    return Examples(splits["train"], splits["test"], numbers["train"], numbers["test"], classes, named)


def spread(labels: Labels, seed: int, purpose: str) -> NDArray[np.int64]:
    """(n,) a random order of the examples of which every stretch has nearly the class mix of all.

    The j-th of a class's m examples, in random order, is put at the fraction (j + 1/2) / m.
    """
    order = numpy_generator(seed, "data", purpose).permutation(len(labels))
    _, inverse, counts = np.unique(labels[order], return_inverse=True, return_counts=True)
    by_class = np.argsort(inverse, kind="stable")
    rank = np.empty(len(labels))
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort((rank + 0.5) / counts[inverse], kind="stable")]


def looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path and not as a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS


# Reading


def _read(config: TaskConfig) -> dict[str, Dataset]:
    """The splits `train` and, unless a share is held out, `test`."""
    if config.data is None:
        raise UserError("task.data: not set; name a data set of the Hugging Face Hub or a local path.")
    found = _open(config)
    wanted = {"train": config.train_split}
    if config.test_share is None:
        wanted["test"] = config.test_split or "test"
    splits = {}
    for name, split in wanted.items():
        if split in found:
            splits[name] = found[split]
        elif "[" in split or "+" in split:
            splits[name] = _open(config, split)
        else:
            remedy = " Or hold out a part of the training split: task.test_share 0.2." * (name == "test")
            raise UserError(str(unknown(f"task.{name}_split", split, found)) + remedy)
    return splits


def _open(config: TaskConfig, split: str | None = None) -> Any:
    """A `DatasetDict`, or the `Dataset` of a split or slice."""
    assert config.data is not None
    name, options = config.data, dict[str, Any]()
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    if path.is_file():
        suffix = next((s for s in reversed(path.suffixes) if s in READERS), None)
        if suffix is None:
            raise UserError(f"task.data: {path} is none of the files that can be read ({', '.join(READERS)}).")
        name = READERS[suffix]
        options = {"data_files": str(path)}
        options |= {".tsv": {"sep": "\t"}, ".txt": {"sample_by": "paragraph"}}.get(suffix, {})
    elif path.is_dir():
        name = str(path)
        if {file.suffix for file in path.iterdir()} & set(READERS) == {".txt"}:
            options = {"sample_by": "paragraph"}
    elif looks_local(name):
        raise UserError(
            f"task.data: {path} does not exist; put the data there or name other data (docs/reproducing.md says "
            "where those of the recipes come from)."
        )
    try:
        return datasets.load_dataset(name, config.subset, split=split, **options)
    except (ConnectionError, FileNotFoundError) as error:
        if path.exists():
            raise UserError(f"task.data: {path} cannot be read: {_first_line(error)}") from error
        raise UserError(
            f"task.data: {config.data!r} is no local path, is not in the cache, and cannot be fetched from the "
            f"Hugging Face Hub. Where there is a network, run `hf download --repo-type dataset {config.data} "
            "--local-dir DIR`, bring DIR here and set task.data to it."
        ) from error
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"task.data: {path} cannot be read: {_first_line(error.__cause__ or error)}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            empty = str(error).split('"')[1]
            field = {config.train_split: "train_split", config.test_split or "test": "test_split"}.get(empty, "data")
            raise UserError(f"task.{field}: the split {empty!r} holds no example; choose or make another.") from error
        field = "subset" if "BuilderConfig" in str(error) or "Config name" in str(error) else "data"
        field = "train_split or task.test_split" if split is not None else field
        raise UserError(f"task.{field}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _refuse_missing(field: str, column: str, split: str, rows: Dataset) -> None:
    values = rows.data.column(column)
    if values.null_count:
        first = values.is_null().to_pylist().index(True)
        raise UserError(
            f"task.{field}: {values.null_count} of {len(rows)} {split} examples have nothing in column "
            f"{column!r} (first: row {first}); fill or remove these rows."
        )


# Labels and splits


def _numbered(config: TaskConfig, splits: dict[str, Dataset], column: str) -> tuple[dict[str, Labels], list[str], bool]:
    """The class numbers of every split, the names of the classes, and whether these were given."""
    feature = splits["train"].features[column]
    values: dict[str, list[Any]] = {k: rows[column][:] for k, rows in splits.items()}
    for name, of_split in values.items():
        missing = [i for i, v in enumerate(of_split) if _is_missing(v, feature)]
        if missing:
            raise UserError(
                f"task.label_column: {len(missing)} of {len(of_split)} {name} examples have no label in column "
                f"{column!r} (first: row {missing[0]}); remove these rows or choose another split."
            )
    kinds = {type(v) for of_split in values.values() for v in of_split}
    if float in kinds and all(v == int(v) for of_split in values.values() for v in of_split):
        values, kinds = {k: [int(v) for v in of_split] for k, of_split in values.items()}, {int}
    if len(kinds) > 1 or not kinds <= {bool, int, str}:
        raise UserError(
            f"task.label_column: column {column!r} holds {feature}, which are no classes; use whole numbers or strings."
        )
    given = list(config.classes) or (list(feature.names) if isinstance(feature, ClassLabel) else [])
    known: Sequence[Any]
    if kinds == {bool}:
        known = [False, True]
    elif kinds == {int} and given:
        known = range(len(given))
    else:
        known = given or sorted(set(values["train"]))
    if given and len(given) != len(known):
        raise UserError(f"task.classes: {len(given)} names for {len(known)} classes ({_listed(known)}).")
    number = {value: i for i, value in enumerate(known)}
    for name, of_split in values.items():
        strange = Counter(v for v in of_split if v not in number)
        if not strange:
            continue
        shown = f"{strange.total()} of {len(of_split)} {name} examples have labels"
        what = ", ".join(f"{v!r} ({n})" for v, n in strange.most_common(5))
        if given:
            raise UserError(
                f"task.classes: {shown} that are not among the {len(given)} classes: {what}; name all classes "
                "(numbers count from 0)."
            )
        raise UserError(
            f"task.label_column: {shown} unseen in training: {what}; remove them, choose another split, or "
            "name all classes in task.classes."
        )
    numbers = {k: np.array([number[v] for v in of_split], np.int64) for k, of_split in values.items()}
    return numbers, given or [str(v) for v in known], bool(given) or kinds == {str}


def _is_missing(value: Any, feature: Any) -> bool:
    if value is None or value == "" or value != value:
        return True
    return isinstance(feature, ClassLabel) and value < 0  # the Hub's mark of a hidden label


def _held_out(config: TaskConfig, rows: Dataset, labels: Labels) -> tuple[dict[str, Dataset], dict[str, Labels]]:
    assert config.test_share is not None
    if len(rows) < 2:
        raise UserError("task.test_share: there is only 1 example; none can be held out.")
    size = min(max(1, round(config.test_share * len(rows))), len(rows) - 1)
    order = spread(labels, config.data_seed, "test_share")
    parts = {"train": np.sort(order[size:]), "test": np.sort(order[:size])}
    return {k: rows.select(p) for k, p in parts.items()}, {k: labels[p] for k, p in parts.items()}


def _warn_of_absent_classes(numbers: dict[str, Labels], classes: list[str]) -> None:
    present = {k: set(of_split.tolist()) for k, of_split in numbers.items()}
    for name, other in (("train", "test"), ("test", "train")):
        absent = [classes[c] for c in sorted(present[other] - present[name])] if classes else []
        if absent:
            warnings.warn(
                f"task.data: {len(absent)} of {len(classes)} classes have {other} examples but no {name} "
                f"example: {_listed(absent)}.",
                stacklevel=3,
            )


def _listed(names: Sequence[Any], most: int = 5) -> str:
    return ", ".join(str(n) for n in names[:most]) + (f" and {len(names) - most} more" * (len(names) > most))


# Tokens


def preprocess(
    rows: Dataset, function: Callable[..., Any], config: TaskConfig, title: str, **arguments: Any
) -> Dataset:
    """`rows` mapped in batches by `function`, whose columns replace the old ones.

    Cached on disk by the contents of all arguments, in `config.num_workers` processes, with a progress bar.
    """
    return rows.map(
        function,
        batched=True,
        remove_columns=rows.column_names,
        fn_kwargs=arguments,
        num_proc=min(config.num_workers, len(rows)) or None,
        desc=title,
    )


def warn_truncated(counts: dict[str, int], limit: int) -> None:
    """One warning for all the sequences (split -> how many) that were longer than `limit` tokens."""
    if any(counts.values()):
        each = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
        warnings.warn(f"task.max_length: truncated to {limit} tokens: {each} examples.", stacklevel=3)


class Ragged:
    """Token sequences of different lengths in one array: sequence i is values[offsets[i] : offsets[i + 1]]."""

    def __init__(self, values: NDArray[Any], offsets: NDArray[np.int64]) -> None:
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, rows: Dataset, column: str) -> Ragged:
        """The lists of a column of what `preprocess` returns."""
        chunks = rows.data.column(column).chunks if len(rows) else []
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
        lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        offsets = np.concatenate([[0], *lengths]).astype(np.int64).cumsum()
        return cls(np.concatenate(values).astype(np.int32) if values else np.zeros(0, np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int | np.integer[Any]) -> NDArray[Any]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(n,)"""
        return np.diff(self.offsets)

    def take(self, indices: NDArray[np.int64]) -> Ragged:
        """Sequences `indices` (m,) as an array of their own."""
        values = [self[i] for i in indices] or [self.values[:0]]
        return Ragged(np.concatenate(values), np.concatenate([[0], self.lengths[indices].cumsum()]))

    def padded(self, indices: NDArray[np.int64], fill: int) -> tuple[Tensor, Tensor]:
        """Sequences `indices` (m,) padded on the right to the longest: (tokens (m, L), mask (m, L)), int64."""
        lengths = self.lengths[indices]
        positions = np.arange(lengths.max(initial=0))
        inside = positions < lengths[:, None]
        where = np.where(inside, self.offsets[indices][:, None] + positions, 0)
        tokens = np.where(inside, self.values[where] if self.values.size else 0, fill)
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(inside.astype(np.int64))


# Images


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


def _readable_images(config: TaskConfig, split: str, rows: Dataset, column: str) -> Dataset:
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


def needs_text(rows: Dataset, fields: Iterable[tuple[str, str]]) -> None:
    """UserError if a column (pairs of field and column) holds something other than text."""
    for field, column in fields:
        feature = rows.features[column]
        if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string")):
            raise UserError(f"task.{field}: column {column!r} holds {feature}, not text.")

"""How are the splits of a data set read? From the Hub, a folder, a file, or what `datasets` has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError, unknown

READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
"""File suffix -> the reader of `datasets`. A text file holds one example a paragraph."""


def looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path and not as a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS


def read(config: TaskConfig) -> dict[str, Dataset]:
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

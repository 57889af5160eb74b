"""How are the splits of a data set read? From the Hub, a folder, a file, or what `datasets` has saved."""

from __future__ import annotations

import glob
import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets import Dataset, DatasetDict, ReadInstruction, concatenate_datasets
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from decaf_lora.adapters.files import refuse_pointer
from decaf_lora.config import TaskConfig
from decaf_lora.data import content
from decaf_lora.data.folders import IMAGES, METADATA, check_image_folder
from decaf_lora.data.places import stem_of, suffix_of
from decaf_lora.data.tables import SUFFIXES, cache_folder, read_table, writable_cache
from decaf_lora.errors import UserError, unknown

READERS = (*SUFFIXES, ".parquet")
"""Suffixes of the files that can be read. A text file holds one example a paragraph."""


def looks_local(name: str) -> bool:
    """Whether a name that does not exist here was meant as a path and not as a name on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or suffix_of(Path(name)) in READERS


def read(config: TaskConfig, wanted: Sequence[str] = ()) -> dict[str, Dataset]:
    """Reads the splits of a data set.

    Args:
        config: names the data and its splits.
        wanted: columns that the task needs.

    Returns:
        "train", and unless a share of it is to be held out also "test" -> rows.

    Raises:
        UserError: the data cannot be read or fetched, or a split does not exist.
    """
    if config.data is None:
        raise UserError("task.data: not set; name a data set of the Hugging Face Hub or a local path.")
    found = _open(config, wanted)
    names = {"train": config.train_split}
    if config.test_share is None:
        names["test"] = config.test_split or "test"
    splits = {}
    for name, split in names.items():
        if split in found:
            splits[name] = found[split]
        elif "[" in split or "+" in split:
            splits[name] = _sliced(found, split)
        else:
            remedy = " Or hold out a part of the training split: task.test_share 0.2." * (name == "test")
            raise UserError(str(unknown(f"task.{name}_split", split, found)) + remedy)
    return splits


def read_split(config: TaskConfig, wanted: Sequence[str], split: str | None = None) -> Dataset:
    """The rows of one split, whatever it is called.

    Args:
        config: names the data, and how to read them.
        wanted: columns that are needed.
        split: None: `test` if there are several, else the only one.

    Raises:
        UserError: the data cannot be read or fetched, or the split does not exist.
    """
    found = _open(config, wanted)
    if split is None and len(found) == 1:
        return next(iter(found.values()))
    name = split or "test"
    if name not in found:
        raise unknown("split", name, found)
    return found[name]


def _sliced(found: DatasetDict, split: str) -> Dataset:
    """The rows of a slice such as `train[:10%]`, or of a sum of splits and slices."""
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in found.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(f"task.train_split or task.test_split: {_first_line(error)}") from error
    chosen = []
    for part in parts:
        rows = found[part.splitname]
        start, stop = part.from_ or 0, len(rows) if part.to is None else part.to
        chosen.append(rows.select(range(start, max(start, stop))))
    return concatenate_datasets(chosen) if len(chosen) > 1 else chosen[0]


def _open(config: TaskConfig, wanted: Sequence[str]) -> DatasetDict:
    assert config.data is not None
    path = Path(config.data).expanduser()
    try:
        if path.is_file() or path.is_dir():
            _refuse_chains(path)
            if config.file_column is not None:
                return _sites(path, config, config.file_column, wanted)
        if path.is_file():
            return _file(path, config, wanted)
        if path.is_dir():
            return _folder(path, config, wanted)
    except OSError as error:  # a name that is too long for a path, a loop of links
        raise UserError(f"task.data: {config.data[:200]!r} cannot be read ({error.strerror}).") from error
    if looks_local(config.data):
        raise UserError(
            f"task.data: {path} does not exist; put the data there or name other data (docs/reproducing.md says "
            "where those of the recipes come from)."
        )
    with _as_lines(config, path):
        return _whole(datasets.load_dataset(config.data, config.subset))


def _refuse_chains(path: Path) -> None:
    """UserError for names with `::`: to fsspec, with which `datasets` opens files, `a::b` is another file, `a`."""
    for file in (path.resolve(), *(path.rglob("*::*") if path.is_dir() else ())):
        if "::" in str(file):
            raise UserError(f"task.data: {file} has '::' in its name, which names another file; rename it.")


def _file(path: Path, config: TaskConfig, wanted: Sequence[str]) -> DatasetDict:
    suffix = suffix_of(path)
    if suffix in SUFFIXES:
        _refuse_unused(config, {suffix})
        return DatasetDict(train=read_table(path, config, wanted))
    if suffix != ".parquet":
        raise UserError(f"task.data: {path} is none of the files that can be read ({', '.join(READERS)}).")
    _refuse_unused(config, {suffix})
    return _parquet(path, config, {"train": [path]})


def _parquet(path: Path, config: TaskConfig, files: dict[str, list[Path]]) -> DatasetDict:
    for file in (file for of_split in files.values() for file in of_split):
        refuse_pointer(file, "task.data")
        try:
            pyarrow.parquet.read_metadata(file)
        except (OSError, ValueError) as error:
            raise UserError(f"task.data: {file} cannot be read: {_first_line(error)}") from error
    with _as_lines(config, path):
        names = {split: [glob.escape(str(file)) for file in of_split] for split, of_split in files.items()}
        found = [content.digest(file) for of_split in files.values() for file in of_split]
        key = hashlib.sha256(repr((names, found)).encode()).hexdigest()
        return _whole(datasets.load_dataset("parquet", data_files=names, cache_dir=_cache(key)))


def _cache(key: str) -> str:
    """The folder in the cache for what `datasets` makes of files; key: a hash of their content."""
    return str(cache_folder() / key)


def _folder(path: Path, config: TaskConfig, wanted: Sequence[str]) -> DatasetDict:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        _refuse_unused(config, set())
        with _as_lines(config, path):
            return _whole(datasets.load_from_disk(str(path)))
    if described := _describes_itself(path):
        _refuse_patterns(path)
    files = {} if described else _split_files(path, config)
    kinds = Counter(_kind(file) for of_split in files.values() for file in of_split)
    if kinds["image"] and kinds["image"] >= kinds["table"] + kinds["text"]:
        return _images(path, config, files)
    read = "table" if kinds["table"] else "text"
    if not kinds[read]:
        with _as_lines(config, path):
            return _whole(datasets.load_dataset(str(path), config.subset, cache_dir=_cache(content.digest_all(path))))
    suffixes = {suffix_of(file) for file in _of(files, read)}
    _refuse_unused(config, suffixes)
    used = {split: [f for f in of_split if _kind(f) == read] for split, of_split in files.items()}
    used = {split: of_split for split, of_split in used.items() if of_split}
    _tell_ignored(path, {file for of_split in used.values() for file in of_split})
    if suffixes == {".parquet"}:
        return _parquet(path, config, used)
    return DatasetDict({split: _joined(of_split, config, wanted) for split, of_split in used.items()})


def _sites(path: Path, config: TaskConfig, column: str, wanted: Sequence[str]) -> DatasetDict:
    """The files of a folder, one for each site, joined to one split, and the file of the test set if there is one.

    `column` is added to the joined split; it holds the name of the file that a row comes from.
    """
    files = [file for file in sorted(path.iterdir()) if _kind(file) in ("table", "text")] if path.is_dir() else []
    _refuse_unused(config, {suffix_of(file) for file in files})
    tests = [file for file in files if stem_of(file) == (config.test_split or "test")]
    sites = [file for file in files if file not in tests]
    if not sites:
        raise UserError(f"task.data: {path} must be a folder with a file for each site ({', '.join(READERS)}).")
    if tests and config.test_share is not None:
        raise UserError(f"task.test_share: {path} has a test set, {tests[0].name}; leave test_share out, or the file.")
    _tell_ignored(path, set(files))
    parts = {file: _file(file, config.model_copy(update={"subset": None}), wanted)["train"] for file in files}
    if taken := [file.name for file in files if column in parts[file].column_names]:
        raise UserError(f"task.file_column: {taken[0]} has a column {column!r} already; choose another name.")
    named = [parts[file].add_column(column, [stem_of(file)] * len(parts[file])) for file in sites]
    found = {config.train_split: _concatenated(named, sites)}
    if tests:
        found[config.test_split or "test"] = _concatenated([parts[file] for file in tests], tests)
    return DatasetDict(found)


def _joined(files: Sequence[Path], config: TaskConfig, wanted: Sequence[str]) -> Dataset:
    parts = [
        read_table(file, config, wanted)
        if suffix_of(file) in SUFFIXES
        else _file(file, config.model_copy(update={"subset": None}), wanted)["train"]
        for file in files
    ]
    return _concatenated(parts, files)


def _concatenated(parts: Sequence[Dataset], files: Sequence[Path]) -> Dataset:
    try:
        return concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
    except (ValueError, TypeError) as error:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(
            f"task.data: {names} belong to one split, but their columns differ in kind: {_first_line(error)}"
        ) from error


def _images(path: Path, config: TaskConfig, files: dict[str, list[Path]]) -> DatasetDict:
    _refuse_unused(config, set())
    images = _of(files, "image")
    check_image_folder(path, images)
    metadata = {file for file in path.rglob("*") if file.name in METADATA}
    _tell_ignored(path, {*images, *metadata})
    with _as_lines(config, path):
        data = glob.escape(str(path.resolve()))
        return _whole(datasets.load_dataset("imagefolder", data_dir=data, cache_dir=_cache(content.digest_all(path))))


def _describes_itself(path: Path) -> bool:
    """Whether a folder says itself which of its files are which split, as many folders of the Hub do."""
    card = path / "README.md"
    return (path / ".huggingface.yaml").exists() or (
        card.is_file() and bool(re.match(r"---\s*\n(.*\n)*?configs:", card.read_text(errors="replace")))
    )


def _refuse_patterns(path: Path) -> None:
    """UserError for a folder whose name `datasets` would take for a pattern, with the names that its card gives."""
    if found := sorted(set("*?[") & set(str(path.resolve()))):
        raise UserError(
            f"task.data: {path.resolve()} has {found[0]!r} in its name, and its README.md or .huggingface.yaml says "
            "which files are which split: the two together would be a pattern of names. Rename it."
        )


def _split_files(path: Path, config: TaskConfig) -> dict[str, list[Path]]:
    """Split -> files, by the names of files and folders as `datasets` understands them."""
    with _as_lines(config, path):
        try:
            base = glob.escape(path.resolve().as_posix())  # `datasets` takes names for patterns
            patterns = get_data_patterns(base)
            found = DataFilesDict.from_patterns(patterns, base_path=base)
        except EmptyDatasetError as error:
            raise UserError(f"task.data: {path} cannot be read: {_first_line(error)}") from error
    return {str(split): [Path(file) for file in of_split] for split, of_split in found.items()}


def _kind(file: Path) -> str:
    suffix = suffix_of(file)
    if file.name in METADATA or file.name.startswith("."):
        return "metadata"
    if suffix in IMAGES:
        return "image"
    return "text" if suffix == ".txt" else "table" if suffix in READERS else "other"


def _of(files: dict[str, list[Path]], kind: str) -> list[Path]:
    return [file for of_split in files.values() for file in of_split if _kind(file) == kind]


def _tell_ignored(path: Path, used: set[Path]) -> None:
    """One warning of the files in a folder that are not read."""
    used = {file.resolve() for file in used}
    others = [
        file.relative_to(path).as_posix()
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and file.resolve() not in used
        and not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
        and file.name not in ("README.md", "LICENSE")
    ]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"task.data: {len(others)} of the files in {path} are not read: {', '.join(others[:3])}{more}.",
            stacklevel=2,
        )


def _refuse_unused(config: TaskConfig, suffixes: set[str]) -> None:
    """UserError for an option that is meant for a kind of file that the data does not have."""
    needed = {
        "delimiter": {".csv", ".tsv"},
        "quoting": {".csv", ".tsv"},
        "encoding": set(SUFFIXES) - {".xlsx"},
    }
    for field, those in needed.items():
        if getattr(config, field) is not None and not suffixes & those:
            raise UserError(f"task.{field}: {config.data} has no file that it is for; leave it out.")
    if config.subset is not None and ".xlsx" not in suffixes:  # only a warning: it may be of a recipe's own data
        warnings.warn(f"task.subset: {config.data} has no subsets; {config.subset!r} is not used.", stacklevel=2)


def _whole(found: Any) -> DatasetDict:
    return found if isinstance(found, DatasetDict) else DatasetDict(train=found)


@contextmanager
def _as_lines(config: TaskConfig, path: Path) -> Iterator[None]:
    """Turns whatever `datasets` raises into a UserError that names the field, and silences its own messages."""
    with writable_cache(), _quiet():
        try:
            yield
        except UserError:
            raise
        except (ConnectionError, FileNotFoundError) as error:
            if path.exists():
                raise UserError(f"task.data: {path} cannot be read: {_first_line(error)}") from error
            raise UserError(
                f"task.data: {config.data!r} is no local path, is not in the cache, and cannot be fetched from the "
                f"Hugging Face Hub. Where there is a network, run `hf download --repo-type dataset {config.data} "
                "--local-dir DIR`, bring DIR here and set task.data to it."
            ) from error
        except OSError as error:
            if error.errno is not None:
                raise
            raise UserError(f"task.data: {config.data} cannot be read: {_first_line(error)}") from error
        except datasets.exceptions.DatasetsError as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.errno is not None:
                raise cause from error
            raise UserError(f"task.data: {path} cannot be read: {_first_line(cause)}") from error
        except ValueError as error:
            if "corresponds to no data" in str(error):
                empty = str(error).split('"')[1]
                named = {config.train_split: "train_split", config.test_split or "test": "test_split"}
                field = named.get(empty, "data")
                raise UserError(
                    f"task.{field}: the split {empty!r} holds no example; choose or make another."
                ) from error
            if "BuilderConfig" in str(error) or "Config name" in str(error):
                raise UserError(f"task.subset: {_first_line(error)}") from error
            raise UserError(f"task.data: {config.data} cannot be read: {_first_line(error)}") from error
        except Exception as error:  # the readers of `datasets` raise whatever the libraries below them raise
            raise UserError(
                f"task.data: {config.data} cannot be read: {type(error).__name__}: {_first_line(error)}"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]

"""How does a file become a table on disk? It is read once, checked, and cached by its content.

The table lies memory-mapped in the cache of `datasets`. Its name is made from the file's content and the options of
reading, so a changed file is read again, whatever its time says.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable

from decaf_lora.adapters.files import refuse_pointer
from decaf_lora.config import TaskConfig
from decaf_lora.data import content
from decaf_lora.data.delimited import read_delimited
from decaf_lora.data.encodings import encoding_of
from decaf_lora.data.places import suffix_of
from decaf_lora.data.structured import read_excel, read_json, read_text
from decaf_lora.errors import UserError

VERSION = 1
"""Of the readers. Raise it whenever they read something differently: tables of older versions are then not used."""

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xlsx", ".txt")
"""Suffixes of the files that are read here. Case does not matter, and .gz, .bz2, .xz or .zip may follow."""


def read_table(path: Path, config: TaskConfig, wanted: Sequence[str]) -> Dataset:
    """The examples of a file, with the column `PLACE`. Warnings say what was guessed.

    Args:
        path: of the file.
        config: may give delimiter, quoting, encoding and sheet.
        wanted: columns that the task needs.

    Raises:
        UserError: the file cannot be read, or its table cannot be cached.
    """
    options = [config.delimiter, config.quoting, config.encoding, config.subset, sorted(set(wanted))]
    with readable(path):
        key = json.dumps([VERSION, content.digest(path), path.name, *options])
    name = hashlib.sha256(key.encode()).hexdigest()
    kept = cache_folder() / f"{name}.arrow"
    if not kept.exists():
        table, notes = _parsed(path, config, list(dict.fromkeys(wanted)))
        if any("\0" in column for column in table.column_names):
            raise UserError(
                f"task.encoding: {path} has a zero character in a column's name; it seems to be in another encoding, "
                "such as utf-16."
            )
        _keep(table.replace_schema_metadata({"notes": json.dumps(notes)}), kept)
    mapped = MemoryMappedTable.from_file(str(kept))
    for note in json.loads(mapped.schema.metadata[b"notes"]):
        warnings.warn(note, stacklevel=2)
    return Dataset(mapped, fingerprint=name[:32])


def cache_folder() -> Path:
    """Where tables are kept: a folder in the cache of `datasets`."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "decaf-lora"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    return folder


@contextmanager
def writable_cache() -> Iterator[None]:
    """Within the block, an OSError of a cache that cannot be written becomes a UserError that names the cache."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR):
            raise
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> UserError:
    return UserError(
        f"HF_DATASETS_CACHE: {datasets.config.HF_DATASETS_CACHE} cannot be written ({error.strerror}); set "
        "HF_DATASETS_CACHE to a folder that can be."
    )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within the block, an OSError becomes a UserError that says that `path` cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"task.data: {path} cannot be read ({error.strerror or error}).") from error


def _parsed(path: Path, config: TaskConfig, wanted: Sequence[str]) -> tuple[pa.Table, list[str]]:
    refuse_pointer(path, "task.data")
    suffix = suffix_of(path)
    with readable(path):
        raw = _unpacked(path.read_bytes(), path)
    if not raw.strip():
        raise UserError(f"task.data: {path} is empty.")
    if suffix == ".xlsx":
        return read_excel(raw, path, config, wanted), []
    encoding, told = encoding_of(raw, path.name, config.encoding)
    notes = [told] if told else []
    if suffix in (".csv", ".tsv"):
        table, more = read_delimited(raw, encoding, path, suffix, config, wanted)
        return table, notes + more
    return (read_text(raw, encoding, path) if suffix == ".txt" else read_json(raw, encoding, path, wanted)), notes


def _unpacked(raw: bytes, path: Path) -> bytes:
    try:
        match path.suffix.lower():
            case ".gz":
                return gzip.decompress(raw)
            case ".bz2":
                return bz2.decompress(raw)
            case ".xz":
                return lzma.decompress(raw)
            case ".zip":
                with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                    names = [name for name in archive.namelist() if not name.endswith("/")]
                    if len(names) != 1:
                        raise UserError(f"task.data: {path} holds {len(names)} files; unpack it and name a folder.")
                    return archive.read(names[0])
    except UserError:
        raise
    except Exception as error:  # each of the four libraries has errors of its own
        raise UserError(f"task.data: {path} cannot be unpacked ({error}).") from error
    return raw


def _keep(table: pa.Table, path: Path) -> None:
    """Writes a table under a temporary name and renames it, so that no other process ever sees half of it."""
    with writable_cache():
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

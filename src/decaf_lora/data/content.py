"""Are these the same data as before? Hashes of the content of files, whatever their times say.

A file that was unpacked, copied or restored can have the modification time of the file that it replaces. So caches are
keyed by content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_known: dict[tuple[Any, ...], str] = {}
"""State of a file (`_state`) -> its hash, for files that this process has read. The state includes `st_ctime`, which
only the system sets: no program can give it an old value."""


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    key = _state(path)
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]


def digest_all(root: Path) -> str:
    """SHA-256 over the path of a folder, and the paths and bytes of all files below it that are not hidden."""
    files = sorted(_files(root))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, files))
    found = hashlib.sha256(str(root.resolve()).encode())
    for file, of_file in zip(files, digests, strict=True):
        found.update(f"\n{file.relative_to(root)} {of_file}".encode(errors="surrogateescape"))
    return found.hexdigest()


def state(names: Iterable[str]) -> str:
    """A short text that changes whenever one of these files changes, or a file below one of these folders.

    Nothing is read: the text is made from the sizes, times and places of the files. A name of no file is constant.
    """
    found = hashlib.sha256()
    for name in names:
        path = Path(name).expanduser()
        for file in sorted(_files(path)) if path.is_dir() else [path]:
            found.update(repr(_state(file)).encode(errors="surrogateescape"))
    return found.hexdigest()


def of_rows(rows: Dataset, columns: Iterable[str], folder: str = "") -> str:
    """SHA-256 of some columns of a data set, in the order of its rows.

    Args:
        rows: the data set.
        columns: names of the columns.
        folder: where relative paths of images count from; images given by paths count by the content of their files.
    """
    chosen = sorted(set(columns))
    found = hashlib.sha256(repr(chosen).encode())
    if not chosen:
        return found.hexdigest()
    for table in rows.select_columns(chosen).with_format("arrow").iter(batch_size=1000):
        for name in chosen:
            for part in _parts(table[name], folder):
                found.update(part)
    return found.hexdigest()


def of_each_image(rows: Dataset, column: str, folder: str = "") -> list[bytes]:
    """SHA-256 of the bytes of each image in a column; `folder` as for `of_rows`."""
    tables = rows.select_columns([column]).with_format("arrow").iter(batch_size=1000)
    return [found for table in tables for found in _parts(table[column], folder)]


def _parts(column: pa.ChunkedArray, folder: str) -> Iterator[bytes]:
    import pyarrow as pa

    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        values = column.to_pylist()
        yield repr([None if v is None else len(v) for v in values]).encode()
        yield "".join(v or "" for v in values).encode(errors="surrogatepass")
        return
    values = column.to_pylist()
    if not (pa.types.is_struct(column.type) and {f.name for f in column.type} == {"bytes", "path"}):
        yield repr(values).encode(errors="surrogatepass")
        return
    for value in values:
        path = Path(folder) / (value["path"] or "") if value else Path()
        known = value and value["bytes"] is None and value["path"] and path.is_file()
        yield digest(path).encode() if known else hashlib.sha256((value or {}).get("bytes") or b"").digest()


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def _state(path: Path) -> tuple[Any, ...]:
    try:
        found = path.stat()
    except OSError:  # a link to nowhere
        return (str(path),)
    return (str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

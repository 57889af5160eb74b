"""How is a damaged file told from a good one? Weights are read, or refused in one line that names the file."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from decaf_lora.adapters.names import Tensors
from decaf_lora.errors import UserError

POINTER = b"version https://git-lfs.github.com/"
"""First bytes of a Git LFS pointer, the small file that stands for a large one until Git fetches it."""


def refuse_pointer(path: Path, field: str) -> None:
    """Raises UserError if `path` is a pointer of Git LFS."""
    try:
        with path.open("rb") as file:
            head = file.read(len(POINTER))
    except OSError:
        return
    if head == POINTER:
        raise UserError(
            f"{field}: {path} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull` there."
        )


def tensor_names(path: Path, field: str) -> list[str]:
    """Names of the tensors of a safetensors file, read from its header alone.

    Args:
        path: the file.
        field: the option that named it, for errors.

    Raises:
        UserError: the file is missing, empty, cut short, a pointer of Git LFS, or no safetensors file.
    """
    refuse_pointer(path, field)
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise UserError(
            f"{field}: {path} ({size} bytes) is damaged or cut short ({error}); copy or download it again."
        ) from error


def read_safetensors(path: Path, field: str) -> Tensors:
    """The tensors of a safetensors file, by name, on the CPU. Raises UserError as `tensor_names` does."""
    tensor_names(path, field)
    return load_file(path)


def refuse_damaged_model(directory: Path, field: str) -> None:
    """Raises UserError if a file of the model in `directory` is a pointer of Git LFS, or weights are damaged."""
    for path in sorted(directory.iterdir()):
        if path.is_file():
            refuse_pointer(path, field)
            if path.suffix == ".safetensors":
                tensor_names(path, field)

"""Does every site have the same base model? Hashes of its weights, tensor by tensor, and of its tokenizer.

The hash of a tensor is over its type, shape and bytes as stored in safetensors. So it does not matter which files a
model is split over, nor which type it is loaded as.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
)
"""Names of files that say how text becomes tokens; a model has some of them."""

_CHUNK = 2**24


def model_folder(task: TaskConfig) -> Path | None:
    """The folder of the task's base model on this machine; None for a task of the user's that names no model.

    Raises:
        UserError: the model is neither a folder nor in the cache of the Hugging Face Hub.
    """
    if task.model is None:
        if task.name == "digits":
            from decaf_lora.tasks.demo.digits_data import MODEL_DIR

            return Path(MODEL_DIR)
        return None
    if Path(task.model).is_dir():
        return Path(task.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(task.model, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"]))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"task.model: {task.model} is neither a folder nor on the Hub ({reason})") from error


def tensors(folder: Path) -> dict[str, str]:
    """Tensor -> SHA-256 of its type, shape and bytes. UserError if `folder` has no safetensors, or damaged ones."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, digest in _of_file(path):
            if found.setdefault(name, digest) != digest:
                raise UserError(f"task.model: {folder} has two different tensors {name}; remove the files of one.")
    if not found:
        raise UserError(f"task.model: {folder} has no weights as safetensors, of which the hashes are taken.")
    return found


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        try:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            begin = file.tell()
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                digest = hashlib.sha256(f"{entry['dtype']} {list(entry['shape'])}\n".encode())
                file.seek(begin + first)
                while first < last:
                    chunk = file.read(min(_CHUNK, last - first))
                    if not chunk:
                        raise ValueError("it ends early")
                    digest.update(chunk)
                    first += len(chunk)
                yield name, digest.hexdigest()
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise UserError(f"task.model: {path} is damaged ({error}); download it again.") from error


def tokenizer(folder: Path) -> dict[str, str]:
    """File of the tokenizer -> SHA-256 of its bytes."""
    paths = [folder / name for name in TOKENIZER_FILES]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def check_same(kind: str, here: Mapping[str, str], signed: Mapping[str, str], folder: Path) -> None:
    """Raises UserError if the hashes here are not those that were signed.

    The message names the first difference, and says how many there are.

    Args:
        kind: "weights" or "tokenizer", for the message.
        here: name -> hash on this machine.
        signed: name -> hash in the federation file.
        folder: the folder of the model, for the message.
    """
    other = [name for name in sorted(signed) if here.get(name) != signed[name]]
    if other:
        raise UserError(
            f"task.model: the {kind} in {folder} are not the organiser's: {other[0]} "
            f"{'differs' if other[0] in here else 'is missing'} ({len(other)} of {len(signed)}); get the same revision "
            "of the model."
        )

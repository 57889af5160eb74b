"""How do directories of adapters become one? Read, averaged, and written with what belongs to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decaf_lora.adapters.alike import check_alike, labels_of
from decaf_lora.adapters.card import write_card
from decaf_lora.adapters.fold import fold
from decaf_lora.adapters.merging import Merged, average, describe
from decaf_lora.adapters.peft_io import save_peft
from decaf_lora.adapters.portable import write_json, written_whole
from decaf_lora.adapters.saved import Saved, read_adapter
from decaf_lora.errors import UserError

COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja"),
    *("preprocessor_config.json", "processor_config.json", "labels.json", "generation_config.json"),
)
"""Patterns of the files beside an adapter that are copied unchanged."""
_CLASSES = {
    "SEQ_CLS": ("sequence-classification", "AutoModelForSequenceClassification"),
    "CAUSAL_LM": ("text", "AutoModelForCausalLM"),
}
"""PEFT's `task_type` -> (`use` in a task's description, class of transformers)."""


def merge(
    directories: Sequence[str | Path],
    to: str | Path | None = None,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: str | None = None,
) -> Merged:
    """Averages PEFT LoRA adapters: their products s B A, cut to a rank, and plainly what is trained in full (heads).

    Args:
        directories: of the adapters, as PEFT's `save_pretrained` or `decaf export` writes them.
        to: where to write the merged adapter, a new or empty folder; nothing is written if None.
        weights: what each adapter counts, in proportion, for instance its number of examples; equal if None.
        rank: of the merged adapter; None: the largest rank of the adapters.
        base: the base model, by name or directory. The merged full model is then written too, to `to`/model, and the
            adapters' own names of their base are not compared.

    Returns:
        The merged adapter, and what the cut to its rank lost.

    Raises:
        UserError: adapters of different bases, layers, heads or label orders, or that mean something else here than
            in PEFT; weights or a rank that make no sense; what cannot be written.
    """
    found = [read_adapter(Path(directory), "merge") for directory in directories]
    if not found:
        raise UserError("merge: no adapter given; give the directories of the adapters.")
    check_alike(found, compare_bases=base is None)
    merged = average(found, weights, rank)
    if to is not None:
        write_merged(Path(to), merged, found, base)
    elif base is not None:
        raise UserError("base: the full model needs a folder to be written to; give `to`.")
    return merged


def write_merged(to: Path, merged: Merged, found: Sequence[Saved], base: str | None) -> None:
    """Writes the result of `merge`.

    Args:
        to: a new or empty folder for the adapter.
        merged: the merged adapter.
        found: the adapters that it was made from.
        base: the base model; the full model is then written to `to`/model. None: the adapter only.

    Raises:
        UserError: `to` is not empty or cannot be written, or the base cannot take the adapter (`fold`).
    """
    from peft import LoraConfig

    made = {
        "model": "merged adapter",
        "merged from": ", ".join(one.directory.name for one in found),
        "how": describe(merged, len(found)),
    }
    task = _task(found, base)
    with written_whole(to) as aside:
        save_peft(merged.adapter, 0, LoraConfig.from_peft_type(**merged.config), aside)
        _companions(found, aside)
        write_json(aside / "decaf_lora.json", {"task": task, "made": made})
        write_card(aside, task, made, merged=False)
        if base is not None:
            model = aside / "model"
            model.mkdir()
            fold(task, aside, model, otherwise="merge without --base")
            _companions(found, model)
            write_json(model / "decaf_lora.json", {"task": task, "made": made})
            write_card(model, task, {**made, "model": "merged model"}, merged=True)


def _companions(found: Sequence[Saved], to: Path) -> None:
    """Copies `COMPANIONS` from the first adapter that has a tokenizer; from the first one if none has."""
    first = next((one for one in found if (one.directory / "tokenizer_config.json").exists()), found[0])
    for pattern in COMPANIONS:
        for path in first.directory.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, to / path.name)


def _task(found: Sequence[Saved], base: str | None) -> dict[str, Any]:
    """The description of the adapters' task, from the first decaf_lora.json; without one, from their configurations."""
    config = found[0].config
    use, kind = _CLASSES.get(str(config.get("task_type")), ("", "AutoModel"))
    auto = config.get("auto_mapping") or {}
    task: dict[str, Any] = {
        "name": "several adapters",
        "use": use,
        "model": next((one.config["base_model_name_or_path"] for one in found if _base(one)), None),
        "revision": next((one.config["revision"] for one in found if one.config.get("revision")), None),
        "model_class": auto.get("base_model_class", kind),
    }
    for one in found:
        try:
            task |= json.loads((one.directory / "decaf_lora.json").read_text(encoding="utf-8"))["task"]
            break
        except (OSError, ValueError, KeyError, TypeError):
            continue
    labels = next((names for one in found if (names := labels_of(one.directory))), None)
    if labels:
        task["labels"] = labels
    elif use == "sequence-classification":
        heads = [t.shape[0] for k, t in found[0].tensors.items() if ".lora_" not in k and k.endswith(".weight")]
        task |= {"num_labels": heads[-1]} if heads else {}
    if base is not None:
        directory = Path(base).expanduser()
        task |= {"model": str(directory.resolve()) if directory.is_dir() else base, "revision": None}
    return task


def _base(saved: Saved) -> str | None:
    return saved.config.get("base_model_name_or_path")

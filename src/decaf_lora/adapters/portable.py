"""What does an exported directory hold besides its weights? All that a fresh process needs to use them as the run did.

Beside the weights lie the tokenizer or processor, `labels.json` (id2label and label2id), generation settings,
`decaf_lora.json` (how examples are presented to the model) and a model card. All of it comes from the description of
the task (`Task.describe`) and from the base model's own directory. Neither data nor code of the task is needed, and no
Python code that a description names is imported.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.card import write_card
from decaf_lora.adapters.peft_io import save_peft
from decaf_lora.adapters.stacked import Attached
from decaf_lora.errors import UserError, remedy

if TYPE_CHECKING:
    from peft import LoraConfig

Facts = Mapping[str, Any]
"""Plain values in JSON's types."""


def outline(attached: Attached, task: Facts, agents: Iterable[int], averaged: int) -> dict[str, Any]:
    """What an export needs besides the tensors of a run.

    Args:
        attached: the adapted layers and the configurations of their adapters.
        task: `Task.describe`.
        agents: numbers of the agents whose configurations are listed; a single one stands for all.
        averaged: position in that list of the configuration of the averaged model.

    Returns:
        task, configs (the adapter_config.json of every agent, or one for all) and averaged, in JSON's types.
    """
    configs = [config_values(attached.config_of(agent), list(attached.extras), task) for agent in agents]
    return {"task": dict(task), "configs": configs, "averaged": averaged}


def config_values(config: LoraConfig, trained: list[str], task: Facts) -> dict[str, Any]:
    """An adapter_config.json with which PEFT's Auto classes find and load the base model.

    `modules_to_save` is reduced to modules that hold a trained parameter, each once: PEFT adds guesses of its own when
    it matches layers, and adds them again at every load.

    Args:
        config: of the adapter.
        trained: names of the parameters that were trained in full.
        task: `Task.describe`, which names the base model.
    """
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    modules = dict.fromkeys(values["modules_to_save"] or ())
    kept = [m for m in modules if any(f".{m}." in f".{name}" for name in trained)]
    values |= {"modules_to_save": kept or None, "inference_mode": True}
    values |= {"base_model_name_or_path": task.get("model"), "revision": task.get("revision")}
    if values["task_type"] is None and str(task.get("model_module", "")).startswith("transformers."):
        values["auto_mapping"] = {"base_model_class": task["model_class"], "parent_library": task["model_module"]}
    return values


def write_adapter(directory: Path, adapter: Adapter, agent: int | str, outline: Facts, made: Facts) -> None:
    """Writes one adapter as a PEFT directory, with all that belongs to it.

    Args:
        directory: where to write.
        adapter: alone on the leading axis.
        agent: number of the agent whose adapter it is, or the name of the averaged model.
        outline: what `outline` returns.
        made: rows of the model card on how the adapter was made, name -> text.
    """
    from peft import LoraConfig

    configs = outline["configs"]
    index = outline["averaged"] if not isinstance(agent, int) else agent if len(configs) > 1 else 0
    save_peft(adapter, 0, LoraConfig.from_peft_type(**copy.deepcopy(configs[index])), directory)
    write_companions(directory, outline["task"], {"model": name_of(agent), **made}, merged=False)


def name_of(agent: int | str) -> str:
    """How messages and model cards call an agent, or the averaged model."""
    return f"agent {agent}" if isinstance(agent, int) else "averaged model"


def write_companions(directory: Path, task: Facts, made: Facts, merged: bool) -> None:
    """Writes all that belongs to a model besides its weights: tokenizer, labels, description and model card.

    Args:
        directory: where the weights lie.
        task: `Task.describe`.
        made: rows of the model card on how the model was made, name -> text.
        merged: whether the weights are a full model instead of an adapter.
    """
    if task.get("model"):
        found = _save_preprocessing(directory, task)
        if found is not None and hasattr(_class_of(task), "generate"):
            _save_generation(directory, task, found)
    if labels := task.get("labels"):
        found = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
        write_json(directory / "labels.json", found)
    write_json(directory / "decaf_lora.json", {"task": dict(task), "made": dict(made)})
    write_card(directory, task, made, merged)


def preprocessing(task: Facts) -> Any:
    """The tokenizer, or the processor of images and text, with the task's padding token and maximal length."""
    from transformers import AutoProcessor, AutoTokenizer

    kind = AutoProcessor if task.get("processor") else AutoTokenizer
    found = kind.from_pretrained(task["model"], revision=task.get("revision"), trust_remote_code=False)
    tokenizer = getattr(found, "tokenizer", found)
    if tokenizer.pad_token is None and task.get("pad_token"):
        tokenizer.pad_token = task["pad_token"]
    if limit := task.get("max_length"):
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
    return found


@contextlib.contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """Writes a directory whole or not at all.

    Yields:
        A temporary folder beside `directory`. It is renamed to `directory` at the end of the `with` block, and removed
        if the block fails.

    Raises:
        UserError: `directory` exists and is not an empty folder, or cannot be written.
    """
    directory = Path(os.path.abspath(directory))  # Path(".").name is empty
    aside = directory.parent / f".{directory.name}.tmp"
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"to: {directory} is not an empty folder; choose another.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)
        aside.mkdir()
        yield aside
        os.replace(aside, directory)  # replaces an empty folder, too
    except UserError:
        raise
    except Exception as error:
        # The tokenizers library reports a full disk with a plain Exception.
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"to: cannot write {directory} ({reason}); {remedy(error)} or choose another.") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(aside)


def _remove(directory: Path) -> None:
    import shutil

    if directory.exists():
        shutil.rmtree(directory)


def _class_of(task: Facts) -> Any:
    import transformers

    return getattr(transformers, str(task.get("model_class")), None)


def _save_preprocessing(directory: Path, task: Facts) -> Any:
    """Writes and returns the tokenizer or processor; None, with a warning, where the base cannot be loaded any more."""
    try:
        found = preprocessing(task)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"export: without a tokenizer, since that of {task['model']} cannot be loaded ({reason}).",
            stacklevel=2,
        )
        return None
    found.save_pretrained(directory)
    return found


def _save_generation(directory: Path, task: Facts, tokenizer: Any) -> None:
    """Writes the base's generation settings, with the training texts' end token among those that end a text."""
    from transformers import AutoConfig, GenerationConfig

    where: dict[str, Any] = {"revision": task.get("revision")}
    try:
        settings = GenerationConfig.from_pretrained(task["model"], **where)
    except OSError:
        config = AutoConfig.from_pretrained(task["model"], trust_remote_code=False, **where)
        settings = GenerationConfig.from_model_config(config)
    ends = settings.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        settings.eos_token_id = [*ends, tokenizer.eos_token_id] if ends else tokenizer.eos_token_id
    # Not save_pretrained, which refuses settings that contradict each other; some published models have such.
    settings.to_json_file(directory / "generation_config.json", use_diff=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, in UTF-8 without escapes."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

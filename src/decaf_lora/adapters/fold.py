"""How does an adapter become part of its base model? PEFT folds it in, after weights that are shared come apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from decaf_lora.adapters.portable import preprocessing
from decaf_lora.adapters.quiet import transformers_quiet
from decaf_lora.errors import UserError

AUTO = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
"""Classes of transformers that choose the model's own."""
ALONE = "export the adapter alone (without --merge)"


def fold(task: Mapping[str, Any], adapter: Path, directory: Path, otherwise: str = ALONE) -> None:
    """Writes the base model with a PEFT adapter folded in, so that the model loads without PEFT.

    W0 + s B A is computed in float32 and rounded once, to the base's own dtype.

    Args:
        task: a task's description (`Task.describe`), which names the base model.
        adapter: directory of the PEFT adapter.
        directory: where to write the model.
        otherwise: what an error advises instead.

    Raises:
        UserError: the base is not of transformers, cannot be loaded or is in 4 bits; the adapter has values that are
            not finite; or the model always shares two weights of which the adapter changes one.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    model, dtype = base_model(task, otherwise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of shared weights, which `take_apart` has separated
        untied = take_apart(model, trained_modules(adapter))
        with transformers_quiet():
            adapted = PeftModel.from_pretrained(model, str(adapter))
        try:
            merged: Any = adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise UserError(f"merge: the adapter has values that are not finite ({error}).") from error
    if merged.can_generate():  # `write_companions` writes the base's own generation settings
        merged.generation_config = GenerationConfig()
    merged = merged.to(dtype)
    merged.save_pretrained(directory)
    if untied:
        _check_apart(merged, untied, directory, otherwise)


def base_model(task: Mapping[str, Any], otherwise: str = ALONE) -> tuple[Any, torch.dtype]:
    """The base model that a task's description names, with the task's classes and padding token.

    Args:
        task: the description (`Task.describe`).
        otherwise: what an error advises instead.

    Returns:
        The model in float32, and the dtype in which the base is kept.

    Raises:
        UserError: the base is not of transformers, cannot be loaded, or is in 4 bits.
    """
    import transformers

    if task.get("quantized"):
        raise UserError(
            "merge: the base was in 4 bits, where a merge would round most of the update away, and the full base gives "
            f"other scores; {otherwise}."
        )
    name = str(task.get("model_class"))
    kind = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not (known or name in AUTO):
        raise UserError(f"merge: the model of {task.get('name')} is not one of transformers; {otherwise}.")
    where = {"revision": task.get("revision")}
    options: dict[str, Any] = {**where, "dtype": torch.float32}
    if labels := task.get("labels"):
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    elif "num_labels" in task:
        options["num_labels"] = task["num_labels"]
    if task.get("use") == "sequence-classification":
        options["ignore_mismatched_sizes"] = True
    try:
        config = transformers.AutoConfig.from_pretrained(task["model"], trust_remote_code=False, **where)
        with transformers_quiet():
            model: Any = cast(Any, kind).from_pretrained(task["model"], **options)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"merge: the base model {task['model']} cannot be loaded ({reason}); put it there again, or {otherwise}."
        ) from error
    if task.get("pad_token"):
        model.config.get_text_config().pad_token_id = preprocessing(task).pad_token_id
    dtype = getattr(torch, task["dtype"]) if "dtype" in task else config.dtype
    return model.eval(), dtype or torch.float32


def trained_modules(adapter: Path) -> set[str]:
    """Names of the modules of the base whose weights the PEFT adapter in `adapter` changes."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        names = {name.removeprefix("base_model.model.") for name in file.keys()}  # noqa: SIM118 - it is no dict
    return {name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] for name in names}


def take_apart(model: nn.Module, modules: Iterable[str]) -> list[tuple[str, str]]:
    """Gives each of `modules` its own copy of the weights that it shares with other modules.

    Many language models use one matrix as input embedding and as output layer. An adapter on the output layer must
    not change the embedding.

    Returns:
        (parameter that was copied, another name of the shared one), for every copy.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    untied = []
    for module in modules:
        for key, parameter in list(model.get_submodule(module).named_parameters(recurse=False)):
            others = [name for name in owners[id(parameter)] if name != f"{module}.{key}"]
            if others:
                setattr(model.get_submodule(module), key, nn.Parameter(parameter.detach().clone()))
                untied.append((f"{module}.{key}", others[0]))
    if untied:
        config: Any = model.config
        for one in (config, config.get_text_config()):
            one.tie_word_embeddings = False
        cast(Any, model).all_tied_weights_keys = {}  # read when the model is saved
    return untied


def _check_apart(merged: Any, untied: list[tuple[str, str]], directory: Path, otherwise: str) -> None:
    """UserError if the written model, loaded again, shares the weights that `take_apart` has separated."""
    with transformers_quiet():
        again = dict(type(merged).from_pretrained(directory).named_parameters(remove_duplicate=False))
    now = dict(merged.named_parameters(remove_duplicate=False))
    for names in untied:
        if not all(torch.equal(again[name].to(now[name]), now[name]) for name in names):
            raise UserError(
                f"merge: {type(merged).__name__} always shares {' and '.join(names)}, of which the adapter changes one "
                f"only; {otherwise}."
            )

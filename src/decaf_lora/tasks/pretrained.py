"""How is a pretrained model or tokenizer loaded by name? For the tasks of this package and a user's own."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.checkpoint import checkpoint

from decaf_lora.adapters.files import refuse_damaged_model
from decaf_lora.adapters.quiet import transformers_quiet
from decaf_lora.config import TaskConfig
from decaf_lora.errors import UserError

Loader = Callable[[TaskConfig, Any, dict[str, Any]], tuple[Any, list[str]]]
_loader: ContextVar[Loader | None] = ContextVar("loader", default=None)


@contextlib.contextmanager
def loading_by(loader: Loader) -> Iterator[None]:
    """A context in which `pretrained_model` calls `loader`. The plan uses it: it needs only the shapes of a model."""
    token = _loader.set(loader)
    try:
        yield
    finally:
        _loader.reset(token)


def pretrained_model(config: TaskConfig, kind: Any, **options: Any) -> tuple[Any, list[str]]:
    """Loads the pretrained model that `config.model` names.

    New parameters, which the checkpoint does not have, are drawn from a fixed seed: every agent and every process
    starts with the same ones. Global random generators stay untouched.

    Args:
        config: names the model, and how it is to be loaded.
        kind: the transformers class that loads it.
        options: more arguments of its `from_pretrained`.

    Returns:
        The model in eval mode, and the names of its new parameters.

    Raises:
        UserError: there is no such model, or no GPU for a quantized one.
    """
    if config.model is not None:
        refuse_adapter(Path(config.model).expanduser())
    if (instead := _loader.get()) is not None:
        return instead(config, kind, options)
    options = {"dtype": getattr(torch, config.dtype), **options}
    if config.quantization == "4bit":
        options |= _four_bit()
    with torch.random.fork_rng(devices=[]), transformers_quiet():
        torch.default_generator.manual_seed(0)
        model, report = _from_pretrained(config, kind, output_loading_info=True, **options)
    if getattr(model, "_hf_peft_config_loaded", False):
        [lora] = [one for name, one in model.peft_config.items() if name in model.active_adapters()]
        _refuse_as_base(config.model, lora.base_model_name_or_path)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    new = {key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]}
    return model.eval(), sorted(new | set(report["missing_keys"]))


def pretrained_config(config: TaskConfig) -> Any:
    """The configuration of `config.model`, as transformers reads it."""
    from transformers import AutoConfig

    with transformers_quiet():
        return _from_pretrained(config, AutoConfig)


def refuse_adapter(model: Path) -> None:
    """UserError if `model` is the directory of an adapter: transformers would load its base and the adapter."""
    path = model / "adapter_config.json"
    if not path.is_file():
        return
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    _refuse_as_base(str(model), base)


def _refuse_as_base(model: str | None, base: str | None) -> None:
    raise UserError(
        f"task.model: {model} holds an adapter, on which no other can be built; set task.model to its base "
        f"{base or 'model'}, and to go on from the adapter also init_adapters, or fold it into its base first "
        "(PEFT's merge_and_unload)."
    )


def pretrained_tokenizer(config: TaskConfig, processor: bool = False) -> Any:
    """The tokenizer of `config.model`, or its whole processor (of images and text)."""
    from transformers import AutoProcessor, AutoTokenizer

    with transformers_quiet():
        found = _from_pretrained(config, AutoProcessor if processor else AutoTokenizer)
    if not processor:
        found("")  # leaves the truncation of its file: its state, and with it the cache of `data.preprocess`, is fixed
    return found


def max_tokens(config: TaskConfig, model: Any, tokenizer: Any) -> int:
    """The longest sequence in tokens: `config.max_length`, or the model's limit; UserError if the first is above it."""
    text_config = model.config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or sys.maxsize
    for name, module in model.named_modules():
        # RoBERTa and its relatives number positions from one after that of the padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    limit = min(limit, tokenizer.model_max_length)  # huge if the tokenizer knows no limit
    if config.max_length is None:
        if limit > 10**9:
            raise UserError("task.max_length: the model states no limit; set one.")
        return int(limit)
    if config.max_length > limit:
        raise UserError(f"task.max_length: {config.max_length} is more than the model's limit of {limit}.")
    return config.max_length


def refuse_unknown_tokens(model: Any, tokenizer: Any, **used: NDArray[Any]) -> None:
    """Raises UserError for tokens that the model has no embedding of: its tokenizer has words added, it has not.

    `used` are the numbers in use, by name of the model's argument: `input_ids`, `token_type_ids`.
    """
    sizes = {
        "input_ids": _num_embeddings(model),
        "token_type_ids": getattr(model.config.get_text_config(), "type_vocab_size", None),
    }
    for name, numbers in used.items():
        highest, size = int(np.max(numbers, initial=0)), sizes[name]
        if not size or highest < size:
            continue
        if name != "input_ids":
            raise UserError(f"task.model: its tokenizer gives {name} {highest}, and it knows {size}; mend one.")
        raise UserError(
            f"task.model: token {tokenizer.convert_ids_to_tokens(highest)!r} has number {highest}, beyond the model's "
            f"{size} embeddings; save it with model.resize_token_embeddings({len(tokenizer)}), or take out what was "
            "added to its tokenizer."
        )


def _num_embeddings(model: Any) -> int | None:
    """How many tokens the text model can read and, if it predicts tokens, tell apart."""
    try:
        layers = model.get_input_embeddings(), model.get_output_embeddings()
        return min(int(layer.weight.shape[0]) for layer in layers if layer is not None)
    except (NotImplementedError, AttributeError):  # a model of images and text
        return getattr(model.config.get_text_config(), "vocab_size", None)


def family_targets(model: Any) -> list[str] | None:
    """Names of the layers that project queries and values; None where PEFT has a default for the family."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS

    family = model.config.model_type
    if family in PEFT_DEFAULTS:
        return None
    leaves = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for names in (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("q", "v"), ("qkv_proj",), ("Wqkv",)):
        if leaves.issuperset(names):
            return list(names)
    return None


def checkpoint_layers(model: nn.Module) -> None:
    """Makes every block compute its activations again in the backward pass.

    transformers does this only in training mode, which would switch dropout on. This function leaves the mode alone.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"task.gradient_checkpointing: {type(model).__name__} does not support it.")
    for layer in layers:
        layer.forward = functools.partial(_checkpointed, layer.forward)


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def _from_pretrained(config: TaskConfig, kind: Any, **options: Any) -> Any:
    from decaf_lora.data import looks_local

    if config.model is None:
        raise UserError("task.model: not set; name a model of the Hugging Face Hub or a local directory.")
    path = Path(config.model).expanduser()
    local = path.is_dir()
    if not local and looks_local(config.model):
        raise UserError(f"task.model: {path} does not exist.")
    if local:
        refuse_damaged_model(path, "task.model")
    try:
        return kind.from_pretrained(str(path) if local else config.model, **options)
    except UserError:
        raise
    except Exception as error:  # what a directory holds can fail anywhere in transformers, tokenizers or a codec
        reason = " ".join(str(error).split()) or type(error).__name__
        if "ignore_mismatched_sizes" in reason:
            reason = "its weights have other shapes than its config.json says; bring the two that belong together."
        if local or not isinstance(error, OSError):
            raise UserError(f"task.model: {config.model} cannot be loaded: {reason[:300]}") from error
        if "gated" in reason:
            raise UserError(
                f"task.model: {config.model} is gated; accept its licence on its page, then `hf auth login`."
            ) from error
        raise UserError(
            f"task.model: {config.model!r} is no local directory, is not in the cache, and cannot be fetched "
            f"from the Hugging Face Hub. Where there is a network, run `hf download {config.model} "
            "--local-dir DIR`, bring DIR here and set task.model to it."
        ) from error


def _four_bit() -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("task.quantization: 4bit needs bitsandbytes; pip install bitsandbytes.")
    if not torch.cuda.is_available():
        raise UserError("task.quantization: 4bit needs a CUDA GPU, and there is none.")
    from transformers import BitsAndBytesConfig

    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "classifier", "score"],
    )
    return {"quantization_config": quantized, "device_map": {"": torch.cuda.current_device()}}

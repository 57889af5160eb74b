"""How is a model made without its weights? From its config.json alone, or from shapes that are built in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from decaf_lora import tasks
from decaf_lora.config import TaskConfig
from decaf_lora.data import looks_local
from decaf_lora.errors import UserError
from decaf_lora.tasks.sequence_classification import HEADS

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "openai/clip-vit-base-patch16": {
        "model_type": "clip",
        "projection_dim": 512,
        "text_config": {
            "vocab_size": 49408,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "projection_dim": 512,
        },
        "vision_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 16,
            "projection_dim": 512,
        },
    },
}
"""Name of a model -> its shapes, for models whose config.json may be out of reach; from their public model cards."""


def shapes_of(config: TaskConfig, kind: Any, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """Like `tasks.pretrained_model`, on the meta device: the shapes of `config.model` come from its config.json.

    Args:
        config: names the model, and how it is to be loaded.
        kind: the transformers class.
        options: of the model's configuration.

    Returns:
        The model in eval mode, and the names of the new parameters: those outside the pretrained body, such as a
        classification head.

    Raises:
        UserError: no model is named, or its config.json is out of reach.
    """
    options = {k: v for k, v in options.items() if k != "ignore_mismatched_sizes"}
    with torch.device("meta"):
        model = kind.from_config(_architecture(config, options), dtype=getattr(torch, config.dtype))
    if config.quantization == "4bit":
        _quantize(model)
    if config.gradient_checkpointing:
        tasks.checkpoint_layers(model)
    body = getattr(model, "base_model_prefix", "")
    inside = body and hasattr(model, body)
    new = [name for name, _ in model.named_parameters() if inside and not name.startswith(f"{body}.")]
    is_headed = kind is AutoModelForSequenceClassification
    return model.eval(), new if is_headed else []


def _architecture(config: TaskConfig, options: dict[str, Any]) -> Any:
    if config.model is None:
        raise UserError("task.model: not set; name a model of the Hugging Face Hub or a local directory.")
    path = Path(config.model).expanduser()
    if not path.is_dir() and looks_local(config.model):
        raise UserError(f"task.model: {path} does not exist.")
    name = str(path) if path.is_dir() else config.model
    built_in = ARCHITECTURES.get(config.model) if not path.is_dir() else None
    try:
        return AutoConfig.from_pretrained(name, local_files_only=built_in is not None, **options)
    except (OSError, ValueError) as error:
        if built_in is not None:
            facts = {k: v for k, v in built_in.items() if k != "model_type"}
            return AutoConfig.for_model(built_in["model_type"], **facts, **options)
        reason = " ".join(str(error).split())[:200]
        if path.is_dir():
            raise UserError(f"task.model: {path} has no config.json that can be read: {reason}") from error
        raise UserError(
            f"task.model: the config.json of {config.model!r} is not in the cache and cannot be fetched. Where there "
            f"is a network, run `hf download {config.model} config.json --local-dir DIR`, bring DIR here and set "
            "task.model to it."
        ) from error


class FourBit(nn.Linear):
    """The shapes of a linear layer in 4 bits. Every use unpacks the weight, and no unpacked weight is kept."""

    BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
    """Bytes of one weight in NF4 with double quantization: 4 bits, a scale of 8 bits for every 64 weights, and one
    of 32 bits for every 256 scales."""

    @property
    def stored_bytes(self) -> dict[str, int]:
        """Name of a parameter -> bytes that it takes, where its shape and dtype do not say so."""
        return {"weight": math.ceil(self.weight.numel() * self.BYTES)}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Unpacked.apply(x, self.weight)
        return y if self.bias is None else y + self.bias


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ torch.empty_like(weight).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ torch.empty_like(weight), None


def _quantize(model: nn.Module) -> None:
    """Replaces linear layers, but not heads, by 4-bit ones that compute in bfloat16, as `tasks` does."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] not in ("lm_head", *HEADS):
            with torch.device("meta"):
                layer = FourBit(module.in_features, module.out_features, module.bias is not None, dtype=torch.bfloat16)
            model.set_submodule(name, layer)

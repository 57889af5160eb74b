"""Which layers of a model does a LoRA configuration adapt? PEFT's own rules, asked without its memory."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from decaf_lora.errors import UserError, nearest

SUPPORTED_OPTIONS = frozenset(
    {
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "modules_to_save",
        "fan_in_fan_out",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        # Descriptive fields, which change no computation.
        "base_model_name_or_path",
        "revision",
        "peft_type",
        "peft_version",
        "task_type",
        "inference_mode",
        "auto_mapping",
        "runtime_config",
        "loftq_config",
        "qalora_group_size",
    }
)


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted layer: its rank, LoRA scaling s, and the shape of its base."""

    rank: int
    scale: float
    d_in: int
    d_out: int


def matched(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, Site], list[str]]:
    """The configuration with its targets resolved, the layers that it adapts, and the modules it trains in full."""
    _refuse_unsupported(config)
    with _disable_current_modes():  # plain tensors also within a dry run
        skeleton, resolved = _peft_skeleton(model, config)
    sites: dict[str, Site] = {}
    modules = []
    for name, module in skeleton.named_modules():
        if isinstance(module, LoraLayer):
            d_in, d_out = int(module.in_features or 0), int(module.out_features or 0)
            site = Site(module.r["default"], module.scaling["default"], d_in, d_out)
            base_layer: Any = module.get_base_layer()
            if "default" not in module.lora_A or base_layer.weight.dim() != 2:
                kind = type(base_layer).__name__
                raise UserError(f"lora.target_modules: {name} is a {kind}; only linear layers can be adapted.")
            if site.rank > min(site.d_in, site.d_out):
                raise UserError(
                    f"lora.r: rank {site.rank} is larger than {name} ({site.d_out} x {site.d_in}); "
                    f"use at most {min(site.d_in, site.d_out)} or leave the layer out of lora.target_modules."
                )
            sites[name] = site
        elif isinstance(module, ModulesToSaveWrapper):
            modules.append(name)
    return resolved, sites, modules


def _refuse_unsupported(config: LoraConfig) -> None:
    default = LoraConfig()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in SUPPORTED_OPTIONS and value != getattr(default, field.name):
            raise UserError(f"lora.{field.name}: this option of LoraConfig is not supported; leave it out.")
    if config.init_lora_weights not in (True, "gaussian"):
        raise UserError(
            f"lora.init_lora_weights: {config.init_lora_weights!r} is not supported; use true or 'gaussian'."
        )


def _peft_skeleton(model: nn.Module, config: LoraConfig) -> tuple[nn.Module, LoraConfig]:
    """PEFT's own model over a copy of `model` on the meta device: its matching without its memory."""

    def without_memory(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    memo: dict[int, Any] = {id(p): nn.Parameter(without_memory(p), requires_grad=False) for p in model.parameters()}
    memo.update({id(b): without_memory(b) for b in model.buffers()})
    skeleton = copy.deepcopy(model, memo)
    resolved = copy.deepcopy(config)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    targets = resolved.target_modules
    try:
        with warnings.catch_warnings():
            # transformers 5.23 deprecates a property that peft 0.21 still reads.
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = get_peft_model(skeleton, resolved, low_cpu_mem_usage=True)
    except ValueError as error:
        wanted = [targets] if isinstance(targets, str) else sorted(targets or [])
        short = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
        close = list(dict.fromkeys(c for w in wanted for c in nearest(w, short, 3))) or short[:8]
        raise UserError(
            f"lora.target_modules: {', '.join(wanted) or 'nothing'} matches no linear layer of "
            f"{type(model).__name__}. Nearest names: {', '.join(close)}. ({str(error).splitlines()[0][:160]})"
        ) from error
    except TypeError as error:
        raise UserError(f"lora: {error}") from error
    inner: Any = peft_model.base_model
    return inner.model, cast(LoraConfig, peft_model.peft_config["default"])

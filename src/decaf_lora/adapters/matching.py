"""Which layers of a model does a LoRA configuration adapt? PEFT's own matching decides, on a model without weights."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from decaf_lora.adapters.fields import check_own
from decaf_lora.adapters.named_layers import linear_layers, meant
from decaf_lora.errors import UserError


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted layer: its rank, LoRA scaling s, and the shape of its base."""

    rank: int
    scale: float
    d_in: int
    d_out: int


def matched(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, Site], list[str]]:
    """What a configuration means for a model.

    Returns:
        The configuration with its targets resolved, the adapted layers by name, and the names of the modules that are
        trained in full.

    Raises:
        UserError: an option that is not supported, a name that matches nothing, a layer that is not linear, or a rank
            larger than a layer.
    """
    check_own(config)
    with _disable_current_modes():  # a dry run's mode would turn the tensors made here into fake ones
        skeleton, resolved = _peft_skeleton(model, meant(model, config))
    layers = {n: m for n, m in skeleton.named_modules() if isinstance(m, LoraLayer)}
    modules = [name for name, m in skeleton.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    sites = {name: _site(name, layer, model) for name, layer in layers.items()}
    return resolved, sites, modules


def _site(name: str, layer: Any, model: nn.Module) -> Site:
    """Rank, scale and sizes of the layer `name`. UserError unless the layer is linear and no smaller than the rank."""
    base_layer = layer.get_base_layer()
    weight = getattr(base_layer, "weight", None)
    if "default" not in layer.lora_A or weight is None or weight.dim() != 2:
        linear = ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in linear_layers(model)))
        raise UserError(
            f"lora.target_modules: {name} is a {type(base_layer).__name__}; only linear layers can be adapted. Name "
            f"them: {linear}."
        )
    site = Site(layer.r["default"], layer.scaling["default"], int(layer.in_features), int(layer.out_features))
    if site.rank > min(site.d_in, site.d_out):
        raise UserError(
            f"lora.r: rank {site.rank} is larger than {name} ({site.d_out} x {site.d_in}); "
            f"use at most {min(site.d_in, site.d_out)} or leave the layer out of lora.target_modules."
        )
    return site


def _peft_skeleton(model: nn.Module, config: LoraConfig) -> tuple[nn.Module, LoraConfig]:
    """PEFT's model over a copy of `model` on the meta device, where no weight takes memory; and its configuration."""

    def without_memory(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    memo: dict[int, Any] = {id(p): nn.Parameter(without_memory(p), requires_grad=False) for p in model.parameters()}
    memo.update({id(b): without_memory(b) for b in model.buffers()})
    skeleton = copy.deepcopy(model, memo)
    resolved = copy.deepcopy(config)
    try:
        with warnings.catch_warnings():
            # transformers 5.23 deprecates a property that peft 0.21 still reads.
            warnings.simplefilter("ignore", FutureWarning)
            peft_model = get_peft_model(skeleton, resolved, low_cpu_mem_usage=True)
    except ValueError as error:
        short = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model)))
        raise UserError(
            f"lora.target_modules: no layer of {type(model).__name__} is left to adapt, once lora.exclude_modules and "
            f"lora.modules_to_save are taken out. Its linear layers: {', '.join(short[:8])}."
            if isinstance(error, NoMatchingPeftModuleError)
            else f"lora: {' '.join(str(error).split())}"
        ) from error
    except TypeError as error:
        raise UserError(f"lora: {error}") from error
    inner: Any = peft_model.base_model
    return inner.model, cast(LoraConfig, peft_model.peft_config["default"])

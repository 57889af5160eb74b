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
    """The configuration with its targets resolved, the layers that it adapts, and the modules it trains in full.

    Raises UserError for options that are not supported, names that match nothing, and layers that are not linear.
    """
    check_own(config)
    with _disable_current_modes():  # plain tensors also within a dry run
        skeleton, resolved = _peft_skeleton(model, meant(model, config))
    layers = {n: m for n, m in skeleton.named_modules() if isinstance(m, LoraLayer)}
    modules = [name for name, m in skeleton.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    _refuse_overlap(layers, modules)
    sites = {name: _site(name, layer, model) for name, layer in layers.items()}
    for name in modules:
        kinds = [p for p in model.get_submodule(name).parameters() if not p.is_floating_point()]
        if kinds or not any(True for _ in model.get_submodule(name).parameters()):
            what = "its weights are quantized" if kinds else "it has no parameters"
            raise UserError(f"lora.modules_to_save: {name} cannot be trained in full, {what}; leave it out.")
    return resolved, sites, modules


def _site(name: str, layer: Any, model: nn.Module) -> Site:
    """What PEFT made of the layer `name`. Raises UserError unless its base is linear and as large as the rank."""
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


def _refuse_overlap(layers: dict[str, Any], modules: list[str]) -> None:
    """Raises UserError where a module is to be trained in full and also adapted, whole or in part."""
    for name in modules:
        inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}.")]
        if inside:
            raise UserError(
                f"lora.modules_to_save: {name} is, or holds, a layer of lora.target_modules, and both would train it; "
                "give the module's longer name, or leave it out of one of them."
            )


def _peft_skeleton(model: nn.Module, config: LoraConfig) -> tuple[nn.Module, LoraConfig]:
    """PEFT's own model over a copy of `model` on the meta device: its matching without its memory."""

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
        wanted = config.target_modules
        names = [wanted] if isinstance(wanted, str) else sorted(wanted or [])
        short = list(dict.fromkeys(name.rpartition(".")[2] for name in linear_layers(model)))
        raise UserError(
            f"lora.target_modules: {', '.join(names) or 'unset'}: no layer of {type(model).__name__} is left to adapt. "
            f"Its linear layers: {', '.join(short[:8])}. ({str(error).splitlines()[0][:160]})"
        ) from error
    except TypeError as error:
        raise UserError(f"lora: {error}") from error
    inner: Any = peft_model.base_model
    return inner.model, cast(LoraConfig, peft_model.peft_config["default"])

"""What of a live PEFT model do agents exchange? Its active adapter's factors, and the modules trained in full."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from decaf_lora.adapters.adapter import Adapter, Factor, as_adapter
from decaf_lora.adapters.fields import check_own
from decaf_lora.adapters.names import Tensors, owner
from decaf_lora.errors import UserError

_SAMPLED = 64
"""Values of every frozen tensor that two base models are compared by."""


class LiveAdapter:
    """The active LoRA adapter of a PEFT model that is being trained, read and written in place.

    Raises:
        UserError: the model is not a PEFT model with one plain LoRA adapter on linear layers, or it trains what is no
            part of the adapter.
    """

    def __init__(self, model: Any) -> None:
        if not isinstance(model, PeftModel):
            raise UserError(
                f"model: {type(model).__name__} is not a PEFT model; wrap it with peft.get_peft_model(model, "
                "LoraConfig(...)), or give SFTTrainer a peft_config."
            )
        active = model.active_adapters
        if len(active) != 1:
            raise UserError(f"model: {len(active)} adapters are active at once; activate one with set_adapter.")
        self.name = active[0]
        config = model.peft_config[self.name]
        if type(config) is not LoraConfig:
            raise UserError(
                f"model: the adapter {self.name!r} is a {type(config).__name__}; only LoraConfig is supported."
            )
        check_own(config)
        self.parameters: dict[str, nn.Parameter] = {}
        """`A/layer` (r, d_in), `B/layer` (d_out, r) and `extras/name`, as in `Adapter.tensors()` without agents."""
        self.scales: dict[str, float] = {}
        """layer -> the LoRA scaling."""
        root: nn.Module = cast(Any, model.base_model).model
        factors: dict[str, dict[str, nn.Parameter]] = {"A": {}, "B": {}, "extras": {}}
        for name, module in root.named_modules():
            if isinstance(module, LoraLayer) and self.name in module.r:
                self._add_layer(name, cast(Any, module), factors)
            elif isinstance(module, ModulesToSaveWrapper) and self.name in module.modules_to_save:
                own = module.modules_to_save[self.name]
                factors["extras"] |= {f"{name}.{key}": p for key, p in own.named_parameters()}
        for group, found in factors.items():
            self.parameters |= {f"{group}/{name}": parameter for name, parameter in found.items()}
        if not self.scales:
            raise UserError(f"model: the adapter {self.name!r} adapts no layer; see lora.target_modules.")
        self.trainable = {key: parameter.requires_grad for key, parameter in self.parameters.items()}
        self._check_nothing_else(model)
        self.base = _fingerprint(root, {id(p) for p in self.parameters.values()})
        """What tells two base models apart."""

    def _add_layer(self, name: str, layer: Any, factors: dict[str, dict[str, nn.Parameter]]) -> None:
        weight = getattr(layer.get_base_layer(), "weight", None)
        if self.name not in layer.lora_A or weight is None or layer.lora_A[self.name].weight.dim() != 2:
            kind = type(layer.get_base_layer()).__name__
            raise UserError(f"lora.target_modules: {name} is a {kind}; only linear layers can be exchanged.")
        factors["A"][name] = layer.lora_A[self.name].weight
        factors["B"][name] = layer.lora_B[self.name].weight
        self.scales[name] = float(layer.scaling[self.name])

    def _check_nothing_else(self, model: nn.Module) -> None:
        known = {id(p) for p in self.parameters.values()}
        others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        if others:
            raise UserError(
                f"model: {others[0]} is trained but no part of the adapter, so it would not be exchanged; freeze it, "
                "or name its module in lora.modules_to_save."
            )

    @property
    def device(self) -> torch.device:
        """Where the adapter lies."""
        return next(iter(self.parameters.values())).device

    def read(self) -> Adapter:
        """A copy, with one agent on the leading axis, in float32 at least."""
        tensors = {key: _wide(p.detach()).clone()[None] for key, p in self.parameters.items()}
        scales = {f"scale/{k}": torch.full((1,), s, device=self.device) for k, s in self.scales.items()}
        return as_adapter(tensors | scales)

    @torch.no_grad()
    def write(self, adapter: Adapter) -> None:
        """Puts the one agent of `adapter` into the model."""
        for key, tensor in adapter.tensors().items():
            self.parameters[key].copy_(tensor[0])

    def allow(self, factors: frozenset[Factor]) -> None:
        """Lets the local steps change `factors` alone, of those that the script trains."""
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(self.trainable[key] and owner(key) in factors)
            if not parameter.requires_grad:
                parameter.grad = None  # an optimizer passes over what has no gradient

    def release(self) -> None:
        """Lets the script train what it trained before."""
        for key, parameter in self.parameters.items():
            parameter.requires_grad_(self.trainable[key])

    def gradients(self, factors: frozenset[Factor]) -> Tensors:
        """name -> (1, ...) the gradients of `factors`, 0 where there is none."""
        chosen = {key: p for key, p in self.parameters.items() if owner(key) in factors}
        return {k: _wide(torch.zeros_like(p) if p.grad is None else p.grad).clone()[None] for k, p in chosen.items()}

    def set_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Puts `gradients` (1, ...) where the optimizer reads them."""
        for key, tensor in gradients.items():
            parameter = self.parameters[key]
            if parameter.grad is not None:
                parameter.grad.copy_(tensor[0])
            elif parameter.requires_grad and bool(tensor.any()):
                parameter.grad = tensor[0].to(parameter.dtype)

    def digest(self) -> str:
        """Hash of the adapter's values."""
        made = hashlib.sha256()
        for key, parameter in self.parameters.items():
            made.update(key.encode())
            made.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return made.hexdigest()

    def facts(self) -> dict[str, str]:
        """What must be equal in all agents' models, by the field that says it."""
        shapes = {key: tuple(p.shape) for key, p in self.parameters.items()}
        layers = [key.partition("/")[2] for key in shapes if owner(key) == "A"]
        sizes = sorted((k, shapes[f"B/{k}"][0], shapes[f"A/{k}"][1]) for k in layers)
        extras = sorted((k, shape) for k, shape in shapes.items() if owner(k) == "extras")
        ranks = sorted((k, shapes[f"A/{k}"][0]) for k in layers)
        kinds = sorted({k.rpartition(".")[2] for k in layers})
        return {
            "lora.target_modules": f"{len(layers)} layers ({', '.join(kinds)}; {_short(sizes)})",
            "lora.r": f"{', '.join(map(str, sorted({r for _, r in ranks})))} ({_short(ranks)})",
            "lora.lora_alpha": f"scaling {', '.join(f'{s:g}' for s in sorted(set(self.scales.values())))}"
            f" ({_short(sorted(self.scales.items()))})",
            "lora.modules_to_save": f"{len(extras)} tensors ({_short(extras)})",
            "base model": self.base,
        }


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _short(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]


def _fingerprint(root: nn.Module, without: set[int]) -> str:
    """Hash over shapes and some values of what is frozen: reading all of a large model would take long."""
    made = hashlib.sha256()
    for name, tensor in frozen(root, without):
        made.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, max(0, len(flat) - 1), min(_SAMPLED, len(flat)), dtype=torch.float64).long()
        made.update(repr(flat[places.to(flat.device)].double().cpu().tolist()).encode())
    return made.hexdigest()[:16]


def frozen(root: nn.Module, without: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The base's parameters; not what other adapters hold, nor the first state of modules trained in full."""
    skipped = ("lora_", "modules_to_save.", "original_module.")
    for name, parameter in root.named_parameters():
        if id(parameter) not in without and not any(part in name for part in skipped):
            yield name.replace("base_layer.", ""), parameter

"""How does LoRA sit in a model, for one agent or many at once?

`attach` wraps the layers that PEFT's own rules match. A wrapped layer holds only the frozen base layer; the
factors of the agents of a pass are bound to it from outside, so the adapters stay plain tensors and the base
is in memory once. With k agents bound, the leading axis of every input is k b, agent after agent, and

    y = base(x) + s_i B_i A_i x       for the b examples of agent i,

one product with the base for all, one batched product for the adapters. Adapters are written and read as
PEFT directories.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from decaf_lora.algorithms.base import Adapter, Tensors
from decaf_lora.errors import UserError, nearest
from decaf_lora.randomness import torch_generator

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

DropoutMasks = Callable[[str, tuple[int, ...], torch.device], Tensor]
"""(layer, (k, b, d_in), device) -> (k, b, d_in) mask, already divided by the keep probability."""


class StackedLora(nn.Module):
    """A frozen linear layer plus the LoRA updates of the agents bound to it.

    `base` maps (..., d_in) to (..., d_out): `nn.Linear`, GPT-2's `Conv1D`, or a quantized linear layer.
    """

    def __init__(self, name: str, base: nn.Module) -> None:
        super().__init__()
        self.name, self.base = name, base
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.scale: Tensor | None = None
        self.masks: DropoutMasks | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (k b, ..., d_in) -> (k b, ..., d_out), k = the number of agents bound; the plain base if none."""
        y = self.base(x)
        if self.A is None or self.B is None or self.scale is None:
            return y
        k, _, d_in = self.A.shape
        if x.shape[0] % k:
            raise RuntimeError(
                f"{self.name}: the input's leading axis {x.shape[0]} does not hold {k} agents' examples; "
                "layers whose leading axis is not the batch cannot be adapted for many agents at once"
            )
        rows = x.reshape(k, -1, d_in).to(self.A.dtype)
        if self.masks is not None:
            rows = rows * self.masks(self.name, tuple(rows.shape), rows.device).to(rows.dtype)
        update = rows @ self.A.mT @ (self.B * self.scale[:, None, None]).mT
        return y + update.view(y.shape).to(y.dtype)


class StackedExtra(nn.Module):
    """A fully trained module (PEFT's `modules_to_save`) with one copy of its parameters per bound agent."""

    def __init__(self, name: str, base: nn.Module) -> None:
        super().__init__()
        self.name, self.base = name, base
        self.parameters_of_agents: Tensors | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the base module, with every tensor's leading axis k b split over the k bound agents."""
        if self.parameters_of_agents is None:
            return self.base(*args, **kwargs)
        k = next(iter(self.parameters_of_agents.values())).shape[0]
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        split = [isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in flat]
        leaves = [
            leaf.reshape(k, -1, *leaf.shape[1:]) if by_agent else leaf
            for leaf, by_agent in zip(flat, split, strict=True)
        ]

        def one_agent(parameters: Tensors, tensors: list[Tensor]) -> Any:
            it = iter(tensors)
            own = [next(it) if by_agent else leaf for leaf, by_agent in zip(leaves, split, strict=True)]
            a, kw = torch.utils._pytree.tree_unflatten(own, spec)
            return functional_call(self.base, parameters, a, kw)

        tensors = [leaf for leaf, by_agent in zip(leaves, split, strict=True) if by_agent]
        out = torch.func.vmap(one_agent)(self.parameters_of_agents, tensors)
        return torch.utils._pytree.tree_map(lambda t: t.flatten(0, 1), out)


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted layer: its rank, LoRA scaling s, and the shape of its base."""

    rank: int
    scale: float
    d_in: int
    d_out: int


class Attached:
    """A model with adapter sites. `bind` puts agents' factors in place for the time of a `with` block."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        sites: dict[str, Site],
        extras: dict[str, Tensor],
        lora_layers: dict[str, StackedLora],
        extra_layers: dict[str, StackedExtra],
    ) -> None:
        self.model, self.config, self.sites, self.extras = model, config, sites, extras
        self._lora_layers, self._extra_layers = lora_layers, extra_layers

    def init(self, agents: Sequence[int], seed: int, common_start: bool = True) -> Adapter:
        """Fresh adapters for these agents: A as PEFT draws it, B = 0, extras equal to the base's.

        With `common_start` all agents draw the same A (the same numbers whoever asks), else each its own.
        """
        a: Tensors = {}
        b: Tensors = {}
        scale: Tensors = {}
        device, gaussian = self.device, self.config.init_lora_weights == "gaussian"
        n = len(agents)
        for name, site in self.sites.items():
            rows = []
            for agent in agents:
                generator = torch_generator(seed, "init", name, "all" if common_start else agent)
                row = torch.empty(site.rank, site.d_in)
                if gaussian:
                    row.normal_(std=1 / self.config.r, generator=generator)
                else:  # kaiming_uniform with a = sqrt(5), PEFT's default
                    bound = 1 / math.sqrt(site.d_in)
                    row.uniform_(-bound, bound, generator=generator)
                rows.append(row)
            a[name] = torch.stack(rows).to(device)
            b[name] = torch.zeros(n, site.d_out, site.rank, device=device)
            scale[name] = torch.full((n,), site.scale, device=device)
        extras = {name: t.detach().float().repeat(n, *[1] * t.dim()) for name, t in self.extras.items()}
        return Adapter(a, b, scale, extras)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def bind(self, adapter: Adapter, masks: DropoutMasks | None = None) -> Iterator[nn.Module]:
        """The model with these k agents' adapters in place; inputs carry k b examples, agent after agent."""
        try:
            for name, layer in self._lora_layers.items():
                layer.A, layer.B, layer.scale = adapter.A[name], adapter.B[name], adapter.scale[name]
                layer.masks = masks
            for name, extra in self._extra_layers.items():
                prefix = name + "."
                extra.parameters_of_agents = {
                    k.removeprefix(prefix): t for k, t in adapter.extras.items() if k.startswith(prefix)
                }
            yield self.model
        finally:
            for layer in self._lora_layers.values():
                layer.A = layer.B = layer.scale = layer.masks = None
            for extra in self._extra_layers.values():
                extra.parameters_of_agents = None

    def detach(self) -> nn.Module:
        """Takes the sites out again and returns the plain base model."""
        for name, layer in {**self._lora_layers, **self._extra_layers}.items():
            self.model.set_submodule(name, layer.base)  # type: ignore[arg-type]
        return self.model


def attach(model: nn.Module, config: LoraConfig) -> Attached:
    """Wraps the layers of `model` (in place) that `config` matches, exactly as PEFT would.

    All base parameters are frozen and the model is put in eval mode: base dropout is off, LoRA dropout is
    ours. Raises UserError for options that are not supported, for targets that match nothing (with the
    nearest module names), for layers that are not linear, and for a rank larger than a layer.
    """
    _refuse_unsupported(config)
    skeleton, resolved = _peft_skeleton(model, config)
    sites: dict[str, Site] = {}
    lora_layers: dict[str, StackedLora] = {}
    extra_layers: dict[str, StackedExtra] = {}
    extras: Tensors = {}
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
            base = model.get_submodule(name)
            extra_layers[name] = StackedExtra(name, base)
            extras.update({f"{name}.{key}": p.detach() for key, p in base.named_parameters()})
    model.requires_grad_(False).eval()
    for name in sites:
        base = model.get_submodule(name)
        lora_layers[name] = StackedLora(name, base)
        model.set_submodule(name, lora_layers[name])
    for name, extra in extra_layers.items():
        model.set_submodule(name, extra)
    return Attached(model, resolved, sites, extras, lora_layers, extra_layers)


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
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    memo.update({id(b): torch.empty_like(b, device="meta") for b in model.buffers()})
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


# PEFT directories


def save_peft(adapter: Adapter, agent: int, config: LoraConfig, directory: Path, base_model: str | None = None) -> None:
    """Writes the adapter of one agent (position on the leading axis) as a PEFT directory.

    `PeftModel.from_pretrained(base, directory)` then gives the logits of this agent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in adapter.layers:
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A[name][agent]
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.B[name][agent]
    for name, tensor in adapter.extras.items():
        tensors[f"base_model.model.{name}"] = tensor[agent]
    tensors = {k: t.detach().to("cpu").contiguous().clone() for k, t in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = copy.deepcopy(config)
    saved.inference_mode = True
    if base_model is not None:
        saved.base_model_name_or_path = base_model
    saved.save_pretrained(str(directory))


def load_peft(attached: Attached, directories: Sequence[Path]) -> Adapter:
    """The adapters of several agents, one PEFT directory each, as one stacked adapter for `attached`.

    Raises UserError that lists the tensors that are missing, unexpected or of another shape.
    """
    start = attached.init(range(len(directories)), seed=0)
    a, b, extras = dict(start.A), dict(start.B), dict(start.extras)
    for agent, directory in enumerate(directories):
        path = Path(directory) / "adapter_model.safetensors"
        if not path.exists():
            raise UserError(f"adapter: {path} does not exist; give a directory written by PEFT's save_pretrained.")
        loaded = {k.removeprefix("base_model.model."): t for k, t in load_file(path).items()}
        expected = {f"{k}.lora_A.weight": (a, k) for k in a} | {f"{k}.lora_B.weight": (b, k) for k in b}
        expected |= {k: (extras, k) for k in extras}
        wrong = sorted(set(expected) ^ set(loaded))
        wrong += [k for k in expected if k in loaded and loaded[k].shape != expected[k][0][expected[k][1]].shape[1:]]
        if wrong:
            raise UserError(
                f"adapter: {directory} does not fit the model and LoRA config; first differing tensors: "
                f"{', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}."
            )
        saved = json.loads((Path(directory) / "adapter_config.json").read_text())
        for field in ("lora_alpha", "use_rslora", "alpha_pattern", "fan_in_fan_out"):
            ours = getattr(attached.config, field)
            if saved.get(field, ours) != ours and not (field == "fan_in_fan_out"):
                raise UserError(
                    f"adapter: {directory} has {field}={saved[field]!r}, this run {ours!r}; make them equal."
                )
        for key, (group, name) in expected.items():
            group[name][agent] = loaded[key].to(group[name])
    return Adapter(a, b, start.scale, extras)

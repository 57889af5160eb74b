"""How does LoRA sit in a model, for one agent or many at once?

`attach` wraps the layers that PEFT's own rules match. A wrapped layer holds only the frozen base layer. `bind` lends
it the factors of the agents of a pass. So adapters stay plain tensors, and the base is in memory once. With k agents
bound, the leading axis of every input is k b, agent after agent, and

    y = base(x) + s_i B_i A_i x       for the b examples of agent i:

one product with the base for all agents, and one batched product for the adapters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.errors import UserError
from decaf_lora.randomness import torch_generator

if TYPE_CHECKING:
    from peft import LoraConfig

    from decaf_lora.adapters.matching import Site

DropoutMasks = Callable[[str, tuple[int, ...], torch.device], Tensor]
"""(layer, (k, b, d_in), device) -> (k, b, d_in) mask, already divided by the keep probability."""


IN_OWN_DTYPE = "_decaf_in_own_dtype"
"""Attribute that marks a fully trained module, a head for instance, whose results stay in the dtype of the agents'
copies of it, instead of the base's dtype."""


class LeadingAxisError(RuntimeError):
    """A layer cannot tell the agents of a pass apart, so they must go through the model one by one."""


class StackedLora(nn.Module):
    """A frozen linear layer plus the LoRA updates of the agents bound to it.

    Attributes that the wrapper lacks are read from the base, as in PEFT, since models look at the `weight` or the
    sizes of their layers.

    Args:
        name: of the layer in the model.
        base: maps (..., d_in) to (..., d_out): `nn.Linear`, GPT-2's `Conv1D`, or a quantized linear layer.
    """

    def __init__(self, name: str, base: nn.Module) -> None:
        super().__init__()
        self.name, self.base = name, base
        self.A: Tensor | None = None
        self.B: Tensor | None = None
        self.scale: Tensor | None = None
        self.masks: DropoutMasks | None = None
        self.on_read: Callable[[str, str], None] | None = None
        """Called with (name of the layer, name of the attribute) whenever an attribute of the base is read."""

    def __getattr__(self, name: str) -> Any:
        found, base = _of_base(self, name)
        if base is not None and (on_read := self.__dict__.get("on_read")) is not None:
            on_read(self.name, name)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x (k b, ..., d_in) -> (k b, ..., d_out), with k agents bound; the plain base layer if none is.

        Raises:
            LeadingAxisError: the leading axis of x is no multiple of k.
        """
        y = self.base(x)
        if self.A is None or self.B is None or self.scale is None:
            return y
        k, _, d_in = self.A.shape
        if x.shape[0] % k:
            raise LeadingAxisError(f"{self.name}: the leading axis {x.shape[0]} does not hold {k} agents' examples")
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
        self.vectorized = True
        """Whether one `torch.func.vmap` call computes all agents; off for modules that vmap cannot run."""

    def __getattr__(self, name: str) -> Any:
        found, base = _of_base(self, name)
        own = self.__dict__.get("parameters_of_agents")
        if base is None or own is None:
            return found
        if isinstance(found, nn.Module):
            raise UserError(
                f"lora.modules_to_save: the model calls {self.name}.{name} without {self.name} around it; name the "
                "inner modules instead."
            )
        if name in own:  # the model reads the parameter itself, for instance an embedding as output layer
            if len(own[name]) > 1:
                raise LeadingAxisError(f"{self.name}: its {name} is used directly")
            return own[name][0]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Like the base module; each of the k bound agents computes its own b rows of every tensor (k b, ...).

        Raises:
            LeadingAxisError: the leading axis of a tensor is no multiple of k.
        """
        if self.parameters_of_agents is None:
            return self.base(*args, **kwargs)
        k = next(iter(self.parameters_of_agents.values())).shape[0]
        dtype = next(iter(self.parameters_of_agents.values())).dtype
        args, kwargs = _cast((args, kwargs), dtype)
        flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
        split = [isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in flat]
        for leaf, by_agent in zip(flat, split, strict=True):
            if by_agent and leaf.shape[0] % k:
                raise LeadingAxisError(f"{self.name}: the leading axis {leaf.shape[0]} does not hold {k} agents")
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
        if self.vectorized:
            stacked = torch.func.vmap(one_agent)(self.parameters_of_agents, tensors)
            out = torch.utils._pytree.tree_map(lambda t: t.flatten(0, 1), stacked)
        else:
            each = [
                one_agent({name: t[i] for name, t in self.parameters_of_agents.items()}, [t[i] for t in tensors])
                for i in range(k)
            ]
            out = torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *each)
        return out if getattr(self.base, IN_OWN_DTYPE, False) else _cast(out, next(self.base.parameters()).dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """`values` with their floating-point tensors in `dtype`: agents' copies are float32 also over a bfloat16 base."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return torch.utils._pytree.tree_map(cast, values)


def _of_base(module: nn.Module, name: str) -> tuple[Any, nn.Module | None]:
    """The attribute `name` of a wrapper, and the base module that it comes from; None if it is the wrapper's own."""
    for parts in ("_parameters", "_buffers", "_modules"):
        own = module.__dict__.get(parts, {})
        if name in own:
            return own[name], None
    base = module.__dict__.get("_modules", {}).get("base")
    if base is None:
        raise AttributeError(f"{type(module).__name__!r} object has no attribute {name!r}")
    return getattr(base, name), base


class Attached:
    """A model whose adapted layers are wrapped; what `attach` returns.

    `bind` puts agents' factors in place for the time of a `with` block.
    """

    def __init__(
        self,
        model: nn.Module,
        configs: Sequence[LoraConfig],
        sites: Sequence[dict[str, Site]],
        extras: dict[str, Tensor],
        lora_layers: dict[str, StackedLora],
        extra_layers: dict[str, StackedExtra],
    ) -> None:
        self.model, self.extras = model, extras
        self._configs, self._sites = list(configs), list(sites)
        self._lora_layers, self._extra_layers = lora_layers, extra_layers
        self.config = self._configs[0]
        self.sites = {
            name: max((own[name] for own in self._sites), key=lambda site: site.rank) for name in self._sites[0]
        }
        """The adapted layers, with the largest rank of any agent."""
        self.uniform = all(own == self.sites for own in self._sites)
        """Whether all agents have one rank and scale."""

    def config_of(self, agent: int) -> LoraConfig:
        """The configuration of an agent's adapter, as PEFT reads it."""
        return self._configs[agent if len(self._configs) > 1 else 0]

    def sites_of(self, agent: int) -> dict[str, Site]:
        """The adapted layers with an agent's own ranks and scales."""
        return self._sites[agent if len(self._sites) > 1 else 0]

    @property
    def modules(self) -> list[str]:
        """Names of the modules that are trained in full."""
        return list(self._extra_layers)

    @property
    def layers(self) -> dict[str, StackedLora]:
        """The adapted layers in the model, by name."""
        return self._lora_layers

    @property
    def extra_layers(self) -> dict[str, StackedExtra]:
        """The modules in the model that are trained in full, by name."""
        return self._extra_layers

    def init(self, agents: Sequence[int], seed: int, common_start: bool = True) -> Adapter:
        """Fresh adapters: A as PEFT draws it, B = 0, extras equal to the base's.

        The numbers depend on the arguments only, not on which process asks.

        Args:
            agents: numbers of the n agents.
            seed: of the run.
            common_start: whether all agents share one A (where ranks differ, its first rows), or each draws its own.
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
                    row.normal_(std=1 / self.config_of(agent).r, generator=generator)
                else:  # kaiming_uniform with a = sqrt(5), PEFT's default
                    bound = 1 / math.sqrt(site.d_in)
                    row.uniform_(-bound, bound, generator=generator)
                rows.append(row)
            a[name] = torch.stack(rows).to(device)
            b[name] = torch.zeros(n, site.d_out, site.rank, device=device)
            scale[name] = torch.tensor([self.sites_of(agent)[name].scale for agent in agents], device=device)
        extras = {name: t.detach().float().repeat(n, *[1] * t.dim()) for name, t in self.extras.items()}
        ranks: Tensors = {}
        if not self.uniform:
            ranks = {k: torch.tensor([self.sites_of(agent)[k].rank for agent in agents]) for k in self.sites}
        adapter = Adapter(a, b, scale, extras, ranks)
        return adapter.with_tensors(adapter.trim(adapter.tensors()))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @contextlib.contextmanager
    def bind(self, adapter: Adapter, masks: DropoutMasks | None = None) -> Iterator[nn.Module]:
        """Puts the adapters of k agents in place; yields the model.

        Args:
            adapter: of the k agents; inputs of the model then hold k b examples, agent after agent.
            masks: draws the masks of LoRA dropout; None: no dropout.
        """
        adapter = adapter.folded()
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
        """Unwraps all layers again and returns the plain base model."""
        for name, layer in {**self._lora_layers, **self._extra_layers}.items():
            self.model.set_submodule(name, cast(nn.Module, layer.base))
        return self.model


def attach(model: nn.Module, config: LoraConfig | Sequence[LoraConfig]) -> Attached:
    """Wraps, in place, the layers of a model that PEFT would adapt.

    All base parameters are frozen. The model is put in eval mode, so the base's own dropout is off; LoRA dropout comes
    from `Attached.bind`.

    Args:
        model: the base model.
        config: one for all agents, or one for each. Those of different agents may differ in rank and alpha, and must
            match the same layers.

    Raises:
        UserError: an option that is not supported, a target that matches nothing (the message gives the nearest module
            names), a layer that is not linear, a rank larger than a layer, configurations that match different layers,
            or a model that another run has wrapped.
    """
    from decaf_lora.adapters.matching import matched

    if any(isinstance(module, StackedLora | StackedExtra) for module in model.modules()):
        raise UserError(f"task: another run holds this {type(model).__name__}; call close() on it first.")
    configs = list(config) if isinstance(config, Sequence) else [config]
    keys = [repr(sorted(one.to_dict().items(), key=lambda item: item[0])) for one in configs]
    # Matching takes long, so equal configurations are matched once.
    found = {key: matched(model, one) for key, one in dict(zip(keys, configs, strict=True)).items()}
    resolved, all_sites, all_modules = zip(*(found[key] for key in keys), strict=True)
    modules = all_modules[0]
    for agent, sites in enumerate(all_sites):
        if sites.keys() != all_sites[0].keys() or all_modules[agent] != modules:
            raise UserError(
                f"lora: the configurations of agents 0 and {agent} match different layers; they may differ in rank "
                "and alpha only."
            )
    extras: Tensors = {}
    model.requires_grad_(False).eval()
    lora_layers, extra_layers = {}, {}
    for name in all_sites[0]:
        lora_layers[name] = StackedLora(name, model.get_submodule(name))
    for name in modules:
        base = model.get_submodule(name)
        extra_layers[name] = StackedExtra(name, base)
        extras.update({f"{name}.{key}": p.detach() for key, p in base.named_parameters()})
    for name, layer in {**lora_layers, **extra_layers}.items():
        model.set_submodule(name, layer)
    return Attached(model, resolved, all_sites, extras, lora_layers, extra_layers)

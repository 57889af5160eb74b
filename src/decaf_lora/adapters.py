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
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import _disable_current_modes

from decaf_lora import lowrank
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

    def init(self, agents: Sequence[int], seed: int, common_start: bool = True) -> Adapter:
        """Fresh adapters for these agents: A as PEFT draws it, B = 0, extras equal to the base's.

        With `common_start` all agents draw the same A (the same numbers whoever asks), else each its own; of unequal
        ranks an agent has the first rows of it.
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


def attach(model: nn.Module, config: LoraConfig | Sequence[LoraConfig]) -> Attached:
    """Wraps the layers of `model` (in place) that `config` matches, exactly as PEFT would.

    A list is one configuration an agent; they may differ in rank and alpha, and must match the same layers. All base
    parameters are frozen and the model is put in eval mode: base dropout is off, LoRA dropout is ours. Raises
    UserError for options that are not supported, for targets that match nothing (with the nearest module names),
    for layers that are not linear, and for a rank larger than a layer.
    """
    configs = [config] if isinstance(config, LoraConfig) else list(config)
    keys = [repr(sorted(one.to_dict().items(), key=lambda item: item[0])) for one in configs]
    # Equal configurations are matched once.
    found = {key: _matched(model, one) for key, one in dict(zip(keys, configs, strict=True)).items()}
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


def _matched(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, dict[str, Site], list[str]]:
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


# PEFT directories


def save_peft(adapter: Adapter, agent: int, config: LoraConfig, directory: Path, base_model: str | None = None) -> None:
    """Writes the adapter of one agent (position on the leading axis) as a PEFT directory; `config` is the agent's.

    `PeftModel.from_pretrained(base, directory)` then gives the logits of this agent.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in adapter.layers:
        rank = int(adapter.rank_of(name)[agent])
        tensors[f"base_model.model.{name}.lora_A.weight"] = adapter.A[name][agent, :rank]
        tensors[f"base_model.model.{name}.lora_B.weight"] = adapter.B[name][agent, :, :rank]
    for name, tensor in adapter.extras.items():
        tensors[f"base_model.model.{name}"] = tensor[agent]
    tensors = {k: t.detach().to("cpu").contiguous().clone() for k, t in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = copy.deepcopy(config)
    saved.inference_mode = True
    if base_model is not None:
        saved.base_model_name_or_path = base_model
    saved.save_pretrained(str(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """What a PEFT directory says of its adapter.

    Raises UserError if it is none, or not of LoRA.
    """
    path = Path(directory) / "adapter_config.json"
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"init_adapters: {path} cannot be read ({error}); give a directory written by PEFT's save_pretrained."
        ) from error
    if saved.get("peft_type") != "LORA":
        raise UserError(f"init_adapters: {directory} holds an adapter of type {saved.get('peft_type')}, not LORA.")
    return dict(saved)


def load_peft(attached: Attached, start: Adapter, directories: Sequence[Path | None], agents: Sequence[int]) -> Adapter:
    """`start`, the fresh adapters of `agents`, with what their PEFT directories hold; None leaves an agent fresh.

    An adapter of the agent's own rank is taken as it is. One of a smaller rank is filled up: B's new columns are 0,
    A's new rows fresh. One of a larger rank is cut by a truncated SVD, with a warning that says what is lost.
    Scales are accounted for: s B A stays.

    Raises UserError that lists the tensors that are missing, unexpected or of another shape.
    """
    adapter = start.with_tensors({k: t.clone() for k, t in start.tensors().items()})
    lost = 0.0
    cut: list[str] = []
    for index, (directory, agent) in enumerate(zip(directories, agents, strict=True)):
        if directory is None:
            continue
        loaded, scales = _read_peft(attached, Path(directory))
        for name, site in attached.sites_of(agent).items():
            a, b = loaded[f"{name}.lora_A.weight"].float(), loaded[f"{name}.lora_B.weight"].float()
            ratio = scales[name] / site.scale
            if len(a) > site.rank:
                out = lowrank.mix_truncate(a[None], b[None], torch.tensor([ratio]), site.rank)
                whole = lowrank.product_norm(a, b) * ratio
                lost = max(lost, float(out.tail / whole.clamp_min(1e-30)))
                cut.append(str(directory))
                a, b = out.A, out.B
            elif ratio != 1:
                b = b * ratio
            adapter.A[name][index, : len(a)] = a.to(adapter.A[name])
            adapter.B[name][index, :, : len(a)] = b.to(adapter.B[name])
        for name, tensor in adapter.extras.items():
            tensor[index] = loaded[name].to(tensor)
    if cut:
        warnings.warn(
            f"init_adapters: {len(set(cut))} adapters were cut to their agents' smaller ranks (first: {cut[0]}); "
            f"at most {lost:.1%} of a layer's norm is lost.",
            stacklevel=2,
        )
    return adapter


def _read_peft(attached: Attached, directory: Path) -> tuple[Tensors, dict[str, float]]:
    """The tensors of a PEFT directory, by name without prefix, checked against the model; scales by layer."""
    path = directory / "adapter_model.safetensors"
    saved = read_config(directory)
    if not path.exists():
        raise UserError(f"init_adapters: {path} does not exist; give a directory written by PEFT's save_pretrained.")
    loaded = {k.removeprefix("base_model.model."): t for k, t in load_file(path).items()}
    rank, alpha = (dict.fromkeys(attached.sites, saved[key]) for key in ("r", "lora_alpha"))
    for name in attached.sites:
        for values, key in ((rank, "rank_pattern"), (alpha, "alpha_pattern")):
            patterns = saved.get(key) or {}
            values[name] = patterns.get(get_pattern_key(list(patterns), name), values[name])
    shapes: dict[str, tuple[int, ...]] = {
        f"{k}.lora_A.weight": (rank[k], site.d_in) for k, site in attached.sites.items()
    }
    shapes |= {f"{k}.lora_B.weight": (site.d_out, rank[k]) for k, site in attached.sites.items()}
    shapes |= {k: tuple(t.shape) for k, t in attached.extras.items()}
    wrong = sorted(set(shapes) ^ set(loaded))
    wrong += [k for k in shapes if k in loaded and tuple(loaded[k].shape) != shapes[k]]
    if wrong:
        raise UserError(
            f"init_adapters: {directory} does not fit the model and LoRA config; {len(wrong)} tensors differ (missing, "
            f"unexpected or of another shape): {', '.join(wrong[:4])}{' ...' if len(wrong) > 4 else ''}."
        )
    root = math.sqrt if saved.get("use_rslora") else float
    return loaded, {k: alpha[k] / root(rank[k]) for k in attached.sites}

"""What is an adapter? The value that algorithms, trainers and files share: the factors of n agents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import torch
from torch import Tensor

from decaf_lora.adapters.names import Tensors, parted

Factor = Literal["A", "B", "core", "extras"]
ALL_FACTORS: frozenset[Factor] = frozenset({"A", "B", "core", "extras"})


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapters of n agents: per adapted layer a pair of factors, plus fully trained tensors.

    A: layer -> (n, r, d_in); B: layer -> (n, d_out, r); scale: layer -> (n,), the LoRA scaling s in
    W0 + s B A; extras: parameter name -> (n, ...), for instance a classifier head.

    ranks: layer -> (n,) int64, each agent's own rank. Empty where all agents have rank r and one scale. Where agents
    differ, r is the largest rank, and the rows of A and columns of B beyond an agent's own rank are 0. Training keeps
    them 0: the gradient of such a row of A is a product with the zero column of B, and the reverse.

    core: layer -> (n, r, r), a trained matrix R between the factors, W0 + s B R A. Empty for plain LoRA.
    """

    A: Tensors
    B: Tensors
    scale: Tensors
    extras: Tensors
    ranks: Tensors = field(default_factory=dict)
    core: Tensors = field(default_factory=dict)

    @property
    def num_agents(self) -> int:
        """n, the number of agents on the leading axis."""
        return next(iter((self.A or self.extras).values())).shape[0]

    @property
    def layers(self) -> list[str]:
        """Names of the adapted layers, in the model's order."""
        return list(self.A)

    def tensors(self, factors: frozenset[Factor] = ALL_FACTORS) -> Tensors:
        """The trained tensors by name: `A/layer` (n, r, d_in), `B/layer` (n, d_out, r), `core/layer` (n, r, r) where
        there are cores, `extras/name` (n, ...)."""
        groups: dict[Factor, Tensors] = {"A": self.A, "B": self.B, "core": self.core, "extras": self.extras}
        return {f"{key}/{name}": t for key in groups if key in factors for name, t in groups[key].items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        """This adapter with some tensors replaced; the others, the scales and the ranks stay.

        Args:
            tensors: the new ones, named as in `tensors()`.

        Raises:
            KeyError: the adapter has no tensor of that name.
        """
        groups: dict[str, Tensors] = {name: dict(getattr(self, name)) for name in ("A", "B", "core", "extras")}
        for key, tensor in tensors.items():
            group, name = key.split("/", 1)
            if name not in groups[group]:
                raise KeyError(f"adapter has no tensor {key!r}")
            groups[group][name] = tensor
        return replace(self, **groups)

    def folded(self) -> Adapter:
        """The plain LoRA adapter of the same updates: B R in place of B and R. Itself where there are no cores."""
        if not self.core:
            return self
        return replace(self, B={k: b @ self.core[k] for k, b in self.B.items()}, core={})

    def select(self, agents: Sequence[int] | slice | Tensor) -> Adapter:
        """The adapters of some agents (indices into the leading axis), in that order."""
        index = agents if isinstance(agents, slice) else torch.as_tensor(agents)

        def take(tensors: Tensors) -> Tensors:
            return {k: t[index if isinstance(index, slice) else index.to(t.device)] for k, t in tensors.items()}

        return Adapter(*(take(getattr(self, one.name)) for one in fields(self)))

    def shape_groups(self) -> list[list[str]]:
        """Layers grouped by equal (r, d_in, d_out) and ranks: every group goes through one batched call."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name in self.A:
            own = self.ranks[name].tolist() if self.ranks else []
            groups.setdefault((*self.A[name].shape[1:], self.B[name].shape[1], *own), []).append(name)
        return list(groups.values())

    def rank_of(self, layer: str) -> Tensor:
        """(n,) int64 ranks of the agents in a layer, on the CPU."""
        if self.ranks:
            return self.ranks[layer].cpu()
        return torch.full((self.num_agents,), self.A[layer].shape[1])

    def trim(self, tensors: Tensors) -> Tensors:
        """`tensors` with zeros beyond every agent's own rank; name -> (n, ...), named as in `tensors()`."""
        return {key: self._trim(key, t) for key, t in tensors.items()} if self.ranks else tensors

    def _trim(self, key: str, tensor: Tensor) -> Tensor:
        group, name = key.split("/", 1)
        if group not in ("A", "B"):
            return tensor
        axis = 1 if group == "A" else 2
        kept = torch.arange(tensor.shape[axis], device=tensor.device) < self.ranks[name].to(tensor.device)[:, None]
        return tensor * (kept[:, :, None] if group == "A" else kept[:, None, :])

    def message(self, factors: frozenset[Factor] = ALL_FACTORS) -> Tensors:
        """What to send: `tensors(factors)`, and `scale/layer` (n,) where agents differ in rank or scale."""
        scales = {f"scale/{k}": s for k, s in self.scale.items()} if self.ranks else {}
        return self.tensors(factors) | scales


def concatenate(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that holds the agents of all of `adapters`, in order."""
    first = adapters[0]

    def join(group: str) -> Tensors:
        return {k: torch.cat([getattr(a, group)[k] for a in adapters]) for k in getattr(first, group)}

    return Adapter(*(join(one.name) for one in fields(first)))


def as_adapter(tensors: Tensors) -> Adapter:
    """The adapter whose tensors are named as in `tensors()`, or `scale/layer` and `ranks/layer`."""
    return Adapter(**parted(tensors, dict.fromkeys(one.name for one in fields(Adapter))))

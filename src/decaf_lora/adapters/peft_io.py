"""How does an adapter become a PEFT directory, and a PEFT directory an adapter?"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.saved import PREFIX, Saved, read_adapter
from decaf_lora.adapters.stacked import Attached
from decaf_lora.errors import UserError, listed

if TYPE_CHECKING:
    from peft import LoraConfig


def save_peft(adapter: Adapter, agent: int, config: LoraConfig, directory: Path, base_model: str | None = None) -> None:
    """Writes the adapter of one agent as a PEFT directory.

    `PeftModel.from_pretrained(base, directory)` then gives the logits of this agent.

    Args:
        adapter: of n agents.
        agent: position of the agent on the leading axis.
        config: the agent's own.
        directory: made if it does not exist.
        base_model: name or directory to write into the configuration; None: what `config` says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name in adapter.layers:
        rank = int(adapter.rank_of(name)[agent])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = adapter.A[name][agent, :rank]
        tensors[f"{PREFIX}{name}.lora_B.weight"] = adapter.B[name][agent, :, :rank]
    for name, tensor in adapter.extras.items():
        tensors[f"{PREFIX}{name}"] = tensor[agent]
    tensors = {k: t.detach().to("cpu").contiguous().clone() for k, t in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    saved = copy.deepcopy(config)
    saved.inference_mode = True
    if base_model is not None:
        saved.base_model_name_or_path = base_model
    saved.save_pretrained(str(directory))


def load_peft(attached: Attached, start: Adapter, directories: Sequence[Path | None], agents: Sequence[int]) -> Adapter:
    """Adapters that start from PEFT directories.

    An adapter of the agent's own rank is taken as it is. One of a smaller rank is filled up: B's new columns are 0,
    A's new rows stay fresh. One of a larger rank is cut by a truncated SVD, with a warning that says what is lost.
    Where the saved LoRA scale is another one, B is rescaled, so that the product s B A stays the same.

    Args:
        attached: the adapted layers.
        start: the fresh adapters of `agents`; not changed.
        directories: one for each agent; None leaves that agent fresh.
        agents: numbers of the agents on the leading axis of `start`.

    Raises:
        UserError: a directory cannot be read, or its tensors do not fit the model; lists those that are missing,
            unexpected or of another shape.
    """
    adapter = start.with_tensors({k: t.clone() for k, t in start.tensors().items()})
    lost = 0.0
    cut: list[str] = []
    others: set[str] = set()
    for index, (directory, agent) in enumerate(zip(directories, agents, strict=True)):
        if directory is None:
            continue
        saved = _fitting(attached, Path(directory))
        others.update(_of_another_base(attached, saved))
        loaded = saved.tensors
        for name, site in attached.sites_of(agent).items():
            a, b = loaded[f"{name}.lora_A.weight"].float(), loaded[f"{name}.lora_B.weight"].float()
            ratio = saved.scale(name) / site.scale
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
    if others:
        warnings.warn(f"init_adapters: made for another base model: {', '.join(sorted(others)[:3])}.", stacklevel=2)
    if cut:
        warnings.warn(
            f"init_adapters: {len(set(cut))} adapters were cut to their agents' smaller ranks (first: {cut[0]}); "
            f"at most {lost:.1%} of a layer's norm is lost.",
            stacklevel=2,
        )
    return adapter


def _fitting(attached: Attached, directory: Path) -> Saved:
    """The adapter of a PEFT directory. Raises UserError unless its tensors are those of the model's adapters."""
    saved = read_adapter(directory)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, site in attached.sites.items():
        rank = saved.rank(name)
        shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = (rank, site.d_in), (site.d_out, rank)
    shapes |= {k: tuple(t.shape) for k, t in attached.extras.items()}
    wrong = sorted(set(shapes) ^ set(saved.tensors))
    wrong += [k for k in shapes if k in saved.tensors and tuple(saved.tensors[k].shape) != shapes[k]]
    if wrong:
        raise UserError(
            f"init_adapters: {directory} does not fit the model and LoRA config; {len(wrong)} tensors differ (missing, "
            f"unexpected or of another shape): {listed(wrong, 4)}."
        )
    return saved


def _of_another_base(attached: Attached, saved: Saved) -> set[str]:
    """One line on an adapter whose base model has another name than the run's; empty if the names agree.

    Only the last parts of paths are compared: one model may lie in different folders on two machines.
    """
    theirs = saved.config.get("base_model_name_or_path")
    ours = getattr(getattr(attached.model, "config", None), "_name_or_path", None)
    if not (isinstance(theirs, str) and theirs and ours) or Path(theirs).name == Path(ours).name:
        return set()
    return {f"{saved.directory} for {theirs}, the run's is {ours}"}

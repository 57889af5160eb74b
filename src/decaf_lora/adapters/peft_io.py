"""How does an adapter become a PEFT directory, and a PEFT directory an adapter?"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from decaf_lora import lowrank
from decaf_lora.adapters.adapter import Adapter
from decaf_lora.adapters.names import Tensors
from decaf_lora.adapters.stacked import Attached
from decaf_lora.errors import UserError


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

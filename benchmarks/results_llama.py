"""Ten agents teach a real LLaMA, which knows only children's stories, to read customers' questions.

    python benchmarks/results_llama.py --data DIR --out DIR            # runs what is missing, prints the tables
    python benchmarks/results_llama.py --data DIR --out DIR --parts text      # or: answers

The model is stories260K (LlamaForCausalLM, 260 K parameters). `text`: text tuning on banking77's questions, which it
was not trained on, scored by perplexity. Every method at its own best learning rate, searched by factors of 2
for each partition, with a seed of its own, on a tenth of the training questions that is held out; the table is of the
test questions and seeds 0, 1, 2. `answers`: BoolQ and WiC as verbalised classification, to show that the path works
from end to end; so small a model answers by chance. One process, one thread; stopped, it goes on where it was.

--data is a folder with stories260K/ (tok512.bin, hf/), banking77/ (train.csv, test.csv) and superglue_val/
(BoolQ.val.jsonl, WiC.val.jsonl).
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import best_rates
from best_rates import Found, compare
from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, LoraOptions, RunConfig, TaskConfig, TrainingConfig
from decaf_lora.records import Record, Spread, human_bytes, read_records
from decaf_lora.report import LOOKS
from decaf_lora.runs import checkpoint
from decaf_lora.runs.build import build_run
from decaf_lora.runs.compare import cells as cells_of
from decaf_lora.tasks.causal_lm import perplexity

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import convert_llama2c_tokenizer

ALGORITHMS = ("local", "dlora", "dlora_fa", "decaf", "decaf_tracked", "fedavg", "centralized")
PARTITIONS = ("iid", "dirichlet:0.1")
RATES = (0.01, 0.02, 0.04)
FASTER = {"dlora_fa": 4}
SEARCH_SEED = 100
SOME = ("local", "dlora", "decaf", "fedavg", "centralized")  # of the answers
ANSWERS: dict[str, dict[str, Any]] = {
    "BoolQ": {"templates": ("{passage} {question}?",), "max_length": 96},
    "WiC": {"templates": ("{sentence1} {sentence2} Is {word} the same?",)},
}


def story_teller(data: Path, to: Path) -> str:
    """The model's directory with its tokenizer in the format of transformers."""
    to.mkdir(parents=True, exist_ok=True)
    for file in (data / "stories260K" / "hf").iterdir():
        shutil.copyfile(file, to / file.name)
    convert_llama2c_tokenizer.convert(data / "stories260K" / "tok512.bin").save_pretrained(to)
    return str(to)


def text(model: str, questions: Path, **more: Any) -> CompareConfig:
    """Text tuning on customers' questions; the categories only split them among the agents."""
    return CompareConfig(
        task=TaskConfig(
            name="causal-lm",
            model=model,
            data=str(questions),
            label_column="category",
            packing=True,
            max_length=64,
            max_test=128,
            eval_batch_size=16,
        ),
        lora=LoraOptions(r=4, lora_alpha=8),
        training=TrainingConfig(steps=4, batch_size=2, agents_per_pass=10),
        agents=10,
        graph="ring",
        rounds=15,
        **more,
    )


def answers(model: str, data: Path, name: str) -> CompareConfig:
    """Questions with the answers no and yes; a third of the validation split is held out as test set."""
    return CompareConfig(
        algorithms=SOME,
        task=TaskConfig(
            name="causal-lm",
            model=model,
            data=str(data / "superglue_val" / f"{name}.val.jsonl"),
            test_share=0.33,
            max_test=80,
            answers=("no", "yes"),
            metric="f1",
            eval_batch_size=16,
            **ANSWERS[name],
        ),
        lora=LoraOptions(r=4, lora_alpha=8),
        training=TrainingConfig(steps=2, batch_size=2, learning_rate=0.01, agents_per_pass=10),
        agents=10,
        graph="ring",
        partition="iid",
        rounds=10,
        evaluate_every=10,
    )


def run(config: CompareConfig, out: Path) -> dict[str, list[Path]]:
    """Runs what is missing of a comparison; the folders of each algorithm's runs, one a seed."""
    if lost := [row.diverged for row in compare(config, out) if row.diverged]:
        raise SystemExit(f"{out}: {lost[0]}")
    cells = cells_of(config)
    return {a: [out / c.name for c in cells if c.config.algorithm.name == a] for a in config.algorithms}


def last(folder: Path) -> Record:
    """The last evaluated round of a run."""
    return [r for r in read_records(folder / "records.jsonl") if r.scores][-1]


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean and standard deviation over seeds."""
    return f"{fmean(values):{form}} ± {stdev(values):{form}}"


def search(model: str, data: Path, out: Path, partition: str) -> Found:
    """Held-out perplexity of every method by learning rate."""
    config = text(
        model,
        data / "banking77",
        algorithms=ALGORITHMS,
        partition=partition,
        seeds=(SEARCH_SEED,),
        evaluate_every=15,
        validation_share=0.1,
    )
    found = best_rates.search(config, RATES, out / f"search-{partition.partition(':')[0]}", FASTER)
    return {method: {rate: perplexity(score) for rate, score in of.items()} for method, of in found.items()}


def text_tables(model: str, data: Path, out: Path) -> str:
    """Search and table of both partitions, as Markdown; draws perplexity.png."""
    lines, curves = [], {}
    for partition in PARTITIONS:
        found = search(model, data, out, partition)
        best = {a: min(found[a], key=found[a].__getitem__) for a in ALGORITHMS}
        config = text(
            model, data / "banking77", algorithms=ALGORITHMS, partition=partition, learning_rates=best, evaluate_every=3
        )
        folders = run(config, out / partition.partition(":")[0])
        lines += [f"\n**{partition}**, search: held-out perplexity by learning rate, the best one bold\n"]
        rates = sorted({r for of_method in found.values() for r in of_method})
        lines += [f"| | {' | '.join(f'{r:g}' for r in rates)} |", "|---|" + "---:|" * len(rates)]
        for a in ALGORITHMS:
            shown = [f"{found[a][r]:.2f}" if r in found[a] else "" for r in rates]
            shown = [f"**{s}**" if r == best[a] else s for r, s in zip(rates, shown, strict=True)]
            lines.append(f"| {a} | {' | '.join(shown)} |")
        lines += [
            f"\n**{partition}**, test perplexity after 15 rounds\n",
            "| | learning rate | agents | worst agent | averaged model | an agent sent |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for a, runs in folders.items():
            records = [last(folder) for folder in runs]
            sent = fmean(sum(r.bytes_sent for r in read_records(f / "records.jsonl")) for f in runs)
            columns = (
                [perplexity(fmean(r.scores)) for r in records],
                [perplexity(min(r.scores)) for r in records],
                [perplexity(r.averaged_score) for r in records],
            )
            sent_text = human_bytes(Spread(sent)) if sent else "nothing"
            lines.append(f"| {a} | {best[a]:g} | {' | '.join(map(spread, columns))} | {sent_text} |")
        curves[partition] = folders
    first = read_records(next(iter(curves["iid"].values()))[0] / "records.jsonl")[0]
    lines.insert(0, f"Before training: test perplexity {perplexity(first.averaged_score):.2f}.")
    draw(curves, out / "perplexity.png")
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, list[Path]]], path: Path) -> None:
    """Perplexity by round, a panel for each partition; bands are the standard deviation over seeds."""
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (partition, folders) in zip(axes, curves.items(), strict=True):
        for algorithm, runs in folders.items():
            records = [[r for r in read_records(f / "records.jsonl") if r.scores] for f in runs]
            values = np.array([[perplexity(fmean(r.scores)) for r in of_run] for of_run in records])
            colour, marker = LOOKS.get(algorithm, ("#8A6FD1", "<"))
            rounds = [r.round for r in records[0]]
            axis.plot(rounds, values.mean(0), color=colour, marker=marker or None, markersize=4, label=algorithm)
            low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
            axis.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=partition, xlabel="round", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    ticks = [12, 15, 20, 30, 50, 90]
    axes[0].set_yticks(ticks, [str(t) for t in ticks])
    axes[0].set_yticks([], minor=True)
    axes[0].set_ylabel("test perplexity, mean of the agents")
    axes[-1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def answer_table(model: str, data: Path, out: Path) -> str:
    """Accuracy and F1 of BoolQ and WiC as Markdown. Training does not depend on the metric: the runs record F1, and
    the accuracy is of the same adapters, from their checkpoints."""
    lines = []
    for name in ANSWERS:
        config = answers(model, data, name)
        folders = run(config, out / name.lower())
        rows = {}
        for algorithm, runs in folders.items():
            accuracy = [fmean(scores(folder, "accuracy")) for folder in runs]
            rows[algorithm] = (accuracy, [fmean(last(folder).scores) for folder in runs])
        before = read_records(runs[0] / "records.jsonl")[0].averaged_score
        task = build_run(RunConfig.model_validate(cells_of(config)[0].config)).task
        share = float(task._test_labels.float().mean())
        lines += [
            f"\n**{name}**: {len(task.labels)} training and {task.num_test} test questions, "
            f"{share:.0%} of these are yes\n",
            "| | accuracy | F1 (yes) |\n|---|---:|---:|",
            f"| always yes | {share:.3f} | {2 * share / (1 + share):.3f} |",
            f"| before training | {fmean(scores(runs[0], 'accuracy', start=True)):.3f} | {before:.3f} |",
        ]
        lines += [f"| {a} | {spread(acc, '.3f')} | {spread(f1, '.3f')} |" for a, (acc, f1) in rows.items()]
    return "\n".join(lines)


def scores(folder: Path, metric: str, start: bool = False) -> list[float]:
    """The agents' scores by another metric, of a finished run or of its start."""
    config = configs.load(RunConfig, folder / "config.yaml")
    engine = build_run(config.model_copy(update={"task": config.task.model_copy(update={"metric": metric})}))
    try:
        if not start:
            engine.restore(*checkpoint.load_latest(folder / "checkpoints"))
        return engine.trainer.evaluate(engine.adapter).tolist()
    finally:
        engine.close()


def main() -> None:
    """Runs what is missing and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the model and the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the tables and the figure")
    parser.add_argument("--parts", nargs="+", choices=["text", "answers"], default=["text", "answers"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = story_teller(arguments.data, arguments.out / "model")
    for part, tables in (("text", text_tables), ("answers", answer_table)):
        if part in arguments.parts:
            found = tables(model, arguments.data, arguments.out)
            (arguments.out / f"{part}.md").write_text(found + "\n")
            print(f"\n{found}\n", flush=True)


if __name__ == "__main__":
    main()

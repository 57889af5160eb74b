"""How are methods compared, each at its own best learning rate? What the results_*.py scripts share.

`decaf_lora.tune` finds the rate of every method, with the first seed, on training examples that are held out; a range
grows by its own step while its best rate is an end. The table is of the test examples, with all seeds, every method at
its best rate on all of its training examples.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from decaf_lora import tune
from decaf_lora.config import CompareConfig
from decaf_lora.records import SummaryRow
from decaf_lora.runs import compare as comparisons

FASTER = {"dlora_fa": 2}
"""dlora_fa, which trains B alone, chooses among higher rates: so many times the others'."""
Found = dict[str, dict[float, float]]
"""Method -> learning rate -> mean score over the agents; a rate that diverged has none."""


def compare(config: CompareConfig, out: Path) -> list[SummaryRow]:
    """`decaf_lora.runs.compare`, going on with what is there."""
    started = time.process_time()
    rows, _ = comparisons.compare(config, out, resume=(out / "config.yaml").exists())
    print(f"{out}: {time.process_time() - started:.0f} s of processor time", flush=True)
    return rows


def search(config: CompareConfig, rates: Sequence[float], out: Path, faster: Mapping[str, float] = FASTER) -> Found:
    """Every method at every rate, times its own factor in `faster`, with the first seed, to the last round.

    Args:
        config: what is compared; its `validation_share` is held out.
        rates: the first rates, ascending.
        out: folder of the searches, one for each method.
        faster: method -> factor of its rates.
    """
    found: Found = {}
    for cell in comparisons.cells(config.model_copy(update={"seeds": config.seeds[:1]})):
        method = cell.config.algorithm.name
        over = {"training.learning_rate": [float(f"{rate * faster.get(method, 1):.6g}") for rate in rates]}
        folder = out / method
        started = (folder / "tune.yaml").exists()
        made = tune.search(cell.config, over, folder, rungs=1, extensions=10, resume=started)
        scores = {row.values["training.learning_rate"]: row.score for row in made.trials if row.score is not None}
        found[method] = {rate: scores[rate] for rate in sorted(scores)}
    return found


def table(config: CompareConfig, found: Found, out: Path) -> list[SummaryRow]:
    """Every method with all seeds at its best rate."""
    return compare(config.model_copy(update={"learning_rates": best_of(found)}), out)


def best_of(found: Found) -> dict[str, float]:
    """Method -> its best learning rate."""
    return {algorithm: max(scores, key=scores.__getitem__) for algorithm, scores in found.items()}


def rates_table(found: Found) -> str:
    """The search as Markdown, the best rate of a method bold."""
    columns = max(map(len, found.values()))
    lines = ["| method |" + " learning rate: held-out score |" * columns, "| --- |" + " --- |" * columns]
    for algorithm, scores in found.items():
        best = max(scores, key=scores.__getitem__)
        shown = [f"**{r:g}: {s:.3f}**" if r == best else f"{r:g}: {s:.3f}" for r, s in scores.items()]
        lines.append(f"| {algorithm} | {' | '.join(shown + [''] * (columns - len(shown)))} |")
    return "\n".join(lines)

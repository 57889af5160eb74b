"""How are methods compared, each at its own best learning rate? What the results_*.py scripts share.

Every method runs at every rate with the first seed; at its best one with the other seeds. The first seed's runs of the
table are the search's.
"""

import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from decaf_lora import config as configs
from decaf_lora.config import CompareConfig, RunConfig
from decaf_lora.records import SummaryRow
from decaf_lora.runs import compare as comparisons

FASTER = {"dlora_fa": 2}
"""dlora_fa, which trains B alone, chooses among higher rates: so many times the others'."""
Found = dict[str, dict[float, float]]
"""Method -> learning rate -> mean accuracy over the agents."""


def compare(config: CompareConfig, out: Path) -> list[SummaryRow]:
    """`decaf_lora.runs.compare`, going on with what is there."""
    started = time.process_time()
    rows, _ = comparisons.compare(config, out, resume=(out / "config.yaml").exists())
    print(f"{out}: {time.process_time() - started:.0f} s of processor time", flush=True)
    return rows


def search(
    config: CompareConfig,
    rates: Sequence[float],
    out: Path,
    faster: Mapping[str, float] = FASTER,
    extend: bool = False,
) -> Found:
    """Every method at every rate, times its own factor in `faster`, with the first seed.

    With `extend` a method goes on by factors of 2 for as long as its best rate is the lowest or the highest one.
    """
    found: Found = {}
    todo, done = [(rate, config.algorithms) for rate in rates], 0
    while todo:
        rate, algorithms = todo.pop(0)
        tried = {a: rate * faster.get(a, 1) for a in algorithms}
        update = {"algorithms": algorithms, "learning_rates": tried, "seeds": config.seeds[:1]}
        for row in compare(config.model_copy(update=update), out / f"rates-{done}"):
            score = row.mean_score if row.mean_score is not None else -math.inf  # it diverged
            found.setdefault(row.algorithm, {})[tried[row.algorithm]] = score
        done += 1
        if extend and not todo:
            todo = beyond(found, faster)
    return {algorithm: dict(sorted(scores.items())) for algorithm, scores in found.items()}


def beyond(found: Found, faster: Mapping[str, float]) -> list[tuple[float, tuple[str, ...]]]:
    """The rates to try next, before the factors in `faster`, and the methods whose best one is at an end so far."""
    wanted: dict[float, tuple[str, ...]] = {}
    for algorithm, scores in found.items():
        best = max(scores, key=scores.__getitem__)
        following = {min(scores): best / 2, max(scores): best * 2}.get(best)
        if following is not None:
            rate = following / faster.get(algorithm, 1)
            wanted[rate] = (*wanted.get(rate, ()), algorithm)
    return sorted(wanted.items())


def table(config: CompareConfig, found: Found, searched: Path, out: Path) -> list[SummaryRow]:
    """Every method with all seeds at its best rate; finished runs of the search or beside it are kept."""
    best = best_of(found)
    config = config.model_copy(update={"learning_rates": best})
    if not out.exists():
        out.mkdir()
        (out / "config.yaml").write_text(configs.dump(config))
        for cell in comparisons.cells(config):
            runs = [summary.parent for summary in searched.parent.rglob(f"{cell.name}/summary.json")]
            same = [run for run in runs if configs.load(RunConfig, run / "config.yaml") == cell.config]
            if same:
                shutil.copytree(same[0], out / cell.name)
    return compare(config, out)


def best_of(found: Found) -> dict[str, float]:
    """Method -> its best learning rate."""
    return {algorithm: max(scores, key=scores.__getitem__) for algorithm, scores in found.items()}


def means(found: Sequence[Found], tables: Sequence[Iterable[SummaryRow]]) -> Found:
    """Of tables made of `found`, mean accuracy over seeds and agents at the rates that ran with all seeds."""
    out: Found = {}
    for rates, rows in zip(map(best_of, found), tables, strict=True):
        for algorithm, rate in rates.items():
            scores = [row.mean_score for row in rows if row.algorithm == algorithm]
            out.setdefault(algorithm, {})[rate] = fmean(score for score in scores if score is not None)
    return out


def rates_table(found: Found) -> str:
    """The search as Markdown, the best rate of a method bold."""
    columns = max(map(len, found.values()))
    lines = ["| method |" + " learning rate: accuracy |" * columns, "| --- |" + " --- |" * columns]
    for algorithm, scores in found.items():
        best = max(scores, key=scores.__getitem__)
        shown = [f"**{r:g}: {s:.3f}**" if r == best else f"{r:g}: {s:.3f}" for r, s in scores.items()]
        lines.append(f"| {algorithm} | {' | '.join(shown + [''] * (columns - len(shown)))} |")
    return "\n".join(lines)

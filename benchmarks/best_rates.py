"""How are methods compared, each at its own best learning rate? What the results_*.py scripts share.

Every method runs at every rate with the first seed; at its best one with the other seeds. The first seed's runs of the
table are the search's.
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from decaf_lora import config as configs
from decaf_lora import execute
from decaf_lora.config import CompareConfig
from decaf_lora.records import SummaryRow

FASTER = {"dlora_fa": 2}
"""dlora_fa, which trains B alone, chooses among higher rates: so many times the others'."""
Found = dict[str, dict[float, float]]
"""Method -> learning rate -> mean accuracy over the agents."""


def compare(config: CompareConfig, out: Path) -> list[SummaryRow]:
    """`execute.compare`, going on with what is there."""
    started = time.process_time()
    rows = execute.compare(config, out, resume=(out / "config.yaml").exists())
    print(f"{out}: {time.process_time() - started:.0f} s of processor time", flush=True)
    return rows


def search(config: CompareConfig, rates: tuple[float, ...], out: Path, faster: Mapping[str, float] = FASTER) -> Found:
    """Every method at every rate, times its own factor in `faster`, with the first seed."""
    found: Found = {}
    for i, rate in enumerate(rates):
        tried = {a: rate * faster.get(a, 1) for a in config.algorithms}
        one = config.model_copy(update={"learning_rates": tried, "seeds": config.seeds[:1]})
        for row in compare(one, out / f"rates-{i}"):
            assert row.mean_score is not None
            found.setdefault(row.algorithm, {})[tried[row.algorithm]] = row.mean_score
    return found


def table(config: CompareConfig, found: Found, searched: Path, out: Path) -> list[SummaryRow]:
    """Every method with all seeds at its best rate; the first seed's runs are the search's."""
    best = {algorithm: max(scores, key=scores.__getitem__) for algorithm, scores in found.items()}
    config = config.model_copy(update={"learning_rates": best})
    if not out.exists():
        out.mkdir()
        (out / "config.yaml").write_text(configs.dump(config))
        for cell in execute.cells(config.model_copy(update={"seeds": config.seeds[:1]})):
            i = list(found[cell.config.algorithm.name]).index(cell.config.training.learning_rate)
            shutil.copytree(searched / f"rates-{i}" / cell.name, out / cell.name)
    return compare(config, out)


def rates_table(found: Found) -> str:
    """The search as Markdown, the best rate of a method bold."""
    columns = max(map(len, found.values()))
    lines = ["| method |" + " learning rate: accuracy |" * columns, "| --- |" + " --- |" * columns]
    for algorithm, scores in found.items():
        best = max(scores, key=scores.__getitem__)
        shown = [f"**{r:g}: {s:.3f}**" if r == best else f"{r:g}: {s:.3f}" for r, s in scores.items()]
        lines.append(f"| {algorithm} | {' | '.join(shown)} |")
    return "\n".join(lines)

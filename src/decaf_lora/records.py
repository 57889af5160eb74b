"""What happened in a run, and how is it told?

One JSON line a round (`Record`), one row a run (`SummaryRow`), one row for the runs that differ only by seed
(`Aggregate`). NaN and infinity are written as null, so every file is valid JSON. Higher scores are better.
The spread over agents is the population's (they are all there are), that over seeds the sample's (n - 1).
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import fmean, pstdev, stdev
from types import TracebackType
from typing import Any, Literal, Self

import pydantic
from rich import box
from rich.table import Table

from decaf_lora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One round of one run. A list has one entry an agent; None means not measured, or not finite."""

    round: int
    losses: list[float | None] | None = None  # mean over the local steps; round 0 has none
    scores: list[float | None] | None = None  # None when the round was not evaluated
    averaged_score: float | None = None
    consensus_distance: float | None = None
    interference: float | None = None
    tail: float | None = None
    recompression: float | None = None  # what cutting stacks between the exchanges of the round has left out
    bytes_sent: float  # by one agent in this round, mean over agents
    wire_bytes: float | None = None  # of them between processes, as written there; None in one process
    learning_rate: float
    seconds: dict[str, float]  # phase -> seconds


@dataclass(frozen=True)
class SummaryRow:
    """One run in one line: the scores are those of the last evaluated round, None of a run that diverged."""

    algorithm: str
    graph: str
    partition: str
    seed: int
    mean_score: float | None
    worst_score: float | None
    std_score: float | None
    averaged_score: float | None
    bytes_sent: float
    seconds: float
    diverged: str | None = None
    """Why its training could not go on to the last round."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds: no `std` of one seed, nothing if a run lacks the value."""

    mean: float | None
    std: float | None = None
    missing: str = "n/a"
    """What people read in place of a mean that is not known."""


@dataclass(frozen=True)
class Aggregate:
    """The runs that differ only by seed."""

    algorithm: str
    graph: str
    partition: str
    seeds: int
    mean_score: Spread
    worst_score: Spread
    std_score: Spread
    averaged_score: Spread
    bytes_sent: Spread
    seconds: Spread


METRICS = ("mean_score", "worst_score", "std_score", "averaged_score", "bytes_sent", "seconds")
COLUMNS = (
    "algorithm",
    "graph",
    "partition",
    "seeds",
    "mean score",
    "worst agent",
    "std over agents",
    "averaged model",
    "sent per agent",
    "time (s)",
)
_RECORD = pydantic.TypeAdapter(Record)
_ROWS = pydantic.TypeAdapter(list[SummaryRow])


# --- files --------------------------------------------------------------------------------------------------


def replace_text(path: Path, text: str) -> None:
    """Write `text` aside and rename it onto `path`: readers see the old file or the new one, never half."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON, atomically; dataclasses become objects, NaN and infinity null."""
    replace_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """`value` in JSON's types: no dataclass, no array, no NaN."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


class RecordWriter:
    """Appends one line a round and flushes it.

    A new run starts an empty file. A run that goes on from a checkpoint passes the last round in that
    checkpoint: later rounds, and a line torn by the interruption, are dropped first.
    """

    def __init__(self, path: Path, last_round: int | None = None) -> None:
        kept = [] if last_round is None else [r for r in read_records(path) if r.round <= last_round]
        replace_text(path, "".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _line(record: Record) -> str:
    return json.dumps(_plain(record), allow_nan=False) + "\n"


def read_records(path: Path) -> list[Record]:
    """The records in `path`, first round first. A torn last line (no newline, does not parse) is left out."""
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"records: cannot read {path} ({error.strerror}); is it a run's?") from error
    records = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    if rest:
        with contextlib.suppress(pydantic.ValidationError):  # torn: the write was interrupted
            records.append(_RECORD.validate_json(rest))
    return records


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        return _RECORD.validate_json(line)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}, line {number}: not a record ({_first(error)}); mend it.") from error


def _first(error: pydantic.ValidationError) -> str:
    """The first complaint of pydantic, on one line."""
    complaint = error.errors()[0]
    where = ".".join(str(part) for part in complaint["loc"])
    return f"{where}: {complaint['msg']}" if where else str(complaint["msg"])


def read_summary(path: Path) -> list[SummaryRow]:
    """The rows of a summary.json."""
    try:
        return _ROWS.validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"summary: cannot read {path} ({error.strerror}). Has the run finished?") from error
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not a summary ({_first(error)}); write it again.") from error


# --- from rounds to rows ------------------------------------------------------------------------------------


def read_facts(run_dir: Path) -> dict[str, Any]:
    """The facts in run.json that do not change from round to round."""
    path = run_dir / "run.json"
    try:
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"run: cannot read {path} ({error.strerror}); is it a run's?") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}).") from error
    if missing := {"algorithm", "graph", "partition", "seed"} - set(facts):
        raise UserError(f"{path}: not the facts of a run; it lacks {', '.join(sorted(missing))}.")
    return facts


def summarise(run_dir: Path) -> SummaryRow:
    """The row of the run in `run_dir`, from its run.json and records.jsonl."""
    return summary_row(read_facts(run_dir), read_records(run_dir / "records.jsonl"))


def summary_row(facts: Mapping[str, Any], records: Sequence[Record]) -> SummaryRow:
    """The row of a run. One agent without a finite score leaves the mean unknown."""
    diverged = facts.get("diverged")
    last = None if diverged else next((record for record in reversed(records) if record.scores), None)
    scores = (last.scores if last else None) or []
    finite = [score for score in scores if score is not None and math.isfinite(score)]
    known = len(finite) == len(scores) > 0
    return SummaryRow(
        algorithm=facts["algorithm"],
        graph=facts["graph"]["name"],
        partition=facts["partition"]["name"],
        seed=facts["seed"],
        mean_score=fmean(finite) if known else None,
        worst_score=min(finite) if known else None,
        std_score=pstdev(finite) if known else None,
        averaged_score=last.averaged_score if last else None,
        bytes_sent=math.fsum(record.bytes_sent for record in records),
        seconds=math.fsum(second for record in records for second in record.seconds.values()),
        diverged=diverged,
    )


def aggregate(rows: Iterable[SummaryRow]) -> list[Aggregate]:
    """Mean and standard deviation over the seeds of each (algorithm, graph, partition).

    Those under one graph and partition stand together, the algorithms in the order of their first appearance.
    A seed counts once: of two rows for it the later one.
    """
    runs: dict[tuple[str, str, str], dict[int, SummaryRow]] = {}
    for row in rows:
        runs.setdefault((row.graph, row.partition, row.algorithm), {})[row.seed] = row
    settings = list(dict.fromkeys(key[:2] for key in runs))
    algorithms = list(dict.fromkeys(key[2] for key in runs))
    order = sorted(runs, key=lambda key: (settings.index(key[:2]), algorithms.index(key[2])))
    return [_aggregate(list(runs[key].values())) for key in order]


def _aggregate(runs: Sequence[SummaryRow]) -> Aggregate:
    """The row of runs that differ only by seed."""
    missing = "diverged" if any(run.diverged for run in runs) else "n/a"
    spreads = {metric: _spread([getattr(run, metric) for run in runs], missing) for metric in METRICS}
    first = runs[0]
    return Aggregate(first.algorithm, first.graph, first.partition, seeds=len(runs), **spreads)


def _spread(values: Sequence[float | None], missing: str) -> Spread:
    known = [value for value in values if value is not None and math.isfinite(value)]
    if len(known) < len(values):
        return Spread(None, missing=missing)
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None)


# --- tables -------------------------------------------------------------------------------------------------


def cells(row: Aggregate) -> list[str]:
    """`row` as text for people, one cell a column of `COLUMNS`."""
    scores = [_number(getattr(row, metric), ".3f") for metric in METRICS[:4]]
    sent = human_bytes(row.bytes_sent) if row.bytes_sent.mean else "–"
    seconds = _number(row.seconds, ".0f" if (row.seconds.mean or 0) >= 100 else ".1f")
    return [row.algorithm, row.graph, row.partition, str(row.seeds), *scores, sent, seconds]


def _number(spread: Spread, form: str) -> str:
    if spread.mean is None:
        return spread.missing
    return f"{spread.mean:{form}}" + ("" if spread.std is None else f" ± {spread.std:{form}}")


def human_bytes(spread: Spread) -> str:
    """Bytes in decimal units, e.g. `1.23 MB`; the spread only where it shows."""
    if spread.mean is None:
        return "n/a"
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log10(max(float(f"{spread.mean:.3g}"), 1)) // 3), len(units) - 1)
    mean, std = f"{spread.mean / 1000**power:.3g}", f"{(spread.std or 0) / 1000**power:.2g}"
    visible = spread.std is not None and spread.std > 0.005 * spread.mean
    return f"{mean} ± {std} {units[power]}" if visible else f"{mean} {units[power]}"


def table(rows: Iterable[SummaryRow]) -> Table:
    """The aggregated rows for the terminal, within 80 columns: what all runs share goes to the title."""
    lines = [cells(row) for row in aggregate(rows)]
    shared = [k for k in (1, 2, 3) if lines and len({line[k] for line in lines}) == 1]
    facts = [_literal(lines[0][k]) for k in shared if k != 3]
    if 3 in shared:
        facts.append("1 seed" if lines[0][3] == "1" else f"{lines[0][3]} seeds (mean ± standard deviation)")
    result = Table(
        title=", ".join(facts),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
    )
    for k, column in enumerate(COLUMNS):
        if k not in shared:
            justify: Literal["left", "right"] = "left" if k < 3 else "right"
            result.add_column(column.replace(" ", "\n"), justify=justify, no_wrap=True)
    for line in lines:
        line[-1] = line[-1].split(" ")[0]
        shown = [text.replace(" ± ", "±") for k, text in enumerate(line) if k not in shared]
        result.add_row(*map(_literal, shown))
    return result


def _literal(text: str) -> str:
    return text.replace("[", r"\[")


def to_markdown(rows: Iterable[SummaryRow]) -> str:
    """The aggregated rows as a GitHub table."""
    return _markdown([COLUMNS, *(cells(row) for row in aggregate(rows))], texts=3)


def _markdown(lines: Iterable[Sequence[str]], texts: int) -> str:
    """A GitHub table of a header and its lines; the first `texts` columns hold text, the others numbers."""
    header, *body = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *body))


def to_csv(rows: Iterable[SummaryRow]) -> str:
    """The aggregated rows for machines: full precision, and a column `<metric>_std` after each metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name for metric in METRICS for name in (metric, f"{metric}_std")]
    writer.writerow(["algorithm", "graph", "partition", "seeds", *names])
    for row in aggregate(rows):
        spreads: list[Spread] = [getattr(row, metric) for metric in METRICS]
        numbers = [number for spread in spreads for number in (spread.mean, spread.std)]
        writer.writerow([row.algorithm, row.graph, row.partition, row.seeds, *numbers])
    return text.getvalue()


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "–": "--",
        **{character: "\\" + character for character in "&%$#_{}"},
    }
)


def to_latex(rows: Iterable[SummaryRow]) -> str:
    r"""The aggregated rows as a tabular; it needs \usepackage{booktabs}."""
    body = [" & ".join(cell.translate(_LATEX) for cell in cells(row)) + r" \\" for row in aggregate(rows)]
    head = " & ".join(COLUMNS) + r" \\"
    columns = "lll" + "r" * (len(COLUMNS) - 3)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}", ""])


# --- the layout of papers: algorithms x settings ------------------------------------------------------------

SHOWN = {"mean_score": "mean score over agents", "averaged_score": "score of the averaged model"}
"""What a table of settings shows: metric -> its title."""


@dataclass(frozen=True)
class Pivot:
    """A metric of all algorithms (rows) under all settings (columns, graph by graph)."""

    metric: str
    settings: list[tuple[str, str]]  # (graph, partition)
    lines: dict[str, list[Spread | None]]  # algorithm -> one entry a setting, None if it did not run

    @property
    def graphs(self) -> list[tuple[str, int]]:
        """The graphs in the order of the columns, and how many columns each has."""
        return [(graph, len(list(group))) for graph, group in itertools.groupby(graph for graph, _ in self.settings)]

    def cells(self, algorithm: str) -> list[str]:
        """The line of an algorithm as text for people."""
        return ["–" if spread is None else _number(spread, ".3f") for spread in self.lines[algorithm]]


def pivot(rows: Iterable[SummaryRow], metric: str = "mean_score") -> Pivot:
    """The table of a metric, mean and standard deviation over seeds, in the layout of papers."""
    found = {(row.algorithm, row.graph, row.partition): getattr(row, metric) for row in aggregate(rows)}
    graphs = list(dict.fromkeys(key[1] for key in found))
    settings = sorted(dict.fromkeys(key[1:] for key in found), key=lambda setting: graphs.index(setting[0]))
    algorithms = dict.fromkeys(key[0] for key in found)
    return Pivot(metric, settings, {name: [found.get((name, *setting)) for setting in settings] for name in algorithms})


def tables(rows: Sequence[SummaryRow]) -> dict[str, str]:
    """File name -> text: the table of all metrics, and those of the scores by setting if there are several."""
    texts = {"table.md": to_markdown(rows), "table.csv": to_csv(rows), "table.tex": to_latex(rows)}
    pivots = [pivot(rows, metric) for metric in SHOWN]
    if len(pivots[0].settings) > 1:
        texts |= {"scores.md": _pivots_to_markdown(pivots), "scores.csv": _pivots_to_csv(pivots)}
        texts["scores.tex"] = "\n".join(map(_pivot_to_latex, pivots))
    return texts


def _pivots_to_markdown(pivots: Iterable[Pivot]) -> str:
    parts = []
    for table in pivots:
        header = ["algorithm", *(f"{graph}, {partition}" for graph, partition in table.settings)]
        lines = [[name, *table.cells(name)] for name in table.lines]
        parts.append(f"{SHOWN[table.metric].capitalize()}\n\n{_markdown([header, *lines], texts=1)}")
    return "\n".join(parts)


def _pivots_to_csv(pivots: Iterable[Pivot]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, table in enumerate(pivots):
        if index == 0:
            names = [f"{graph}, {partition}" for graph, partition in table.settings]
            writer.writerow(["metric", "algorithm", *(name + end for name in names for end in ("", " (std)"))])
        for algorithm, spreads in table.lines.items():
            numbers = [number for s in spreads for number in ((None, None) if s is None else (s.mean, s.std))]
            writer.writerow([table.metric, algorithm, *numbers])
    return text.getvalue()


def _pivot_to_latex(table: Pivot) -> str:
    """A tabular with a line of graphs over a line of partitions."""
    groups, rules, column = [], [], 2
    for graph, width in table.graphs:
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{graph.translate(_LATEX)}}}")
        rules.append(rf"\cmidrule(lr){{{column}-{column + width - 1}}}")
        column += width
    partitions = ["", *(partition.translate(_LATEX) for _, partition in table.settings)]
    body = [[name, *table.cells(name)] for name in table.lines]
    lines = [
        f"% {SHOWN[table.metric]}",
        rf"\begin{{tabular}}{{l{'r' * len(table.settings)}}}",
        r"\toprule",
        " & ".join(["", *groups]) + r" \\",
        " ".join(rules),
        " & ".join(partitions) + r" \\",
        r"\midrule",
        *(" & ".join(cell.translate(_LATEX) for cell in line) + r" \\" for line in body),
    ]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


# --- where it ran -------------------------------------------------------------------------------------------


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, hardware, commit and the time now: what a reader needs to judge the numbers. Never fails."""
    return {
        "decaf_lora": _attempt(lambda: metadata.version("decaf-lora")),
        "torch": _attempt(lambda: metadata.version("torch")),
        "transformers": _attempt(lambda: metadata.version("transformers")),
        "peft": _attempt(lambda: metadata.version("peft")),
        "numpy": _attempt(lambda: metadata.version("numpy")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _attempt(_processor) or platform.machine(),
        "cpu_count": os.cpu_count(),
        "device": _attempt(lambda: _device(device)) or device,
        "commit": _attempt(_commit),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _attempt(call: Callable[[], str | None]) -> str | None:
    """What `call` returns; None if this machine cannot tell."""
    try:
        return call()
    except (OSError, RuntimeError, ValueError, AssertionError, ImportError, subprocess.SubprocessError):
        return None


def _processor() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    return names[0] if names else None


def _device(device: str) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def _commit() -> str | None:
    """The commit of this source, `-dirty` if it was edited since; None unless git tracks this very file."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    git("ls-files", "--error-unmatch", here.name)
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")

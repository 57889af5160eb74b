"""What is there to report? The runs in a directory, and which of them are to be compared with which."""

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decaf_lora import records
from decaf_lora.errors import UserError
from decaf_lora.records import Record, SummaryRow

GRAPHLESS = ("server", "pooled", "none")  # graph names of algorithms that do not use the run's graph


@dataclass(frozen=True)
class RunRecords:
    """What is read from the directory of one run."""

    name: str
    facts: dict[str, Any]
    records: list[Record]
    config: str
    environment: dict[str, Any]

    @property
    def algorithm(self) -> str:
        """The algorithm, or the name of the setting."""
        return records.row_name(self.facts)

    @property
    def has_name(self) -> bool:
        """Whether the run is a named setting, which may have a graph of its own."""
        return bool(self.facts.get("setting"))

    @property
    def graph(self) -> str:
        return str(self.facts["graph"]["name"])

    @property
    def partition(self) -> str:
        return str(self.facts["partition"]["name"])

    @property
    def seed(self) -> int:
        return int(self.facts["seed"])

    @property
    def uses_graph(self) -> bool:
        """Whether agents exchange along the graph; false with a server, with pooled data, and without an exchange."""
        return bool(self.facts.get("uses_graph", self.graph not in GRAPHLESS and self.algorithm != "centralized"))


Groups = dict[str, list[RunRecords]]  # algorithm -> its runs, one a seed


def read_runs(directory: Path) -> list[RunRecords]:
    """The runs in `directory`: a run and its baselines, or those of a comparison, in the order of its summary.json.

    Raises:
        UserError: there is no run, or one cannot be read.
    """
    try:
        if (directory / "run.json").exists():
            folders = [directory, *(directory / kind for kind in records.BASELINES)]
            return [read_run(folder) for folder in folders if (folder / "run.json").exists()]
        runs = [read_run(path.parent) for path in sorted(directory.glob("*/run.json"))]
    except OSError as error:
        raise UserError(f"report: cannot read {str(directory)[:200]} ({error.strerror or error}).") from error
    if not runs:
        raise UserError(f"report: {directory} holds no run. Give the directory of a run or of a comparison.")
    summary = directory / "summary.json"
    listed = [_identity(row) for row in records.read_summary(summary)] if summary.exists() else []
    place = {identity: index for index, identity in reversed(list(enumerate(listed)))}
    return sorted(runs, key=lambda run: place.get(_identity(run), len(place)))


def read_run(directory: Path) -> RunRecords:
    facts, found = records.read_facts(directory), records.read_records(directory / "records.jsonl")
    agents = {len(values) for record in found for values in (record.scores, record.losses) if values}
    if len(agents) > 1:
        counts = " and ".join(map(str, sorted(agents)))
        raise UserError(f"{directory / 'records.jsonl'}: its rounds are of {counts} agents; mend it.")
    environment = _told(directory / "environment.json", json.loads)
    if not isinstance(environment, dict | None):
        _leave_out(directory / "environment.json", "it is no object")
        environment = None
    return RunRecords(
        name=directory.resolve().name,
        facts=facts,
        records=found,
        config=_told(directory / "config.yaml", str) or "",
        environment=environment or {},
    )


def _told(path: Path, read: Callable[[str], Any]) -> Any:
    """What a file says that the report can do without; None, with a warning, if it cannot be read."""
    try:
        return read(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        _leave_out(path, str(error))
        return None


def _leave_out(path: Path, reason: str) -> None:
    warnings.warn(f"report: {path} is left out, it cannot be read ({' '.join(reason.split())[:120]}).", stacklevel=2)


def _identity(run: RunRecords | SummaryRow) -> tuple[str, str, str, int]:
    return run.algorithm, run.graph, run.partition, run.seed


def by_setting(runs: Sequence[RunRecords]) -> dict[tuple[str, str], list[RunRecords]]:
    """(graph, partition) -> the runs to compare with each other.

    Baselines that do not use the graph (a server, pooled data, no exchange) may have run only once. Such a run belongs
    to every graph of its partition. So does a named setting with a graph that no other run has.
    """
    bound = [run for run in runs if run.uses_graph and not run.has_name]
    sections: dict[tuple[str, str], list[RunRecords]] = {(run.graph, run.partition): [] for run in bound or runs}
    for run in runs:
        own = (run.graph, run.partition)
        partition = [setting for setting in sections if setting[1] == run.partition]
        if run.has_name:  # its graph may be none of the others'
            settings = [own] if own in sections else partition or [own]
        elif "uses_graph" in run.facts:
            settings = [own] if run.uses_graph else partition or [own]
        else:  # written by an earlier version, which ran baselines under every graph
            settings = [own] if own in sections else partition or list(sections)
        for setting in settings:
            sections.setdefault(setting, []).append(run)
    return sections


def by_algorithm(runs: Iterable[RunRecords]) -> Groups:
    """Algorithm -> its runs, one for each seed: of several with one seed, the last."""
    groups: dict[str, dict[int, RunRecords]] = {}
    for run in runs:
        groups.setdefault(run.algorithm, {})[run.seed] = run
    return {algorithm: list(seeds.values()) for algorithm, seeds in groups.items()}


def peer(groups: Groups) -> RunRecords:
    """The run from which graph and partition of the section are drawn: one that uses the graph, where there is one."""
    runs = [run for group in groups.values() for run in group]
    peers = [run for run in runs if run.algorithm != "centralized"] or runs
    return next((run for run in peers if run.uses_graph), peers[0])

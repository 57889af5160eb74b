"""What does a run write down, and how is it read back? One JSON line a round (`Record`), facts in run.json.

NaN and infinity are written as null, so that every file is valid JSON. Higher scores are better, unless
`lower_is_better` in run.json is true.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import pydantic

from decaf_lora.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Record:
    """One round of one run. A list has one entry for each agent. None means not measured, not finite, or a liar's."""

    round: int
    losses: list[float | None] | None = None  # mean over the local steps; round 0 has none
    scores: list[float | None] | None = None  # None when the round was not evaluated
    own_scores: list[float | None] | None = None  # on each agent's own test examples, where asked for
    averaged_score: float | None = None
    attackers: list[int] | None = None  # agents that lied; their losses and scores are None and count nowhere
    consensus_distance: float | None = None
    interference: float | None = None
    tail: float | None = None
    recompression: float | None = None  # norm of what was cut between the exchanges of the round
    bytes_sent: float  # by one agent in this round, mean over agents
    wire_bytes: float | None = None  # of bytes_sent: those between processes, as encoded; None in one process
    epsilon: float | None = None  # privacy lost so far, the largest of the agents'; None when nothing is private
    delta: float | None = None
    learning_rate: float
    seconds: dict[str, float]  # phase -> seconds
    # Only for an agent that does not see all others:
    neighbour_distance: float | None = None  # RMS over the neighbours' messages, like consensus_distance
    weights: dict[str, float] | None = None  # neighbour's number -> weight of its message; the rest is the agent's own
    waited: dict[str, float] | None = None  # neighbour's number -> seconds until it was certain that it takes part
    missed: dict[str, dict[str, str]] | None = None  # exchange, from 1 -> number of a neighbour not heard -> why
    rejected: list[str] | None = None  # messages that were refused: whose, and why

    def counted(self, values: Sequence[float | None] | None) -> list[float | None]:
        """The values of all agents without the attackers'; one value for all stays."""
        liars = self.attackers or ()
        return [v for agent, v in enumerate(values or ()) if agent not in liars or len(values or ()) <= max(liars)]


_RECORD = pydantic.TypeAdapter(Record)


def _rectangular(rows: list[list[Any]] | None) -> list[list[Any]] | None:
    if rows and len({len(row) for row in rows}) > 1:
        raise ValueError("its rows are of different lengths")
    return rows


_Matrix = Annotated[list[list[float]] | None, pydantic.AfterValidator(_rectangular)]


class _Graph(pydantic.BaseModel):
    name: str
    weights: _Matrix = None
    rows: list[list[tuple[int, float]]] | None = None
    sigma_2: float | None = None


class _Partition(pydantic.BaseModel):
    name: str
    label_table: _Matrix = None
    classes: list[str | int] | None = None


class _Facts(pydantic.BaseModel):
    """The fields of run.json that are read. Checked before anything is made of them: the file may be torn or edited."""

    algorithm: str
    setting: str | None = None
    graph: _Graph
    partition: _Partition
    seed: int
    agents: int | None = None
    ranks: list[int] | None = None
    rounds: int | None = None
    task: str | None = None
    score_name: str | None = None
    diverged: str | None = None
    uses_graph: bool | None = None
    lower_is_better: bool | None = None
    majority_score: float | None = None
    rank: int | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    model: str | None = None
    parameters: int | None = None
    data: str | None = None
    num_train: int | None = None
    num_test: int | None = None
    names: list[str] | None = None
    attackers: str | None = None
    privacy: str | None = None


_FACTS = pydantic.TypeAdapter(_Facts)


def replace_text(path: Path, text: str) -> None:
    """Writes `text` beside `path` and renames it: readers see the old file or the new one, never half a file."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the rename: else a machine that stops in between leaves an empty file
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes `value` to `path` as JSON, at once or not at all; dataclasses become objects, NaN and infinity null."""
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
    """Appends one line for each round, and flushes it.

    Args:
        path: the file.
        last_round: the round of the checkpoint that a run goes on from. Lines of later rounds, and a line that the
            interruption has torn, are dropped. None: the run is new and starts an empty file.
    """

    def __init__(self, path: Path, last_round: int | None = None) -> None:
        kept = [] if last_round is None else [r for r in whole_rounds(path)[0] if r.round <= last_round]
        replace_text(path, "".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Makes sure that the disk has what was written. A checkpoint relies on it."""
        os.fsync(self._file.fileno())

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


def whole_rounds(path: Path) -> tuple[list[Record], str]:
    """The records in `path` from round 0 up to the first that is missing or torn, and what follows them, in words.

    A torn file is no error here: a crash or a full disk can leave one, and a run that goes on writes the rest again.
    An agent of a mesh that was late has left rounds out; the record with which it came back has `weights`.
    """
    records: list[Record] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], f"{path} is missing"
    except OSError as error:
        raise UserError(f"records: cannot read {path} ({error.strerror}).") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = _RECORD.validate_json(line)
        except pydantic.ValidationError:
            return records, f"line {number} of {path} is not a record"
        due = records[-1].round + 1 if records else 0
        if record.round != due and (record.weights is None or record.round < due):
            return records, f"{path} lacks round {due}"
        records.append(record)
    return records, f"{path} ends with round {records[-1].round}" if records else f"{path} is empty"


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        return _RECORD.validate_json(line)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}, line {number}: not a record ({first_complaint(error)}); mend it.") from error


def first_complaint(error: pydantic.ValidationError) -> str:
    """The first complaint of pydantic, on one line."""
    complaint = error.errors()[0]
    where = ".".join(str(part) for part in complaint["loc"])
    return f"{where}: {complaint['msg']}" if where else str(complaint["msg"])


def read_facts(run_dir: Path) -> dict[str, Any]:
    """The facts in run.json that do not change from round to round."""
    path = run_dir / "run.json"
    try:
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"run: cannot read {path} ({error.strerror}); is it a run's?") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}).") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path}: not the facts of a run; it holds {json.dumps(facts)[:40]}.")
    if missing := {"algorithm", "graph", "partition", "seed"} - set(facts):
        raise UserError(f"{path}: not the facts of a run; it lacks {', '.join(sorted(missing))}.")
    try:
        _FACTS.validate_python(facts)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: not the facts of a run ({first_complaint(error)}); mend it.") from error
    return facts

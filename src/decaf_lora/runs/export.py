"""What does a run leave? An agent's adapter, the averaged model or all agents', for PEFT or folded into the base.

An export reads the newest checkpoint. The checkpoint knows the names and order of the classes, and where the base model
came from, so an export needs neither the data nor a task's own file. It imports no Python that the folder names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decaf_lora.consensus import check_agent, chosen
from decaf_lora.errors import UserError
from decaf_lora.records import Record, read_facts, read_records

if TYPE_CHECKING:
    from decaf_lora.adapters.adapter import Adapter

ALL = "all"


def export(directory: Path, agent: int | str, to: Path, *, merge: bool = False) -> list[Path]:
    """Writes adapters of a run's newest checkpoint as PEFT directories.

    Args:
        directory: the folder of the run.
        agent: the number or the name of an agent; "averaged" for the averaged model; or "all" for every agent, each
            written to `to`/agent-K.
        to: the directory to write, new or empty.
        merge: write the whole model with the adapter folded in, which loads without PEFT.

    Returns:
        The directories that were written. None is ever left half written.

    Raises:
        UserError: there is no run, no checkpoint that can be used, or no such agent; or `to` cannot be written.
    """
    from decaf_lora.adapters.adapter import as_adapter
    from decaf_lora.adapters.names import put, take
    from decaf_lora.adapters.portable import written_whole

    tensors, values = _checkpoint(directory)
    outline = values["outline"]
    parts = take("adapter/", tensors)
    for group in ("scale/", "ranks/"):
        parts |= put(group, take(group, tensors))
    adapters = as_adapter(parts).folded()
    names = read_facts(directory).get("names") or []
    agents: list[int | str] = list(range(adapters.num_agents)) if agent == ALL else [numbered(agent, names)]
    for one in agents:
        check_agent(one, adapters.num_agents)
    made, record = _made(directory, values), _record(directory, values["round"])
    with written_whole(to) as aside:
        for one in agents:
            own = {**made, **_score(record, one, outline)}
            if names and isinstance(one, int):
                own["model"] = f"agent {one}, {names[one]}"
            place = aside / f"agent-{one}" if agent == ALL else aside
            _write(place, chosen(adapters, one, values.get("attackers", ())), one, outline, own, merge)
    return [to / f"agent-{one}" for one in agents] if agent == ALL else [to]


def numbered(agent: int | str, names: Sequence[str]) -> int | str:
    """The number of the agent that a user names. "averaged" and "all" stay as they are.

    Args:
        agent: a number, a name, "averaged" or "all".
        names: (N,) names of the agents; () if they only have numbers.

    Raises:
        UserError: `agent` is none of these, or has two meanings.
    """
    if isinstance(agent, int):
        return agent
    place = names.index(agent) if agent in names else None
    if agent.isascii() and agent.isdigit():
        if place is not None and place != int(agent) < len(names):
            raise UserError(
                f"agent: {agent} is the name of agent {place} and the number of {names[int(agent)]!r}; rename it."
            )
        return int(agent) if place is None else place
    if agent in ("averaged", ALL):
        if place is not None:
            raise UserError(f"agent: {agent!r} is also the name of an agent; give its number, {place}.")
        return agent
    if place is None:
        known = f" Choose one of: {', '.join(names)}." if names else ""
        raise UserError(f"agent: {agent!r} is neither a number nor 'averaged' nor 'all'.{known}")
    return place


def _write(
    to: Path, adapter: Adapter, agent: int | str, outline: Mapping[str, Any], made: Mapping[str, Any], merge: bool
) -> None:
    import tempfile

    from decaf_lora.adapters.fold import fold
    from decaf_lora.adapters.portable import name_of, write_adapter, write_companions

    to.mkdir(exist_ok=True)
    if not merge:
        write_adapter(to, adapter, agent, outline, made)
        return
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=".adapter-") as aside:
        write_adapter(Path(aside), adapter, agent, outline, made)
        fold(outline["task"], Path(aside), to)
    write_companions(to, outline["task"], {"model": name_of(agent), **made}, merged=True)


def _checkpoint(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and values of the newest checkpoint of the run in `directory`."""
    from decaf_lora.runs import checkpoint

    if not (directory / "run.json").exists():  # a run made in Python has no config.yaml
        if not (directory / "config.yaml").exists():
            raise UserError(f"export: {directory} holds no run (no run.json); give the folder of one run.")
        runs = sorted(p.parent.name for p in directory.glob("*/run.json"))
        some = f" It is a comparison; give one of its runs, e.g. {directory / runs[0]}." if runs else ""
        raise UserError(f"export: {directory} holds no run.{some}")
    found = checkpoint.load_latest(directory / "checkpoints")
    if found is None:
        raise UserError(f"export: {directory} has no checkpoint yet; go on with the run first (--resume).")
    tensors, values = found
    if "outline" not in values or not any(name.startswith("scale/") for name in tensors):
        raise UserError(
            f"export: the newest checkpoint in {directory / 'checkpoints'} does not say what its model is; an earlier "
            "version wrote it. Go on with the run for a round (--resume, with more rounds), or run it again."
        )
    return tensors, values


def _made(directory: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """How the model was made, for its model card."""
    facts = read_facts(directory)
    made: dict[str, Any] = {name: facts.get(name) for name in ("algorithm", "agents", "seed")}
    made["partition"] = facts["partition"]["name"]
    if facts.get("uses_graph", True):
        made["graph"] = facts["graph"]["name"]
    environment = directory / "environment.json"
    try:
        versions = json.loads(environment.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        versions = None
    if isinstance(versions, dict):  # they only inform
        made |= {name: versions[name] for name in ("decaf_lora", "torch", "transformers", "peft") if versions.get(name)}
    if kept := facts.get("privacy"):
        made["privacy, at most"] = kept
    if lies := facts.get("attackers"):
        made["attackers in the simulation"] = lies
    return {**made, "rounds": values["round"]}


def _record(directory: Path, round_: int) -> Record | None:
    return next((r for r in read_records(directory / "records.jsonl") if r.round == round_ and r.scores), None)


def _score(record: Record | None, agent: int | str, outline: Mapping[str, Any]) -> dict[str, str]:
    """The model's own score at the checkpoint, if it was evaluated there."""
    if record is None or record.scores is None:
        return {}
    if isinstance(agent, int) and agent in (record.attackers or ()):
        return {}
    score = record.scores[agent] if isinstance(agent, int) else record.averaged_score
    return {str(outline["task"]["score_name"]): "not finite" if score is None else f"{score:.4f}"}

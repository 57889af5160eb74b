"""What do organiser and sites do before the first round? `decaf federation init`, `request` and `seal`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as installed
from pathlib import Path

import numpy as np
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from decaf_lora import algorithms, graphs
from decaf_lora.config import RunConfig, explain
from decaf_lora.errors import UserError, unknown
from decaf_lora.exchange import refuse_alone
from decaf_lora.federation import base_model, dialling, file, keys, terms


def key_of_organiser(federation: Path) -> Path:
    """Where the organiser's key is: beside the federation file."""
    return federation.with_suffix(".organiser.key")


def init(
    path: Path,
    config: RunConfig,
    agents: Sequence[str],
    graph: str,
    *,
    name: str | None = None,
    days: float = 90,
    limits: file.Limits | None = None,
) -> file.Draft:
    """Writes the draft of a federation and, where there is none yet, the organiser's key beside it.

    Args:
        path: the federation file; must not exist.
        config: the run; what is shared of it becomes the draft's terms.
        agents: names, in the order of their numbers.
        graph: as `decaf graph` knows it, or edges between names, "alice-bob,bob-carol".
        name: of the federation; None: the name of the file.
        days: days from sealing until the file expires.
        limits: how long an agent waits.

    Returns:
        The draft.

    Raises:
        UserError: a name or an option cannot work; nothing is written then.
    """
    if path.exists():
        raise UserError(f"federation: {path} exists already; change it with an editor, or name another file.")
    try:
        draft = file.Draft(
            name=name or path.stem.lower(),
            agents=tuple(agents),
            graph=graph,
            days=days,
            limits=limits or file.Limits(),
            terms=terms.terms_of(config),
        )
    except ValidationError as error:
        raise UserError(explain(file.Draft, error)) from error
    draft.terms.config(len(agents), "ring")  # as the sites will read it
    _schedule(graph, draft.agents, config)
    if not key_of_organiser(path).exists():
        keys.Organiser.make(key_of_organiser(path))
    file.write({"draft": draft.model_dump(mode="json")}, path)
    return draft


def request(
    path: Path,
    name: str,
    address: str | None,
    *,
    key: Path | None = None,
    days: float = keys.DAYS,
    new: bool = False,
) -> tuple[Path, Path]:
    """Makes a site's key, if it has none yet, and writes its request.

    Args:
        path: the draft, or a sealed file whose next version the request is for.
        name: of the agent.
        address: host:port where the others reach it; None where it can only dial.
        key: file of the key; NAME.key beside the federation file if unset. One that exists is used again.
        days: days that a new certificate is valid.
        new: whether the agent is to be added: the file does not name it yet.

    Returns:
        The file of the request, and the file of the key.
    """
    known = agents_of(path)
    if new and name in known:
        raise UserError(f"new: {name} is an agent of {path} already; leave --new out.")
    if not new and name not in known:
        raise UserError(f"{unknown('name', name, known)} Or, if {name} is to be added, give --new.")
    keys.check_name(name)
    if address is not None:
        file.host_port(address)
    key = key or path.with_name(f"{name}.key")
    own = keys.load_identity(key) if key.exists() else keys.make_identity(name, key, days)
    if own.name != name:
        raise UserError(f"key: {key} is that of {own.name}, not of {name}; name another file with --key.")
    member = file.Member(name=name, address=address, certificate=own.certificate.decode())
    out = path.with_name(f"{name}.request")
    file.write({"request": member.model_dump(mode="json")}, out)
    return out, key


def agents_of(path: Path) -> list[str]:
    """Names of a draft's agents, or of a sealed file's."""
    if file.is_sealed(path):
        return [member.name for member in file.read_signed(path).agents]
    return list(file.read_draft(path).agents)


def seal(
    path: Path,
    requests: Sequence[Path],
    *,
    agents: Sequence[str] = (),
    graph: str | None = None,
    days: float | None = None,
) -> file.Signed:
    """Signs the federation file with the organiser's key: a draft as version 1, a sealed one as its next version.

    Args:
        path: the federation file, which is replaced.
        requests: files of the sites' requests. A site without one keeps its entry of the sealed file.
        agents: names of the agents, to add or remove some; (): those of the file.
        graph: takes the place of the file's graph.
        days: days from now until the file expires; None: those of the draft, or 90.

    Raises:
        UserError: a request is missing or wrong, an edge has no end that can be dialled, or a certificate expires
            before the file would; the file stays as it is.
    """
    organiser = keys.Organiser.load(key_of_organiser(path))
    before: file.Signed | None = None
    if file.is_sealed(path):
        before = file.read_signed(path)
        if before.organiser != organiser.public:
            raise UserError(f"key: {path} was sealed with another key than {key_of_organiser(path)}.")
        plan = file.Draft(
            name=before.name,
            agents=tuple(agents) or tuple(member.name for member in before.agents),
            graph=graph or before.graph,
            limits=before.limits,
            terms=before.terms,
        )
    else:
        draft = file.read_draft(path)
        changes = {"agents": tuple(agents) or draft.agents, "graph": graph or draft.graph}
        plan = file.Draft.model_validate({**draft.model_dump(), **changes})
    config = plan.terms.config(len(plan.agents), "ring")
    terms.refuse(config)  # the draft may have been changed with an editor
    members = _members(plan.agents, requests, {} if before is None else {m.name: m for m in before.agents})
    schedule = _schedule(plan.graph, plan.agents, config)
    expires = (datetime.now(UTC) + timedelta(days=days or plan.days)).replace(microsecond=0)
    _check_certificates(members, expires)
    folder = base_model.model_folder(config.task)
    try:
        signed = file.Signed(
            name=plan.name,
            version=1 if before is None else before.version + 1,
            expires=expires,
            organiser=organiser.public,
            software=_software(),
            agents=tuple(members),
            graph=plan.graph,
            weights=[schedule.at(k).weights.tolist() for k in range(schedule.period or 1)],
            limits=plan.limits,
            terms=plan.terms,
            base={} if folder is None else base_model.tensors(folder),
            tokenizer={} if folder is None else base_model.tokenizer(folder),
        )
    except ValidationError as error:
        raise UserError(explain(file.Signed, error)) from error
    dialling.check_dialling(signed.union(), plan.agents, [member.address is not None for member in members])
    file.write(file.seal(signed, organiser), path)
    return signed


def _members(names: Sequence[str], requests: Sequence[Path], before: dict[str, file.Member]) -> list[file.Member]:
    found: dict[str, file.Member] = {}
    for path in requests:
        content = file.read(path)
        if set(content) != {"request"}:
            raise UserError(f"request: {path} is no request; a site makes it with `decaf federation request`.")
        member: file.Member = file.validated(file.Member, content["request"], path)
        if member.name not in names:
            raise UserError(f"request: {path} is of {member.name}, who is not an agent; they are {', '.join(names)}.")
        if member.name in found:
            raise UserError(f"request: two requests of {member.name}; give the newer one.")
        found[member.name] = member
    missing = [name for name in names if name not in found and name not in before]
    if missing:
        raise UserError(
            f"request: none of {', '.join(missing)}; ask for NAME.request, made with `decaf federation request`."
        )
    return [found.get(name) or before[name] for name in names]


def _check_certificates(members: Sequence[file.Member], expires: datetime) -> None:
    for member in members:
        ends = keys.read_certificate(member.certificate).expires
        if ends < expires:
            raise UserError(
                f"request: the certificate of {member.name} ends at {ends:%Y-%m-%d %H:%M} UTC, before the file would "
                f"({expires:%Y-%m-%d %H:%M} UTC); ask {member.name} for a new one, or give fewer --days."
            )


def _schedule(graph: str, names: Sequence[str], config: RunConfig) -> graphs.Schedule:
    """The graph of every exchange; UserError if it cannot work in a federation."""
    import networkx as nx

    edges = dialling.edges_of(graph, names)
    if edges is not None:
        drawn = nx.Graph(edges)
        drawn.add_nodes_from(range(len(names)))
        schedule = graphs.as_schedule(graphs.from_networkx(drawn, graph))
    else:
        schedule = graphs.as_schedule(graphs.parse(graph, len(names), config.seed))
    try:
        _refuse_schedule(schedule, graph, config)
    except UserError as error:
        raise UserError(f"{error} In a federation use {terms.GOOD}.") from error
    return schedule


def _refuse_schedule(schedule: graphs.Schedule, graph: str, config: RunConfig) -> None:
    """Raises UserError for what agents that talk to their neighbours alone cannot do."""
    steps = config.gossip_steps
    assert isinstance(steps, int)
    refuse_alone(algorithms.make(config.algorithm.name, **config.algorithm.options()), schedule, steps)
    if schedule.period is None:
        raise UserError(f"graph: {graph} is drawn anew in every round and has no period; use one that repeats.")
    for k in range(schedule.period):
        if not np.array_equal(schedule.at(k).weights, schedule.at(k).weights.T):
            raise UserError(f"graph: {graph} has edges in one direction; a connection has two ends that both send.")


def _software() -> tuple[str, str]:
    """The range of versions that understand this one, (first, first that does not): only the last number differs."""
    here = Version(installed("decaf-lora"))
    return str(here), f"{here.major}.{here.minor + 1}"


def refuse_other_software(signed: file.Signed) -> None:
    """Raises UserError if this version of decaf-lora is not one that the file was made for."""
    first, below = signed.software
    here = installed("decaf-lora")
    try:
        fits = Version(first) <= Version(here) < Version(below)
    except InvalidVersion as error:
        raise UserError(f"software: {error}; ask the organiser for a new file.") from error
    if not fits:
        raise UserError(
            f"software: the file is for decaf-lora from {first}, below {below}, and this is {here}; "
            f"pip install 'decaf-lora[mesh]>={first},<{below}'."
        )

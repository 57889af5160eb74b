"""What have the sites agreed on? The federation file: a draft, or signed by its organiser.

The signature is Ed25519 over the canonical JSON (sorted keys, no spaces, UTF-8) of everything under `signed`, so the
layout of the file may change, but not its content. Two agents compare the SHA-256 of that JSON when they meet.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from decaf_lora.config import explain
from decaf_lora.errors import UserError, unknown
from decaf_lora.federation import keys
from decaf_lora.federation.terms import Terms
from decaf_lora.graphs import Graph, Schedule, from_matrix, metropolis
from decaf_lora.yaml_file import read_yaml, write_yaml

MOST_BYTES = 16 * 2**20
"""Largest size of a federation file, in bytes."""

_VERSION = 8
"""Bytes of a version in `Signed.facts`."""

MOST_AGENTS = 1000
"""Largest number of agents of a federation."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Limits(_Frozen):
    """How long an agent waits."""

    patience: float | None = Field(None, gt=0, le=10**9)
    """Seconds without progress after which an exchange goes on without a neighbour. None: three times the median
    duration of the agent's own rounds, at least 60."""
    give_up: float = Field(86400, gt=0, le=10**9)
    """Seconds without an answer from any neighbour after which an agent writes what it has, and exits with code 3."""


class Member(_Frozen):
    """An agent, as the others know it."""

    name: str
    address: str | None
    """host:port where the others reach it; None: it only dials."""
    certificate: str
    """PEM, self-signed: the only one that counts for this name."""

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        return keys.check_name(value)

    @field_validator("address")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            host_port(value)
        return value

    @model_validator(mode="after")
    def _own_certificate(self) -> Self:
        said = keys.read_certificate(self.certificate, f"certificate of {self.name}").name
        if said != self.name:
            raise ValueError(f"the certificate of {self.name} is for {said}; ask {self.name} for its request")
        return self


def host_port(address: str) -> tuple[str, int]:
    """Host and port of host:port or [IPv6]:port; UserError for another text."""
    host, colon, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    good = colon and bare and (":" not in bare or host == f"[{bare}]") and not set(bare) & set("/ @\t")
    if not good or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"address: {address!r} is not host:port, as in alice.example.org:7447.")
    return bare, int(port)


class Draft(_Frozen):
    """What the organiser plans; nothing is signed yet."""

    name: str
    """Name of the federation."""
    agents: tuple[str, ...] = Field(min_length=2, max_length=MOST_AGENTS)
    """Names, in the order of their numbers."""
    graph: str
    """As `decaf graph` knows it."""
    days: float = Field(90, gt=0, le=36_500)
    """Days from sealing until the file expires."""
    limits: Limits = Limits()
    terms: Terms

    @model_validator(mode="after")
    def _names(self) -> Self:
        keys.check_name(self.name)
        _distinct([keys.check_name(name, "agents") for name in self.agents])
        return self


class Signed(_Frozen):
    """What the organiser has signed. Every agent follows it."""

    format: Literal[1] = 1
    name: str
    """Name of the federation."""
    version: int = Field(ge=1, lt=2**63)
    """Number of this sealed file, from 1. An agent accepts no file older than the newest that it has seen."""
    expires: datetime
    """When the file stops being valid, UTC."""
    organiser: str = Field(pattern="^[0-9a-f]{64}$")
    """The Ed25519 public key that the signature is checked with."""
    software: tuple[str, str]
    """Versions of decaf-lora that understand each other: from the first on, below the second."""
    agents: tuple[Member, ...] = Field(min_length=2, max_length=MOST_AGENTS)
    """The agents, in the order of their numbers."""
    graph: str
    """Name of the graph, for people; `weights` is what counts."""
    weights: tuple[tuple[tuple[float, ...], ...], ...] = Field(min_length=1)
    """(T, N, N): the mixing matrices of a period, one for each exchange."""
    limits: Limits
    tells: tuple[Literal["round"], ...] = ("round",)
    """What agents tell each other beside their messages."""
    terms: Terms
    base: dict[str, str]
    """Tensor of the base model -> SHA-256 of its type, shape and bytes as stored in safetensors."""
    tokenizer: dict[str, str]
    """File of the tokenizer -> SHA-256 of its bytes."""

    @field_validator("expires")
    @classmethod
    def _utc(cls, value: datetime) -> datetime:
        if value.utcoffset() is None or value.microsecond:
            raise ValueError("must be a time in UTC, to the second, as in 2030-01-31T12:00:00Z")
        return value.astimezone(UTC)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys.check_name(self.name)
        _distinct([member.name for member in self.agents])
        if len({member.certificate for member in self.agents}) < len(self.agents):
            raise ValueError("two agents have the same certificate")
        if any(schedule.num_agents != len(self.agents) for schedule in [self.schedule()]):
            raise ValueError(f"the weights are not for {len(self.agents)} agents")
        return self

    def schedule(self) -> Schedule:
        """The graph of every exchange."""
        return Schedule.cycle([from_matrix(w, self.graph, connected=False) for w in self.weights], self.graph)

    def union(self) -> Graph:
        """The graph with an edge wherever two agents exchange at any time."""

        return metropolis(
            sum(abs(graph.weights) for graph in map(self.schedule().at, range(len(self.weights)))), self.graph
        )

    def number(self, name: str) -> int:
        """The number of the agent called `name`; UserError suggests the nearest."""
        names = [member.name for member in self.agents]
        if name not in names:
            raise unknown("name", name, names)
        return names.index(name)

    def neighbours(self, agent: int) -> list[int]:
        """Numbers of the agents that `agent` exchanges with at any time, ascending."""
        return self.union().neighbours(agent)

    def values(self) -> dict[str, Any]:
        """The signed part in JSON's types."""
        return self.model_dump(mode="json")

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, as hexadecimal digits: equal if two agents follow the same file."""
        return hashlib.sha256(canonical(self.values())).hexdigest()

    def facts(self) -> bytes:
        """What two agents must agree on, for their hello: the version and the digest."""
        return self.version.to_bytes(_VERSION, "big") + bytes.fromhex(self.digest())

    def differs(self, facts: bytes) -> str:
        """What is different in a neighbour's `facts`, in words."""
        theirs = int.from_bytes(facts[:_VERSION], "big")
        if theirs == self.version:
            return f"it follows another version {theirs} of the federation file: one of the two is not the organiser's"
        older = "it" if theirs < self.version else "this agent"
        return (
            f"it follows version {theirs} of the federation file, this agent version {self.version}: start {older} "
            f"again with version {max(theirs, self.version)}"
        )


def _distinct(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two agents are called {name}; each needs a name of its own")


def canonical(values: Any) -> bytes:
    """JSON with sorted keys, no spaces and no NaN, as UTF-8: one text for one content."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


# On disk


def seal(signed: Signed, organiser: keys.Organiser) -> dict[str, Any]:
    """The content of a sealed file."""
    assert signed.organiser == organiser.public
    values = signed.values()
    return {"signed": values, "signature": organiser.sign(canonical(values))}


def read_draft(path: Path) -> Draft:
    """The draft in a file; UserError names the field."""
    content = read(path)
    if set(content) != {"draft"}:
        raise UserError(f"federation: {path} is not a draft; `decaf federation init` makes one.")
    return validated(Draft, content["draft"], path)


def read_signed(path: Path) -> Signed:
    """The signed part of a sealed file. Its signature is checked before anything else is read from it.

    `trust.accept` checks that the organiser is the right one, and the file new enough. `refuse_expired` checks that the
    file is still valid.

    Raises:
        UserError: the file is not sealed, was altered, or was made by another version of decaf-lora.
    """
    content = read(path)
    if "draft" in content:
        raise UserError(f"federation: {path} is a draft; the organiser seals it with `decaf federation seal`.")
    signed, signature = content.get("signed"), content.get("signature")
    if set(content) != {"signed", "signature"} or not isinstance(signed, dict) or not isinstance(signature, str):
        raise UserError(f"federation: {path} is not a federation file.")
    try:
        message = canonical(signed)
    except (TypeError, ValueError) as error:
        raise UserError(f"federation: {path} has been altered; ask the organiser for it anew.") from error
    if not keys.signed_by(str(signed.get("organiser")), signature, message):
        raise UserError(f"federation: {path} has been altered after it was signed; ask the organiser for it anew.")
    made = validated(Signed, signed, path)
    if canonical(made.values()) != message:
        raise UserError(f"federation: {path} was sealed by another version of decaf-lora; install the organiser's.")
    return made


def is_sealed(path: Path) -> bool:
    """Whether the file says that it is sealed."""
    return "signed" in read(path)


def refuse_expired(signed: Signed, now: datetime | None = None) -> None:
    """Raises UserError if the file is no longer valid by this machine's clock (or at `now`)."""
    now = now or datetime.now(UTC)
    if now > signed.expires:
        raise UserError(
            f"federation: the file expired at {signed.expires:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M} UTC; ask the organiser for a new version, or set the clock."
        )


def validated(kind: type[Any], values: Any, path: Path) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path.name}: {explain(kind, error)}") from error


def read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"federation: cannot read {path} ({error.strerror}).") from error
    if len(text) > MOST_BYTES:
        raise UserError(f"federation: {path} is larger than {MOST_BYTES // 2**20} MiB; it is no federation file.")
    try:
        # YAML's anchors and aliases would let a small file stand for an enormous one.
        aliases = any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"federation: {path} is not YAML ({' '.join(str(error).split())}).") from error
    if aliases:
        raise UserError(f"federation: {path} has YAML aliases (*name); write the values out.")
    content = read_yaml(path, "federation", MOST_BYTES)
    if not isinstance(content, dict):
        raise UserError(f"federation: {path} is not a federation file.")
    return content


def write(content: dict[str, Any], path: Path) -> None:
    """Writes a file at once or not at all; the content is `seal`'s, or {"draft": ...}."""
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(write_yaml(content), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"federation: cannot write {path} ({error.strerror}).") from error

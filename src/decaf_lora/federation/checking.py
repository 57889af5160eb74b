"""Is a site ready? A line for everything that could be wrong, with what to do about it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from decaf_lora.check import Finding, Verdict, look, rehearse
from decaf_lora.engines.links import Links, Neighbour, tls
from decaf_lora.engines.mesh.frames import Frame
from decaf_lora.engines.mesh.link import dialler
from decaf_lora.errors import UserError
from decaf_lora.federation import base_model, commands, file, keys, status, trust
from decaf_lora.federation.site import make_engine, make_run


def neighbours(signed: file.Signed, name: str) -> list[Neighbour]:
    """The other ends of an agent's edges."""
    listens = frozenset(member.name for member in signed.agents if member.address is not None)
    found = []
    for number in signed.neighbours(signed.number(name)):
        other = signed.agents[number]
        dials = dialler(name, other.name, listens) == other.name
        found.append(Neighbour(other.name, other.certificate.encode(), other.address, number, dials))
    return found


def site(
    path: Path, name: str, *, told: str | None = None, key: Path | None = None, base: bool = True
) -> tuple[file.Signed, tls.Own]:
    """What an agent needs before it may connect: the file, accepted, and its own identity.

    `base`: whether to check the base model that the file names, too. The other arguments are those of `check`.

    Raises:
        UserError: the first thing that is wrong.
    """
    steps = _Steps(path, name, told, key)
    for check in (steps.signature, steps.version_and_trust, steps.clock, steps.software, steps.key):
        check()
    if base:
        steps.base()
    return steps.signed, steps.own


def check(
    path: Path,
    name: str,
    *,
    told: str | None = None,
    key: Path | None = None,
    local: Mapping[str, Any] | None = None,
    share: bool = False,
    bind: str | None = None,
    wait: float = 0.0,
    timeout: float = 5.0,
) -> Iterator[Finding]:
    """Checks everything in turn. A check that needs something that was found wrong is left out.

    Args:
        path: the federation file.
        name: of this site's agent.
        told: fingerprint of the organiser's key; needed the first time.
        key: file of this agent's key; NAME.key beside the federation file if unset.
        local: the site's own fields (`terms.Local`); if given, data, labels, one batch and cost are checked too.
        share: as of `site.Site`.
        bind: HOST:PORT to listen on while it waits; the port of the file on all addresses if unset.
        wait: seconds to listen and dial until all neighbours, who do the same, are up; 0: dial once, do not listen.
        timeout: seconds to wait for a neighbour's answer.
    """
    steps = _Steps(path, name, told, key)
    right = True
    for what, step in (
        ("signature", steps.signature),
        ("organiser", steps.version_and_trust),
        ("clock", steps.clock),
        ("software", steps.software),
        ("key", steps.key),
    ):
        found = look(what, step)
        yield found
        right &= found.verdict == "right"
        if what == "signature" and not right:
            return  # nothing else in the file can be trusted
    if right:
        yield from _ends_soon(steps)
    yield look("base model", steps.base)
    if local is not None:
        yield from _trains(steps.signed, steps.number, local, share)
    if not right:
        yield Finding("neighbours", "open", "not dialled before the rest is right.")
        return
    if wait > 0:
        yield from meet(steps.signed, steps.own, path, bind, wait)
        return
    for neighbour in neighbours(steps.signed, name):
        what = f"neighbour {neighbour.name}"
        if neighbour.dials:
            yield Finding(what, "right", f"{neighbour.name} dials this agent; --wait 60 at both ends tests it.")
            continue
        answer = tls.diagnose(steps.own, neighbour, steps.signed.version, timeout)
        verdict: Verdict = "right" if answer.kind == "up" else "open" if answer.kind == "not reached" else "wrong"
        yield Finding(what, verdict, answer.why)


SOON = timedelta(days=14)
"""A certificate or a file that ends within this time is odd."""
LINGER = 0.5
"""Seconds that an agent which has met all stays, so that the last it met has seen it too."""


def _ends_soon(steps: _Steps) -> Iterator[Finding]:
    certificate = keys.read_certificate(steps.signed.agents[steps.number].certificate)
    for what, until, remedy in (
        ("certificate", certificate.expires, "no connection is made with it after that; make a request with a new key"),
        ("file", steps.signed.expires, "no agent starts with it after that; ask the organiser for a new version"),
    ):
        left = until - datetime.now(UTC)
        if left < SOON:
            yield Finding(what, "odd", f"it ends in {left.days} days: {remedy}.")


def listening(signed: file.Signed, name: str, bind: str | None) -> str | None:
    """host:port to listen on; None if no neighbour dials this agent."""
    if not any(neighbour.dials for neighbour in neighbours(signed, name)):
        return None
    address = signed.agents[signed.number(name)].address
    assert address is not None
    return bind or f"0.0.0.0:{file.host_port(address)[1]}"


def meet(signed: file.Signed, own: tls.Own, path: Path, bind: str | None, wait: float) -> Iterator[Finding]:
    """Connects to all neighbours as an agent does, for at most `wait` seconds, and says how it went."""
    running = status.running(status.file_of(path, own.name))
    if running:  # a second connection would take the place of the agent's
        yield Finding("neighbours", "open", f"the agent is running (process {running}): see `decaf federation status`.")
        return
    others = neighbours(signed, own.name)
    links = Links(own, others, version=signed.version, listen=listening(signed, own.name, bind))
    met = _Met()
    try:
        links.start(met)
    except UserError as error:
        yield Finding("port", "wrong", str(error))
        return
    try:
        end = time.monotonic() + wait
        while time.monotonic() < end:
            if met.peers.issuperset(other.number for other in others):
                time.sleep(LINGER)
                break
            time.sleep(0.1)
        for other in others:
            what, up = f"neighbour {other.name}", other.number in met.peers
            why = "it has not dialled this agent: is it running, and does it reach the port?"
            if not other.dials or links.status(other.number).connections:
                why = links.status(other.number).why
            yield Finding(what, "right" if up else "open", f"{other.name} is up." if up else why)
    finally:
        links.stop()


class _Met:
    """Remembers who was up: a neighbour that checks as well may be done, and gone, before this end looks."""

    def __init__(self) -> None:
        self.peers: set[int] = set()

    def on_up(self, peer: int, connection: int) -> None:
        self.peers.add(peer)

    def on_down(self, peer: int, connection: int) -> None: ...

    def on_frame(self, peer: int, connection: int, frame: Frame) -> None: ...


def _trains(signed: file.Signed, number: int, local: Mapping[str, Any], share: bool) -> Iterator[Finding]:
    """Builds what the agent will run, and takes one batch through it; nothing is sent."""
    try:
        config = signed.terms.config(len(signed.agents), signed.graph, local)
    except UserError as error:
        yield Finding("data", "wrong", str(error))
        return
    yield from rehearse(
        lambda: make_run(signed, number, config, share, make_engine(signed, number, config)),
        config.model_copy(update={"graph": "ring", "partition": "iid"}),  # only for the memory of one agent
        "data",
        processes=len(signed.agents),
        more="the agent trains alone first, which takes as long again (--no-alone leaves it out)",
    )


class _Steps:
    """The checks, each after those that it needs. A check returns what it found, in words, or raises UserError."""

    def __init__(self, path: Path, name: str, told: str | None, key: Path | None) -> None:
        self._path, self._name, self._told = path, name, told
        self._key = key or path.with_name(f"{name}.key")
        self.signed: file.Signed
        self.own: tls.Own

    @property
    def number(self) -> int:
        return self.signed.number(self._name)

    def signature(self) -> str:
        self.signed = file.read_signed(self._path)
        number, of = self.number, len(self.signed.agents)
        return f"{self.signed.name}, version {self.signed.version}; {self._name} is agent {number} of {of}."

    def version_and_trust(self) -> str:
        # By the name of the agent, not of the key: a new key must not bring trust in older files back.
        trust.accept(self.signed, self._key.with_name(f"{self._name}.trust"), self._told)
        return f"{keys.fingerprint(self.signed.organiser)}, as told."

    def clock(self) -> str:
        file.refuse_expired(self.signed)
        now, until = datetime.now(UTC), self.signed.expires
        return f"{now:%Y-%m-%d %H:%M} UTC; the file is valid until {until:%Y-%m-%d %H:%M} UTC."

    def software(self) -> str:
        commands.refuse_other_software(self.signed)
        first, below = self.signed.software
        return f"decaf-lora from {first}, below {below}."

    def key(self) -> str:
        own = keys.load_identity(self._key)
        member = self.signed.agents[self.number]
        if tls.sha256(own.certificate) != tls.sha256(member.certificate.encode()):
            raise UserError(
                f"key: {self._key} is not the key whose certificate the file has for {self._name}; use that one, or "
                f"send the organiser the request of this one."
            )
        fault = tls.invalid(own.certificate, own.name)
        if fault:
            raise UserError(f"key: {fault}: set the clock, or make a new request and ask the organiser for a new file.")
        self.own = own
        expires = keys.read_certificate(member.certificate).expires
        return f"{self._key}, for its owner alone; certificate valid until {expires:%Y-%m-%d %H:%M} UTC."

    def base(self) -> str:
        signed = self.signed
        config = signed.terms.config(len(signed.agents), "ring")
        folder = base_model.model_folder(config.task)
        if folder is None:
            return "none: the task brings its own model."
        base_model.check_same("weights", base_model.tensors(folder), signed.base, folder)
        base_model.check_same("tokenizer", base_model.tokenizer(folder), signed.tokenizer, folder)
        return f"{len(signed.base)} tensors and {len(signed.tokenizer)} files of the tokenizer are the organiser's."

"""`decaf federation`: organisations agree on a run, find each other, and see how it goes."""

from __future__ import annotations

import dataclasses
import json as json_
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from decaf_lora.cli.agent import demo_command, with_local
from decaf_lora.cli.checking import show
from decaf_lora.cli.options import Shortening, check_options, checked, configured, parsed
from decaf_lora.config import RunConfig
from decaf_lora.errors import UserError, unix_only, unknown

DAYS = Field(gt=0, le=36_500)
SECONDS = Field(gt=0, le=10**9)
WAIT = Field(ge=0, le=10**9)


def federation_command(args: list[str]) -> int:
    """One of the commands of `decaf federation`."""
    if not args or args[0] in ("-h", "--help"):
        table = Table.grid(padding=(0, 3))
        for name, (who, _, summary) in _COMMANDS.items():
            table.add_row(f"  decaf federation {name}", who, summary)
        console = Console(highlight=False)
        console.print("Organisations that may not pool their data train one model together, without a server.\n")
        console.print(table)
        console.print("\nIn this order. Help of a command: decaf federation COMMAND --help")
        return 0
    unix_only("federation", "a federation")
    name, rest = args[0], args[1:]
    if name not in _COMMANDS:
        raise unknown("federation", name, _COMMANDS)
    return _COMMANDS[name][1](rest)


def _init(args: list[str]) -> int:
    own, rest = _split(args, ("recipe", "agents", "graph", "name", "days", "patience", "give-up"))

    @checked
    def init(
        file: Positional[Path],
        recipe: str,
        agents: str,
        graph: str = "ring",
        name: str | None = None,
        days: Annotated[float, DAYS] = 90.0,
        patience: Annotated[float | None, SECONDS] = None,
        give_up: Annotated[float, SECONDS] = 86400.0,
    ) -> tuple[Any, ...]:
        """Writes the draft of a federation file, and the organiser's key beside it. Other options are those of
        `decaf run RECIPE`, such as --rounds.

        Args:
            file: the federation file to write, .yaml.
            recipe: a recipe, or a YAML file: the run.
            agents: names of the agents, with commas: alice,bob,carol.
            graph: who talks to whom, as in `decaf graph`, or edges: alice-bob,bob-carol.
            name: name of the federation. Unset: the name of the file.
            days: days from sealing until the file expires.
            patience: seconds without progress after which a round goes on without a neighbour. Unset: three times the
                median duration of the agent's own rounds, at least 60.
            give_up: seconds without an answer from any neighbour after which an agent ends and writes what it has.
        """
        return file, recipe, agents, graph, name, days, patience, give_up

    path, recipe, agents, graph, name, days, patience, give_up = parsed(init, "decaf federation init", own)
    from decaf_lora.federation import commands, keys
    from decaf_lora.federation.file import Limits

    names = [part.strip() for part in agents.split(",")]
    config = configured(RunConfig, "federation init", [recipe, *rest], Shortening)[0]
    limits = Limits(patience=patience, give_up=give_up)
    draft = commands.init(path, config, names, graph, name=name, days=days, limits=limits)
    organiser = keys.Organiser.load(commands.key_of_organiser(path))
    _say(f"draft: {path} (change it with an editor until it is sealed)")
    _say(f"key: {commands.key_of_organiser(path)} (yours alone; who has it can sign in your place)")
    _say(f"fingerprint: {keys.fingerprint(organiser.public)} (tell it the sites by telephone)")
    _say(f"next: each of {', '.join(draft.agents)} runs `decaf federation request {path.name} --name NAME ...`")
    return 0


def _request(args: list[str]) -> int:
    @checked
    def request(
        file: Positional[Path],
        name: str,
        listen: str | None = None,
        dial_only: bool = False,
        key: Path | None = None,
        days: Annotated[float, DAYS] = 365.0,
        new: bool = False,
    ) -> tuple[Any, ...]:
        """Makes this site's key, which stays here, and its request, which goes to the organiser.

        Args:
            file: the draft, as the organiser has sent it.
            name: this site's agent.
            listen: HOST:PORT where the others reach this agent.
            dial_only: no other agent can reach this one; it dials them.
            key: file of the key; one that exists is used again. Unset: NAME.key beside the federation file.
            days: how long a new certificate is valid.
            new: the file does not name this site yet; the organiser will add it with `seal --agents`.
        """
        return file, name, listen, dial_only, key, days, new

    check_options(args, ["name", "listen", "dial-only", "key", "days", "new", "help"])
    path, name, listen, dial_only, key, days, new = parsed(request, "decaf federation request", args)
    if (listen is None) is not dial_only:
        raise UserError("listen: give --listen HOST:PORT, where the others reach this agent, or --dial-only.")
    from decaf_lora.federation import commands

    out, key = commands.request(path, name, listen, key=key, days=days, new=new)
    _say(f"key: {key} (never leaves this machine)")
    _say(f"request: {out} (send it to the organiser)")
    return 0


def _seal(args: list[str]) -> int:
    @checked
    def seal(
        file: Positional[Path],
        requests: Positional[tuple[Path, ...]] = (),
        agents: str = "",
        graph: str | None = None,
        days: Annotated[float | None, DAYS] = None,
    ) -> tuple[Any, ...]:
        """Signs the federation file: a draft as version 1, one that is sealed as its next version.

        Args:
            file: the federation file, with the organiser's key beside it.
            requests: the requests of the sites. A site that is in a sealed file already needs none.
            agents: names of the agents, if they change: alice,bob,dave.
            graph: the graph, if it is to be another than the file's.
            days: days from now until the file expires. Unset: those of the draft, or 90.
        """
        return file, requests, agents, graph, days

    check_options(args, ["agents", "graph", "days", "help"])
    path, requests, agents, graph, days = parsed(seal, "decaf federation seal", args)
    from decaf_lora.federation import commands, keys

    names = [part.strip() for part in agents.split(",")] if agents else []
    signed = commands.seal(path, requests, agents=names, graph=graph, days=days)
    _say(f"sealed: {path}, version {signed.version}, until {signed.expires:%Y-%m-%d %H:%M} UTC (send it to every site)")
    found = keys.fingerprint(signed.organiser)
    _say(f"fingerprint: {found} (the sites ask for it by telephone)")
    _say(f"next: each site runs `decaf federation check {path.name} --name NAME --trust {found}`")
    return 0


def _check(args: list[str]) -> int:
    from decaf_lora.federation import checking
    from decaf_lora.federation.terms import Local

    def check(
        file: Positional[Path],
        name: str,
        trust: str | None = None,
        key: Path | None = None,
        share: bool = False,
        wait: Annotated[float, WAIT] = 0.0,
        bind: str | None = None,
        timeout: Annotated[float, SECONDS] = 5.0,
        json: bool = False,
        local: Any = None,
    ) -> tuple[Any, ...]:
        """Looks whether this site is ready: signature, key, clock, base model, data, labels, one batch, cost, and
        neighbours. Exit code 2 if something is wrong.

        Args:
            file: the sealed federation file.
            name: this site's agent.
            trust: fingerprint of the organiser's key, told by telephone; needed the first time.
            key: file of this agent's key; NAME.key beside the federation file if unset.
            share: check only this agent's share of the data under --partition, as `decaf agent --share` holds it.
            wait: seconds to connect to the neighbours as an agent does, while they do the same; 0 dials them once.
            bind: HOST:PORT to listen on while waiting; the port of the file on all addresses if unset.
            timeout: seconds to wait for a neighbour's answer.
            json: print JSON.
        """
        return file, name, trust, key, share, wait, bind, timeout, json, local

    own = ("name", "trust", "key", "share", "wait", "bind", "timeout", "json", "help")
    values = with_local(check, "decaf federation check", args, own, Local)
    path, name, told, key, share, wait, bind, timeout, as_json, local = values
    found = checking.check(
        path, name, told=told, key=key, local=local, share=share, bind=bind, wait=wait, timeout=timeout
    )
    return show(found, as_json, f"Next: `decaf agent {path} --name {name} --out runs/{name} ...`.")


def _status(args: list[str]) -> int:
    def status(file: Positional[Path], name: str, json: bool = False) -> tuple[Path, str, bool]:
        """Shows what a running agent says of itself, each second anew.

        Args:
            file: the federation file.
            name: this site's agent.
            json: print JSON.
        """
        return file, name, json

    check_options(args, ["name", "json", "help"])
    path, name, as_json = parsed(status, "decaf federation status", args)
    from decaf_lora.federation import commands
    from decaf_lora.federation import status as statuses

    known = commands.agents_of(path)
    if name not in known:
        raise unknown("name", name, known)
    said = statuses.read(statuses.file_of(path, name))
    if as_json:
        print(json_.dumps(dataclasses.asdict(said), indent=2))
    else:
        Console(highlight=False).print(statuses.shown(said))
    return 0


def _split(args: list[str], names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Splits the arguments into the command's own (options `names`, help, positional ones) and the others."""
    own: list[str] = []
    rest: list[str] = []
    into = own
    for argument in args:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("_", "-")
            into = own if name in (*names, "help") else rest
        into.append(argument)
    return own, rest


def _say(line: str) -> None:
    Console(highlight=False).print(line, markup=False, soft_wrap=True)


_COMMANDS: dict[str, tuple[str, Callable[[list[str]], int], str]] = {
    "init": ("organiser", _init, "write a draft, and the organiser's key"),
    "request": ("each site", _request, "make this site's key, and the request that the organiser needs"),
    "seal": ("organiser", _seal, "sign the file, with all sites in it"),
    "check": ("each site", _check, "look whether this site is ready, and what to do if not"),
    "status": ("each site", _status, "show how this site's agent is doing"),
    "demo": ("", demo_command, "five agents on this machine, one of which is killed and comes back"),
}

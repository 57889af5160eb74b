"""`decaf agent`: a site's agent of a federation; and `decaf federation demo`, five of them on one machine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field
from rich.console import Console
from tyro.conf import Positional, arg

from decaf_lora.cli.options import check_options, checked, parsed
from decaf_lora.errors import unix_only


def agent_command(args: list[str]) -> int:
    """`decaf agent`."""
    if not args or args[0] in ("-h", "--help"):
        args = ["--help"]
    else:
        unix_only("agent", "a federation")
    from decaf_lora.federation.terms import Local

    def agent(
        file: Positional[Path],
        name: str,
        out: Path,
        trust: str | None = None,
        key: Path | None = None,
        bind: str | None = None,
        share: bool = False,
        alone: bool = True,
        local: Any = None,
    ) -> tuple[Any, ...]:
        """Runs this site's agent of a federation. Started again with the same --out, it goes on from its checkpoint.
        The exit code is 3 if no neighbour answered within the time that the federation file gives.

        Args:
            file: the sealed federation file.
            name: this site's agent.
            out: folder for records, checkpoints, report and, at the end, the adapter.
            trust: fingerprint of the organiser's key, told by telephone; needed the first time.
            key: file of this agent's key. Unset: NAME.key beside the federation file.
            bind: HOST:PORT to listen on. Unset: the port that the file names, on all addresses.
            share: hold only this agent's share of the data under --partition. For sites that all have the same file.
            alone: before the federation, train as many rounds on this site's data alone, to compare.
        """
        return file, name, out, trust, key, bind, share, alone, local

    own = ("name", "out", "trust", "key", "bind", "share", "alone", "help")
    path, name, out, told, key, bind, share, alone, local = with_local(agent, "decaf agent", args, own, Local)
    from decaf_lora.federation import agent as agents
    from decaf_lora.federation.site import Site

    site = Site(path, name, out, told=told, key=key, local=local, bind=bind, share=share, alone=alone)
    console = Console(stderr=True, highlight=False)
    with _screen(console) as watch:
        code = agents.run(site, watch)
    if code == agents.DONE:
        print(f"adapter: {out / 'adapter'}")
    elif code == agents.GAVE_UP:
        console.print(f"decaf: gave up; what there is lies in {out}.", markup=False, soft_wrap=True)
    else:
        console.print(f"decaf: stopped; started again with the same --out {out} it goes on.", soft_wrap=True)
    return code


@contextlib.contextmanager
def _screen(console: Console) -> Iterator[Callable[[Any], None]]:
    """Shows an agent's status: live on a terminal, a line for each state and evaluated round elsewhere."""
    from rich.live import Live

    from decaf_lora.federation import status

    if console.is_terminal:
        newest: list[Any] = []

        def drawn() -> Any:
            return status.shown(newest[-1]) if newest else ""

        with Live(console=console, get_renderable=drawn, refresh_per_second=1):
            yield lambda said: newest.__setitem__(slice(None), [said])
        return
    told: list[Any] = [None]

    def watch(said: Any) -> None:
        if (said.state, said.score) == told[0] or said.state == "failed":  # the error is a line of its own
            return
        told[0] = (said.state, said.score)
        up = sum(edge.up for edge in said.neighbours)
        score = "" if said.score is None else f", score {said.score:.3f}"
        line = f"{said.name}: {said.state}, round {said.round} of {said.rounds}{score}"
        line += f", {up} of {len(said.neighbours)} neighbours up" + (f"; {said.said}" if said.said else "")
        console.print(line, markup=False, soft_wrap=True)

    yield watch


def demo_command(args: list[str]) -> int:
    """`decaf federation demo`."""

    @checked
    def demo(out: Path, rounds: Annotated[int, Field(ge=10)] = 30) -> tuple[Path, int]:
        """Five agents on this machine, each a process of its own, over TLS; one is killed and comes back. Exit code 0
        only if all five end well.

        Args:
            out: a new folder.
            rounds: of the federation.
        """
        return out, rounds

    check_options(args, ["out", "rounds", "help"])
    out, rounds = parsed(demo, "decaf federation demo", args)
    from rich.live import Live

    from decaf_lora.federation import demo as demos

    console = Console(highlight=False)
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:  # no thread: the agents are forks of this process
            code = demos.run(out, rounds=rounds, show=lambda table: live.update(table, refresh=True))
    else:
        code = demos.run(out, rounds=rounds)
        console.print((out / "report.md").read_text(), markup=False, soft_wrap=True)
    print(f"report: {out / 'report.md'}")
    return code


def with_local(
    function: Callable[..., tuple[Any, ...]], prog: str, args: list[str], own: tuple[str, ...], local: type[BaseModel]
) -> tuple[Any, ...]:
    """Parses `args` for `function`, with the fields of `local` as further options.

    Args:
        function: the command; its last parameter is `local`.
        prog: how help calls the command.
        args: the command line.
        own: the command's own options.
        local: the model whose fields are further options.

    Returns:
        What `function` returns, with the fields of `local` that were given, as a dict, in the last place.
    """
    check_options(args, [*own, *local.model_fields])
    columns: list[tuple[str, Any, Any]] = [
        (name, Annotated[field.annotation, arg(help=field.description)], dataclasses.field(default=field.default))
        for name, field in local.model_fields.items()
    ]
    site = dataclasses.make_dataclass("Site", columns, frozen=True)
    function.__annotations__["local"] = Annotated[site, arg(name="")]
    assert function.__defaults__ is not None
    function.__defaults__ = (*function.__defaults__[:-1], site())
    *values, chosen = parsed(checked(function), prog, args)
    given = {name: value for name, value in vars(chosen).items() if value != local.model_fields[name].default}
    return *values, given

"""A federation under test: each site with a folder of its own, as on its own machine, and faults by number of round."""

import contextlib
import os
import shutil
import socket
import time

from decaf_lora.errors import UserError
from decaf_lora.federation import commands, file, keys, status
from endpoints import until
from ledger import Ledger
from sites import WAIT, Sites

PORT = 7447


class DiedError(Exception):
    """An agent ended, or stood still, where the test needs it."""


class Federation:
    """Sites of one federation, with one exchange a round.

    Args:
        folder: an empty one.
        config: of the run.
        names: of the agents.
        program: a `sites.Program`.
        network: a `network.Network` of machines with these names; None: all on this machine's loopback.
        dial_only: names of the agents that nobody can dial.
        addresses: name -> where the others reach an agent, if not at its machine.
        through: name -> a function from the agent's port to that of a proxy, through which the others reach it.
        graph: edges between names, or the name of a graph.
        limits: patience and when to give up.
        options: further options of every `decaf agent`.
    """

    def __init__(
        self,
        folder,
        config,
        names,
        program,
        *,
        network=None,
        dial_only=(),
        addresses=None,
        through=None,
        graph="ring",
        limits=None,
        options=(),
    ):
        self.folder, self.names, self.network, self.options = folder, tuple(names), network, tuple(options)
        self.rounds = config.rounds
        self.sites = {name: Sites(program, folder / name) for name in names}
        self.organiser = folder / "organiser"
        self.organiser.mkdir(parents=True)
        self.variables = {name: [] for name in names}
        self.processes = {}
        """Name -> number of the agent's process."""
        self._running = set()
        fed = self.organiser / "fed.yaml"
        commands.init(fed, config, names, graph, limits=limits or file.Limits(patience=30, give_up=120))
        with contextlib.ExitStack() as taken:
            self.ports = dict.fromkeys(names, PORT) if network else {name: _free_port(taken) for name in names}
        at = {name: f"{network.address(name) if network else '127.0.0.1'}:{self.ports[name]}" for name in names}
        at.update(addresses or {})
        at.update({name: f"127.0.0.1:{proxy(self.ports[name])}" for name, proxy in (through or {}).items()})
        requests = []
        for name in names:  # each at its own site; only the request leaves it
            (folder / name).mkdir()
            shutil.copy(fed, folder / name / "fed.yaml")
            address = None if name in dial_only else at[name]
            requests.append(commands.request(folder / name / "fed.yaml", name, address)[0])
        self.told = keys.fingerprint(commands.seal(fed, requests).organiser)
        for name in names:
            shutil.copy(fed, folder / name / "fed.yaml")

    def start(self, *names):
        """Starts agents: all of them, or those that are named."""
        for name in names or self.names:
            (self.folder / name / f"{name}.held").unlink(missing_ok=True)  # of a former start
            options = ["--trust", self.told, "--share", "--no-alone", *self.options, *self.variables[name]]
            options += ["--bind", f"{'0.0.0.0' if self.network else '127.0.0.1'}:{self.ports[name]}"]
            if self.network:
                options.append(f"@NAMESPACE={self.network.namespace(name)}")
            self.processes[name] = int(self.sites[name]("start", name, *options))
            self._running.add(name)

    def kill(self, *names):
        """SIGKILL, to all of them before any is waited for."""
        for name in names:
            self.sites[name]("kill", name)
            self._running.discard(name)
        for name in names:
            self.sites[name].wait(name)

    def stop(self, name):
        self.sites[name]("stop", name)

    def go_on(self, name):
        self.sites[name]("continue", name)

    def hold(self, name, steps):
        """The agent takes no step after its first `steps` in a process. Its task must be that of held.py."""
        self.sites[name].brake(name, steps)

    def held(self, *names):
        """Waits until the brake holds these agents."""
        until(lambda: all(self.sites[name].held(name) for name in names), f"holding {', '.join(names)}")

    def release(self, *names):
        for name in names:
            self.sites[name].release(name)

    def joined(self, *names):
        """Waits until these agents say, from now on, that all their links are up."""
        now = time.time()

        def whole(name):
            try:
                said = self.said(name)
            except UserError:
                return False
            return said.written > now and said.process == self.processes[name] and all(e.up for e in said.neighbours)

        until(lambda: all(map(whole, names)), "all links")

    def out(self, name):
        return self.folder / name / name

    def said(self, name):
        return status.read(status.file_of(self.folder / name / "fed.yaml", name))

    def round(self, name):
        """Rounds that an agent has done, by its records; 0 before there are any."""
        try:
            with (self.out(name) / "records.jsonl").open("rb") as lines:
                lines.seek(max(lines.seek(0, os.SEEK_END) - 16384, 0))
                whole = lines.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        except OSError:
            return 0
        return int(whole.partition(b'"round": ')[2].partition(b",")[0] or 0)

    def reach(self, round_, *names, limit=WAIT):
        """Waits until these agents have done so many rounds; returns their rounds."""
        end = time.monotonic() + limit
        while min(now := [self.round(name) for name in names]) < round_:
            for name in names:
                if name not in self.running() and self.round(name) < round_:
                    raise DiedError(
                        f"{name} has ended in round {self.round(name)}: {self.sites[name].log(name)[-500:]}"
                    )
            if time.monotonic() > end:
                raise DiedError(f"rounds {now} of {', '.join(names)} after {limit:.0f} s, not {round_}")
            time.sleep(0.02)
        return now

    def running(self):
        """Names of the agents whose processes run."""
        return [name for name in self.names if name in self._running and self.sites[name]("alive", name) == "yes"]

    def end(self, *names):
        """Waits for agents, all that run or those that are named; name -> exit code."""
        names = names or tuple(name for name in self.names if name in self._running)
        return {name: self.sites[name].wait(name)[name] for name in names}

    def ledger(self):
        return Ledger({name: self.out(name) for name in self.names})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Ends what still runs."""
        for name in self._running:
            self.sites[name]("kill", name)


def _free_port(stack):
    return stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]

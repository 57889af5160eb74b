"""A federation under test: each site with a folder of its own, as on its own machine, and faults by number of round."""

import contextlib
import os
import shutil
import socket
import time

from decaf_lora.federation import commands, file, keys, status
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
        self._running = set()
        fed = self.organiser / "fed.yaml"
        commands.init(fed, config, names, graph, limits=limits or file.Limits(patience=30, give_up=120))
        with contextlib.ExitStack() as taken:
            self.ports = dict.fromkeys(names, PORT) if network else {name: _free_port(taken) for name in names}
        at = {name: f"{network.address(name) if network else '127.0.0.1'}:{self.ports[name]}" for name in names}
        at.update(addresses or {})
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
            options = ["--trust", self.told, "--share", "--no-alone", *self.options, *self.variables[name]]
            options += ["--bind", f"{'0.0.0.0' if self.network else '127.0.0.1'}:{self.ports[name]}"]
            if self.network:
                options.append(f"@NAMESPACE={self.network.namespace(name)}")
            self.sites[name]("start", name, *options)
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

    def hold(self, name):
        """From its next step on the agent stands still, its process alive. Its task must be one of `paced`."""
        self._gate(name).touch()

    def release(self, name):
        self._gate(name).unlink()

    def _gate(self, name):
        variable = f"@HOLD={self.folder / name / 'hold'}"
        assert variable in self.variables[name], "say `may_hold` before the start"
        return self.folder / name / "hold"

    def may_hold(self, name):
        """Lets `hold` work for an agent that starts from now on."""
        self.variables[name].append(f"@HOLD={self.folder / name / 'hold'}")

    def out(self, name):
        return self.folder / name / name

    def said(self, name):
        return status.read(status.file_of(self.folder / name / "fed.yaml", name))

    def round(self, name):
        """Rounds that an agent has done, by its records; 0 before there are any."""
        try:
            with (self.out(name) / "records.jsonl").open("rb") as lines:
                lines.seek(0, os.SEEK_END)
                lines.seek(max(lines.tell() - 16384, 0))
                whole = lines.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        except OSError:
            return 0
        return int(whole.partition(b'"round": ')[2].partition(b",")[0] or 0)

    def reach(self, round_, *names, limit=WAIT):
        """Waits until these agents have done so many rounds; returns their rounds."""
        end = time.monotonic() + limit
        while min(now := [self.round(name) for name in names]) < round_:
            for name in names:
                alive = name in self._running and self.sites[name]("alive", name) == "yes"
                if not alive and self.round(name) < round_:
                    raise DiedError(
                        f"{name} has ended in round {self.round(name)}: {self.sites[name].log(name)[-500:]}"
                    )
            if time.monotonic() > end:
                raise DiedError(f"rounds {now} of {', '.join(names)} after {limit:.0f} s, not {round_}")
            time.sleep(0.02)
        return now

    def end(self, *names):
        """Waits for agents, all that run or those that are named; name -> exit code."""
        names = names or tuple(name for name in self.names if name in self._running)
        return {name: self.sites[name].wait(name)[name] for name in names}

    def ledger(self):
        return Ledger({name: self.out(name) for name in self.names})

    def process(self, name):
        """Number of the agent's process."""
        return self.said(name).process

    def close(self):
        """Ends what still runs."""
        for name in self._running:
            self.sites[name]("kill", name)


def _free_port(stack):
    return stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]

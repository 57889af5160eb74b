"""What does a site run? One agent: it trains on its own data, exchanges with its neighbours, and says how it goes.

Its folder holds what the folder of any run holds, and at the end the adapter. Started again, it goes on from its
newest checkpoint.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from decaf_lora.config import RunConfig
from decaf_lora.engines.links import Links
from decaf_lora.engines.links.links import check_free
from decaf_lora.engines.links.tls import Own
from decaf_lora.engines.mesh.edge import Verdict
from decaf_lora.engines.mesh.engine import Mesh, StoppedError, WaitedOutError
from decaf_lora.errors import UserError
from decaf_lora.federation import checking, file, status
from decaf_lora.federation.site import Site, make_engine, make_run, train_alone
from decaf_lora.records import Record, replace_text
from decaf_lora.run import Run
from decaf_lora.runs import Folder, follow, identity
from decaf_lora.runs.events import Progress, Subscriber
from decaf_lora.runs.folder import check_folder, disk, started
from decaf_lora.runs.signals import stopping

DONE, GAVE_UP, STOPPED = 0, 3, 130
"""Exit codes: the run has ended; no neighbour answered for as long as the agent waits; a person asked it to stop."""


GRACE = 10.0
"""Seconds that an exchange under way may take after the agent was asked to stop."""

Watch = Callable[[status.AgentStatus], None]


def run(site: Site, watch: Watch = lambda _: None) -> int:
    """Runs the agent to its end, and returns the exit code.

    Args:
        site: what is run, and where.
        watch: called with the agent's status at every change of state and every round.

    Raises:
        UserError: something that `decaf federation check` would call wrong; nothing is written or sent then.
    """
    signed, own = checking.site(site.federation, site.name, told=site.told, key=site.key)
    local = {"checkpoint_every": 1, **site.local}
    config = signed.terms.config(len(signed.agents), signed.graph, local)
    again = started(site.out)
    check_folder(config, site.out, again)
    others = status.running(status.file_of(site.federation, site.name))
    if others:
        raise UserError(f"agent: {site.name} runs already (process {others}); stop it first.")
    listen = checking.listening(signed, site.name, site.bind)
    if listen is not None:
        check_free(listen)  # now, rather than after hours of training alone
    agent = _Agent(site, signed, own, config, watch)
    if again:
        agent.remember()
    with status.Teller(status.file_of(site.federation, site.name), agent.said, agent.refresh):
        try:
            return agent.run(again)
        except KeyboardInterrupt:
            agent.enter("stopped")
            return STOPPED
        except BaseException as error:
            agent.said.said = str(error)
            agent.enter("failed")
            raise


class _Agent(Subscriber):
    """One start of the agent."""

    def __init__(self, site: Site, signed: file.Signed, own: Own, config: RunConfig, watch: Watch) -> None:
        self.site, self.signed, self.own, self.config, self.watch = site, signed, own, config, watch
        self.number = signed.number(site.name)
        self.neighbours = checking.neighbours(signed, site.name)
        self.said = status.AgentStatus(signed.name, signed.version, site.name, os.getpid(), rounds=config.rounds)
        self.said.neighbours = [status.EdgeStatus(neighbour.name) for neighbour in self.neighbours]
        self._before: dict[str, tuple[int, int]] = {}
        self.links: Links | None = None
        self.engine: Mesh
        self._times = deque[float](maxlen=20)
        self._since = time.monotonic()
        self._resumed = False

    def run(self, again: bool) -> int:
        """Runs from the start to the end, and returns the exit code."""
        if not again and self.site.alone:
            self.enter("alone")
            score = train_alone(self.signed, self.number, self.config, self.site.share, self._told_alone)
            self.said.score_alone, self.said.round = score, 0
        self.enter("starting")
        with ExitStack() as leave:
            engine = make_engine(self.signed, self.number, self.config)
            run = make_run(self.signed, self.number, self.config, self.site.share, engine)
            leave.callback(run.close)
            folder = leave.enter_context(Folder(self.site.out, config=self.config, resume=again))
            folder.restore(run, folder.point(run.rounds))  # before the engine is connected
            self._resumed = run.round > 0
            self.said.round = run.round
            links = Links(
                self.own,
                self.neighbours,
                version=self.signed.version,
                listen=checking.listening(self.signed, self.site.name, self.site.bind),
            )
            templates = run.exchange.templates(run.adapter)
            engine.connect(*templates, links, self.signed.facts(), self.signed.differs)
            links.start(engine)  # after the model is built, which takes long and holds the interpreter
            leave.callback(links.stop)
            self.engine, self.links = engine, links

            leave.enter_context(stopping(lambda: self._stop(run)))
            code = self._train(run, folder)
            if code == DONE:  # the result is on disk before a neighbour is told so
                self.enter("serving")
                with suppress(StoppedError):
                    engine.finish()
            self.enter({DONE: "done", GAVE_UP: "gave up", STOPPED: "stopped"}[code])
            replace_text(self.site.out / "report.md", self._report())
            return code

    def _stop(self, run: Run) -> None:
        """Asks the agent to stop after the step, or the exchange, that is under way.

        An exchange under way is finished rather than repeated later, since a neighbour may have used it already.
        """
        run.stop()
        links = self.links
        up = links is not None and any(links.up(neighbour.number) for neighbour in self.neighbours)
        under_way = up and self.said.state != "serving"
        timer = threading.Timer(GRACE if under_way else 0.0, self.engine.stop)
        timer.daemon = True
        timer.start()

    def _train(self, run: Run, folder: Folder) -> int:
        code = DONE
        try:
            for _ in follow(run, folder, self, facts=self._facts(run)):
                pass
            if run.round < run.rounds:
                code = STOPPED
        except StoppedError:  # it was waiting for neighbours: the rounds since the last checkpoint will be repeated
            code = STOPPED
        except WaitedOutError as error:
            code = GAVE_UP
            missing = ", ".join(error.missing)
            self.said.said = f"nobody answered for {self.signed.limits.give_up:g} s: {missing}"
        if code != STOPPED:
            with disk(folder.path):
                run.save_adapter(folder.path / "adapter", self.number)
        return code

    # What it says

    def _told_alone(self, round_: int) -> None:
        self.said.round = round_

    def enter(self, state: str) -> None:
        """Begins another state, and tells of it."""
        self.refresh()
        self.said.state = state
        self.watch(self.said)

    def remember(self) -> None:
        """Takes over what the agent said of itself before it was started again."""
        try:
            before = status.read(status.file_of(self.site.federation, self.site.name))
        except UserError:
            return
        self.said.score_at_start, self.said.score_alone = before.score_at_start, before.score_alone
        old = {edge.name: edge for edge in before.neighbours}
        for edge in self.said.neighbours:
            if edge.name in old:
                was = old[edge.name]
                edge.missed, edge.cut_off = was.missed, was.cut_off
                edge.waited, edge.rejected = was.waited, was.rejected
                self._before[edge.name] = (was.sent, was.received)

    def step(self, progress: Progress) -> None:
        """Notes a local step."""
        self.said.state, self.said.loss = "training", progress.loss

    def record(self, record: Record) -> None:
        """Notes a round that is over."""
        said, now = self.said, time.monotonic()
        since, self._since = self._since, now
        passed = record.round - said.round
        said.round = record.round
        if record.scores:
            (said.score,) = record.scores
            if record.round == 0:
                said.score_at_start = said.score
        if record.round > 0:
            if self._resumed and said.returned is None:
                said.returned = record.round
            for edge in said.neighbours:
                number = str(self._number_of(edge.name))
                edge.missed += passed - (number in (record.weights or {}))
                whys = [those.get(number) for those in (record.missed or {}).values()]
                edge.cut_off += whys.count(Verdict.CUT_OFF.value)
                edge.waited += (record.waited or {}).get(number, 0.0)
                edge.rejected += sum(line.startswith(f"{edge.name}: ") for line in record.rejected or ())
            self._times.append((now - since) / max(1, passed))
            said.seconds_left = statistics.median(self._times) * (said.rounds - said.round)
        self.watch(said)

    def _number_of(self, name: str) -> int:
        return self.signed.number(name)

    def refresh(self) -> None:
        """Brings the status up to date with what the links and the protocol know."""
        if self.links is None:
            return
        for edge in self.said.neighbours:
            there = self.links.status(self._number_of(edge.name))
            edge.up, edge.since, edge.why = there.up, there.since, there.why
            sent, received = self._before.get(edge.name, (0, 0))
            edge.sent, edge.received = sent + there.sent, received + there.received
        self.said.waits_for = self.engine.status()["waits_for"]
        if self.said.state in ("training", "waiting"):
            self.said.state = "waiting" if self.said.waits_for else "training"

    def _facts(self, run: Run) -> dict[str, Any]:
        """What run.json says."""
        federation = {"name": self.signed.name, "version": self.signed.version, "agent": self.site.name}
        return {**identity.facts_of(run), "federation": federation}

    def _report(self) -> str:
        said = self.said
        lines = [f"# {said.name} in {said.federation}, version {said.version}", "", f"{said.state} after round "]
        lines[-1] += f"{said.round} of {said.rounds}." + (f" {said.said}." if said.said else "")
        lines += ["", "| score | |", "|---|---:|"]
        for what, score in (
            ("now", said.score),
            ("at the start", said.score_at_start),
            ("on its own data alone", said.score_alone),
        ):
            if score is not None:
                lines.append(f"| {what} | {score:.3f} |")
        titles = ("neighbour", "rounds missed", "cut off", "seconds waited", "messages refused", "bytes sent")
        lines += ["", f"| {' | '.join(titles)} | bytes received |", "|---|---:|---:|---:|---:|---:|---:|"]
        for edge in said.neighbours:
            numbers = (edge.missed, edge.cut_off, f"{edge.waited:.0f}", edge.rejected)
            traffic = (f"{edge.sent:,}", f"{edge.received:,}")
            lines.append("| " + " | ".join(map(str, (edge.name, *numbers, *traffic))) + " |")
        return "\n".join(lines) + "\n"

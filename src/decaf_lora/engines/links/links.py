"""Links: how do frames get from one machine to another? One bidirectional gRPC stream for each edge, over mutual TLS.

Of the two ends of an edge one dials again and again (`engines.mesh.link.dialler`), and the other listens. grpc.aio runs
in a thread with an event loop of its own. The owner's `Events` are called in a second thread, one call at a time. The
next frame of a neighbour is read only once the owner has dealt with the last one, so frames that the owner cannot take
yet wait at their sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc

import decaf_lora.engines.links.codec as codec
import decaf_lora.engines.links.tls as tls
from decaf_lora.engines.links.connection import Connection, Ended
from decaf_lora.engines.links.edge import Neighbour, Status, Timing
from decaf_lora.engines.mesh.frames import Frame
from decaf_lora.engines.mesh.link import Events
from decaf_lora.errors import UserError

LOG = logging.getLogger("decaf_lora.links")

_METHOD = "/decaf_lora.mesh.v1.Mesh/Talk"

_OPTIONS = [
    ("grpc.max_receive_message_length", codec.MOST_BYTES),
    ("grpc.max_send_message_length", codec.MOST_BYTES),
    ("grpc.max_metadata_size", 4096),
    ("grpc.max_concurrent_streams", 1),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),  # two agents on one port would share its connections
    ("grpc.use_local_subchannel_pool", 1),  # a new attempt inherits nothing of the last
    ("grpc.enable_http_proxy", 0),  # the address is the neighbour's; nothing is sent elsewhere
]


def check_free(address: str) -> None:
    """Raises UserError if host:port is taken, or not of this machine: in one line, where gRPC writes many."""
    host, _, port = address.rpartition(":")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host.strip("[]"), int(port)), family=family).close()
    except OSError as error:
        raise UserError(
            f"listen: cannot listen on {address} ({error.strerror}); name an address of this machine and a free port."
        ) from None


class Links:
    """The connections of an agent to its neighbours: the `engines.mesh.link.Link` that the protocol uses.

    Args:
        own: name, certificate and key of this agent.
        neighbours: the other ends of its edges.
        version: of the federation file, for messages to people.
        listen: host:port to bind; needed where a neighbour dials. Port 0 takes a free one (see `port`).
        timing: when a neighbour is lost, and when it is tried again.
        most_queued: bytes that may wait for a neighbour. A neighbour that lets more wait is cut off.
    """

    def __init__(
        self,
        own: tls.Own,
        neighbours: Sequence[Neighbour],
        *,
        version: int = 1,
        listen: str | None = None,
        timing: Timing | None = None,
        most_queued: int = 512 * 2**20,
    ) -> None:
        self._own = own
        self._neighbours = {neighbour.number: neighbour for neighbour in neighbours}
        self._version = version
        self._listen = listen
        self._timing = timing or Timing()
        self._most_queued = most_queued
        self._events: Events
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="links-events")
        self._server: grpc.aio.Server | None = None
        self._dials: list[asyncio.Task[None]] = []
        self._asking: set[asyncio.Task[None]] = set()
        self._newest: dict[int, Connection] = {}
        self._up: dict[int, Connection] = {}
        self._counts: dict[int, int] = dict.fromkeys(self._neighbours, 0)
        self._not_before = dict.fromkeys(self._neighbours, 0.0)
        self._status = {number: Status(False, time.time(), "not yet connected") for number in self._neighbours}
        self._stopping = False
        self.port: int | None = None
        """The port that this agent listens on; None if it does not."""
        self.failure: BaseException | None = None
        """The first exception that a call of the owner's `Events` has raised: a bug, for the owner to raise again."""

    # For the owner

    def start(self, events: Events) -> None:
        """Starts to listen and to dial. `events` is called from now on.

        Raises:
            UserError: the address to listen on is taken, or none of this machine's.
        """
        self._events = events
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Sends what is queued and ends all connections. Once it returns, no event is called any more."""
        if self._stopping:
            return
        self._stopping = True
        if not self._thread.is_alive():
            self._loop.close()
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._owner.shutdown()

    def up(self, peer: int) -> bool:
        """Whether a connection to neighbour `peer` is up."""
        return peer in self._up

    def send(self, peer: int, frame: Frame) -> None:
        """Queues a frame on the newest connection to `peer`, without waiting; without a connection it is dropped.

        The frame's payload is kept, not copied, until it is sent.
        """
        connection = self._up.get(peer)
        if connection is not None:
            self._loop.call_soon_threadsafe(connection.put, frame)

    def close(self, peer: int, reason: str) -> None:
        """Ends the connection to `peer`, which broke a rule as `reason` says; `on_down` follows later."""
        connection = self._up.get(peer)
        if connection is not None:
            self._loop.call_soon_threadsafe(self._punish, connection, reason)

    def status(self, peer: int) -> Status:
        """The state of the edge to `peer`."""
        connection = self._up.get(peer)
        said = self._status[peer]
        if connection is None:
            return said
        return replace(said, sent=said.sent + connection.sent, received=said.received + connection.received)

    # In the loop's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _open(self) -> None:
        if self._listen is not None:
            self._server = grpc.aio.server(options=_OPTIONS)
            handler = grpc.stream_stream_rpc_method_handler(self._answer)
            service, _, method = _METHOD[1:].partition("/")
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
            dialled_by = [neighbour for neighbour in self._neighbours.values() if neighbour.dials]
            check_free(self._listen)
            try:
                self.port = self._server.add_secure_port(self._listen, tls.listening(self._own, dialled_by))
            except RuntimeError:
                raise UserError(f"listen: cannot listen on {self._listen}; name a free port.") from None
            await self._server.start()
        for neighbour in self._neighbours.values():
            if not neighbour.dials:
                self._dials.append(self._loop.create_task(self._dial(neighbour)))

    async def _close(self) -> None:
        open_ones = [connection for connection in self._newest.values() if not connection.over.is_set()]
        for connection in open_ones:
            if connection.heard:
                connection.finish()
            else:
                connection.end("this agent stops")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(each.over.wait() for each in open_ones)), self._timing.drain)
        for connection in open_ones:
            connection.end("this agent stops")
        tasks = [*self._dials, *self._asking]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(0.2)

    # The end that dials

    async def _dial(self, neighbour: Neighbour) -> None:
        """Connects to a neighbour again and again."""
        wait, told = self._timing.first_retry, ""
        while not self._stopping:
            connection = self._connection(neighbour)
            channel = grpc.aio.secure_channel(
                str(neighbour.address),
                tls.dialling(self._own, neighbour),
                options=[*_OPTIONS, ("grpc.ssl_target_name_override", neighbour.name)],
            )
            try:
                call = channel.stream_stream(_METHOD)(metadata=(("agent", self._own.name),))
                why = await self._carry(connection, call.read, call.write, call.done_writing)
            finally:
                await channel.close()
            if connection.heard:
                told = ""
                if time.monotonic() - connection.began > self._timing.last_retry:
                    wait = self._timing.first_retry
            elif why != told:  # a failure that was explained before needs no second diagnosis
                told = why
                asking = self._loop.create_task(self._explain(neighbour, why))
                self._asking.add(asking)
                asking.add_done_callback(self._asking.discard)
            # A random pause, so that neighbours that lost the same end do not all come back at one moment.
            pause = max(wait * random.uniform(0.5, 1), self._not_before[neighbour.number] - time.monotonic())
            await asyncio.sleep(pause)
            wait = min(2 * wait, self._timing.last_retry)

    async def _explain(self, neighbour: Neighbour, why: str) -> None:
        """Finds out why a neighbour cannot be reached, while it is dialled again, and notes the reason."""
        said = await asyncio.to_thread(tls.diagnose, self._own, neighbour, self._version)
        LOG.warning("%s", said.why if said.kind != "up" else f"{neighbour.name}: {why}")
        LOG.info("%s: %s", neighbour.name, why)
        self._tell(self._note, neighbour.number, why if said.kind == "up" else said.why)

    # The end that listens

    async def _answer(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """Serves a dialler that holds some neighbour's certificate, if the certificate is that of the claimed name."""
        claimed = dict(context.invocation_metadata() or ()).get("agent")
        neighbour = next((n for n in self._neighbours.values() if n.name == claimed and n.dials), None)
        if neighbour is None or tls.shown(context) != neighbour.pin:
            LOG.warning("refused %s, who claims to be %.64s", context.peer(), claimed)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "refused")
        elif self._stopping or time.monotonic() < self._not_before[neighbour.number]:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "later")
        else:

            async def close() -> None:
                raise Ended("this agent stops")  # leaving this method ends the stream

            # Not left to the first write: if the connection ends while that is under way, gRPC would send the metadata
            # again with the end, fail, and leave the dialler waiting.
            try:
                await context.send_initial_metadata(())
            except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
                return  # the dialler has gone
            await self._carry(self._connection(neighbour), context.read, context.write, close)

    # Both

    def _connection(self, neighbour: Neighbour) -> Connection:
        peer = neighbour.number
        self._counts[peer] += 1
        return Connection(peer, self._counts[peer], self._timing.lost, self._timing.ping, self._most_queued)

    async def _carry(
        self,
        connection: Connection,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[bytes], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
    ) -> str:
        """Carries frames until the connection is over; returns why it ended. It supersedes the connection before."""
        before = self._newest.get(connection.peer)
        self._newest[connection.peer] = connection
        why = "the connection broke"
        if before is not None and not before.over.is_set():
            before.end("superseded by a new connection")
            self._tell(self._down, before, "superseded by a new connection")
        try:
            await connection.carry(read, write, close, self._deliver)
        except Ended as ended:
            why = str(ended)
        except codec.BadFrameError as error:
            why = f"it sent {error}"
            self._punish(connection, why)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError) as error:
            why = getattr(error, "details", lambda: None)() or repr(error)
        finally:
            connection.over.set()
            self._tell(self._down, connection, why)
        return why

    def _punish(self, connection: Connection, reason: str) -> None:
        """Ends a connection whose other end broke a rule; a new one is refused for a while."""
        self._not_before[connection.peer] = time.monotonic() + self._timing.last_retry
        LOG.warning("%s: %s", self._neighbours[connection.peer].name, reason)
        connection.end(reason)
        self._tell(self._count_bad, connection.peer)

    async def _deliver(self, connection: Connection, frame: Frame | None) -> None:
        if not connection.told_up:
            connection.told_up = True
            await self._loop.run_in_executor(self._owner, self._called, self._rise, connection)
        if frame is not None:
            await self._loop.run_in_executor(self._owner, self._called, self._hand_over, connection, frame)

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        """Queues a call for the owner's thread."""
        with contextlib.suppress(RuntimeError):  # it is shut down
            self._owner.submit(self._called, call, *arguments)

    # In the owner's thread

    def _called(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            LOG.exception("an event was not dealt with")
            self.failure = self.failure or error

    def _is_current(self, connection: Connection) -> bool:
        return self._newest.get(connection.peer) is connection and not connection.over.is_set()

    def _rise(self, connection: Connection) -> None:
        if self._is_current(connection):
            peer = connection.peer
            self._up[peer] = connection
            was = self._status[peer]
            self._status[peer] = replace(was, up=True, since=time.time(), connections=was.connections + 1)
            self._events.on_up(peer, connection.number)

    def _hand_over(self, connection: Connection, frame: Frame) -> None:
        if self._is_current(connection):
            self._events.on_frame(connection.peer, connection.number, frame)

    def _down(self, connection: Connection, why: str) -> None:
        peer = connection.peer
        if self._up.get(peer) is connection:
            del self._up[peer]
            was = self._status[peer]
            self._status[peer] = replace(
                was,
                up=False,
                since=time.time(),
                why=why,
                sent=was.sent + connection.sent,
                received=was.received + connection.received,
            )
            self._events.on_down(peer, connection.number)

    def _note(self, peer: int, why: str) -> None:
        if peer not in self._up:
            self._status[peer] = replace(self._status[peer], why=why)

    def _count_bad(self, peer: int) -> None:
        self._status[peer] = replace(self._status[peer], bad=self._status[peer].bad + 1)

"""One connection to a neighbour: what is read, what is written, and when is it over?"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

import decaf_lora.engines.links.codec as codec
from decaf_lora.engines.mesh.frames import Frame

_OVERHEAD = 512
"""Bytes that a queued frame counts for beside its payload."""


class Ended(Exception):  # noqa: N818 - an event, not an error
    """The connection is over; the message says why."""


class Connection:
    """A stream between this agent and a neighbour. All its methods run in the event loop's thread.

    Args:
        peer: number of the neighbour.
        number: counts the connections to this neighbour.
        lost: seconds of silence after which the other end is taken for lost.
        ping: seconds after which this end breaks its own silence.
        most_queued: bytes that may wait to be written.
    """

    def __init__(self, peer: int, number: int, lost: float, ping: float, most_queued: int) -> None:
        self.peer, self.number = peer, number
        self._lost, self._ping, self._most_queued = lost, ping, most_queued
        self._queue: deque[Frame] = deque()
        self._queued = 0
        self._filled = asyncio.Event()
        self._stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._finishing = False
        self.began = time.monotonic()
        self.over = asyncio.Event()
        """Set once the connection neither reads nor writes any more."""
        self.heard = False
        """Whether a frame has arrived. Only then is it certain that the other end accepts this connection."""
        self.told_up = False
        """Whether the owner has been told that the connection is up."""
        self.sent = self.received = 0
        """Bytes of frames so far."""

    def put(self, frame: Frame) -> None:
        """Queues a frame. Ends the connection if too much waits: the neighbour does not read."""
        self._queue.append(frame)
        self._queued += _size(frame)
        self._filled.set()
        if self._queued > self._most_queued:
            self.end(f"it does not read: {self._queued} bytes wait for it")

    def finish(self) -> None:
        """Ends the connection when all that is queued has been written."""
        self._finishing = True
        self._filled.set()

    def end(self, why: str) -> None:
        """Ends the connection now."""
        if not self._stop.done():
            self._stop.set_result(why)

    async def carry(
        self,
        read: Callable[[], Awaitable[Any]],
        write: Callable[[bytes], Awaitable[None]],
        close: Callable[[], Awaitable[None]],
        deliver: Callable[[Connection, Frame | None], Awaitable[None]],
    ) -> None:
        """Reads and writes until the connection is over. Always raises.

        Args:
            read: the next bytes of the stream.
            write: puts bytes into the stream; returns when the stream takes more.
            close: says that this end writes no more.
            deliver: what to do with a frame (None: the link's own `ALIVE`); the next is read once it returns.

        Raises:
            Ended: says why.
            codec.BadFrameError: the other end sent what is no frame.
            grpc.aio.AioRpcError: the stream broke.
        """
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(work) for work in (self._read(read, deliver), self._write(write, close))
        ]
        try:
            await asyncio.wait([*tasks, self._stop], return_when=asyncio.FIRST_COMPLETED)
            if self._stop.done():
                raise Ended(self._stop.result())
            for task in tasks:
                if task.done():
                    await task
        finally:
            for task in tasks:
                task.cancel()
                # The connection may be over for another reason at the same moment; asyncio prints what nobody takes.
                task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._queue.clear()
            self.over.set()

    async def _read(
        self, read: Callable[[], Awaitable[Any]], deliver: Callable[[Connection, Frame | None], Awaitable[None]]
    ) -> None:
        while True:
            try:
                received = await asyncio.wait_for(read(), self._lost)
            except TimeoutError:
                raise Ended(f"silent for {self._lost:g} s") from None
            if received is grpc.aio.EOF:
                raise Ended("ended by the other end")
            self.received += len(received)
            frame = codec.decode(received)
            self.heard = True
            await deliver(self, frame)

    async def _write(self, write: Callable[[bytes], Awaitable[None]], close: Callable[[], Awaitable[None]]) -> None:
        try:
            await write(codec.ALIVE)
            while True:
                while self._queue:
                    frame = self._queue.popleft()
                    self._queued -= _size(frame)
                    encoded = codec.encode(frame)
                    await write(encoded)
                    self.sent += len(encoded)
                if self._finishing:
                    await close()
                    break
                self._filled.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._filled.wait(), self._ping)
                if not self._queue:
                    await write(codec.ALIVE)
        except (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):
            pass  # the reader meets the same error, and reports it
        await self._stop


def _size(frame: Frame) -> int:
    return _OVERHEAD + len(getattr(frame, "payload", b"")) + len(getattr(frame, "facts", b""))

"""What do the links of a federation stand? Slow lines, and neighbours that send nonsense.

    python benchmarks/mesh_links.py            # both, into benchmarks/results_mesh_links.json; about 3 minutes
    python benchmarks/mesh_links.py lines      # messages of 1, 10 and 50 MB over 10 Mbit/s and 100 ms, through a proxy
    python benchmarks/mesh_links.py hostile    # 100,000 mutated frames, 2,000 of their connections over TLS

Lines: a process in user space delays every byte by 100 ms and lets 10 Mbit/s through in each direction. Hostile: the
frames reach codec and protocol as they would over a link; on the wire each connection ends at its first bad frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import grpc

from decaf_lora.engines.links import Links, Neighbour, Timing, codec, tls
from decaf_lora.engines.mesh.account import digest
from decaf_lora.engines.mesh.frames import At, Closed, Data, Get, Have, Hello, Last, Ping, split
from decaf_lora.engines.mesh.peer import Peer
from decaf_lora.federation import keys

RESULTS = Path(__file__).with_name("results_mesh_links.json")
RATE, DELAY = 10e6 / 8, 0.1
MEGABYTE = 1_000_000


class Heard:
    """Counts what arrives."""

    def __init__(self) -> None:
        self.up, self.bytes, self.frames, self.downs = threading.Event(), 0, 0, 0

    def on_up(self, peer: int, connection: int) -> None:
        self.up.set()

    def on_down(self, peer: int, connection: int) -> None:
        self.downs += 1

    def on_frame(self, peer: int, connection: int, frame: Any) -> None:
        self.frames += 1
        self.bytes += len(getattr(frame, "payload", b""))


def line(target: int, ready: Any) -> None:
    """Forwards one connection after another: 10 Mbit/s and 100 ms each way."""

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)

        async def late() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(due - time.monotonic(), 0))
                sink.write(data)
                await sink.drain()

        sender = asyncio.create_task(late())
        free = time.monotonic()
        try:
            while data := await source.read(8192):
                free = max(free, time.monotonic() - 0.02) + len(data) / RATE  # who wakes late catches up
                await queue.put((free + DELAY, data))
                await asyncio.sleep(max(free - time.monotonic(), 0))
        finally:
            sender.cancel()
            sink.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    async def serve() -> None:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def identities(*names: str) -> list[tls.Own]:
    folder = Path(tempfile.mkdtemp())
    return [keys.make_identity(name, folder / f"{name}.key") for name in names]


def lines() -> list[dict[str, Any]]:
    """Seconds of a message each way, against bytes / bandwidth."""
    alice, bob = identities("alice", "bob")
    rows = []
    at_bob, at_alice = Heard(), Heard()
    listener = Links(bob, [Neighbour("alice", alice.certificate, None, 0, True)], listen="127.0.0.1:0")
    listener.start(at_bob)
    ours, theirs = multiprocessing.Pipe()
    proxy = multiprocessing.get_context("spawn").Process(target=line, args=(listener.port, theirs), daemon=True)
    proxy.start()
    dialler = Links(alice, [Neighbour("bob", bob.certificate, f"127.0.0.1:{ours.recv()}", 1, False)])
    dialler.start(at_alice)
    at_bob.up.wait(60)
    at_alice.up.wait(60)
    for megabytes in (1, 10, 50):
        payload = os.urandom(megabytes * MEGABYTE)
        parts = list(split(payload))
        before, began = (at_bob.bytes, at_alice.bytes), time.monotonic()
        for k, part in enumerate(parts):  # both ways at once, as in an exchange
            frame = Data(1, 1, k, len(parts), bytes(32), bytes(32), part)
            dialler.send(1, frame)
            listener.send(0, frame)
        while min(at_bob.bytes - before[0], at_alice.bytes - before[1]) < len(payload):
            time.sleep(0.01)
        seconds, ideal = time.monotonic() - began, len(payload) / RATE
        rows.append(
            {
                "megabytes": megabytes,
                "seconds": round(seconds, 2),
                "bytes / bandwidth": round(ideal, 2),
                "ratio": round(seconds / ideal, 3),
                "links lost": at_bob.downs + at_alice.downs,
            }
        )
        print(rows[-1])
    dialler.stop()
    listener.stop()
    proxy.terminate()
    return rows


PAYLOAD = b"payload" * 20
CONTENT = hashlib.sha256(PAYLOAD).digest()
GOOD = [
    Hello(1, 5),
    Data(1, 1, 0, 1, digest(1, 5, bytes(32), CONTENT), bytes(32), PAYLOAD),
    Data(1, 2, 0, 3, digest(2, 5, bytes(32), CONTENT), bytes(32), PAYLOAD),
    Have(2, 1, CONTENT),
    Closed(4, 4, CONTENT),
    At(3),
    Get(3),
    Last(3, 0, 1, CONTENT, PAYLOAD),
    Ping(3),
]


def mutated(rng: random.Random) -> bytes:
    out = bytearray(codec.encode(rng.choice(GOOD)))
    for _ in range(rng.randint(0, 3)):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(3)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randint(1, 8)]
        else:
            out[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(out)


class Owner:
    """Takes every message; its link is one that drops all."""

    def agree(self, peer: int, facts: bytes) -> None:
        return None

    def check(self, peer: int, exchange: int, payload: bytes) -> bytes:
        return payload

    check_adapter = check

    def adapter(self) -> bytes:
        return PAYLOAD

    def up(self, peer: int) -> bool:
        return True

    def send(self, peer: int, frame: Any) -> None:
        codec.encode(frame)

    def close(self, peer: int, reason: str) -> None:
        self.closed = True


def protocol(count: int, rng: random.Random) -> dict[str, int]:
    """Mutated frames through codec and protocol, of an agent with one neighbour."""
    owner = Owner()
    owner.check_adapter = lambda peer, payload: payload  # type: ignore[method-assign, assignment]
    peer = Peer(0, [1], lambda _: frozenset([1]), 5, link=owner, owner=owner, clock=time.monotonic, life=1)
    counts = {"refused by the codec": 0, "ended the connection": 0, "taken": 0}
    connection, owner.closed = 0, True
    for _ in range(count):
        if owner.closed:
            connection, owner.closed = connection + 1, False
            peer.on_up(1, connection)
            peer.on_frame(1, connection, Hello(1, 5))
        try:
            frame = codec.decode(mutated(rng))
        except codec.BadFrameError:
            counts["refused by the codec"] += 1
            continue
        if frame is not None:
            peer.on_frame(1, connection, frame)
        counts["ended the connection" if owner.closed else "taken"] += 1
    return counts


def hostile(count: int = 100_000, connections: int = 2_000) -> dict[str, Any]:
    rng = random.Random(0)
    protocol(1000, rng)
    before = resident()
    counts = protocol(count, rng)
    grown = resident() - before
    alice, bob, mallory = identities("alice", "bob", "mallory")
    neighbours = [Neighbour(own.name, own.certificate, None, k, True) for k, own in ((0, alice), (2, mallory))]
    at_bob, at_alice = Heard(), Heard()
    listener = Links(bob, neighbours, listen="127.0.0.1:0", timing=Timing(last_retry=1e-3))
    listener.start(at_bob)
    address = f"127.0.0.1:{listener.port}"
    dialler = Links(alice, [Neighbour("bob", bob.certificate, address, 1, False)])
    dialler.start(at_alice)
    at_alice.up.wait(60)
    pinned = tls.Pinned("bob", bob.certificate, address)
    options = [("grpc.ssl_target_name_override", "bob"), ("grpc.use_local_subchannel_pool", 1)]
    sent = 0

    def nonsense() -> Any:
        nonlocal sent
        yield codec.ALIVE
        for _ in range(50):
            sent += 1
            yield mutated(rng)
        yield b"\xff"

    def speak(times: int) -> None:
        for _ in range(times):
            with grpc.secure_channel(address, tls.dialling(mallory, pinned), options=options) as channel:
                call = channel.stream_stream("/decaf_lora.mesh.v1.Mesh/Talk")
                with contextlib.suppress(grpc.RpcError):
                    list(call(nonsense(), metadata=(("agent", "mallory"),), timeout=60))

    speak(100)
    before, began = resident(), len(os.listdir("/proc/self/fd"))
    speak(connections)
    on_wire = {
        "connections": connections + 100,
        "frames sent": sent,
        "connections ended for a bad frame": listener.status(2).bad,
        "memory grown, MB": round((resident() - before) / 1e6, 1),
        "descriptors grown": len(os.listdir("/proc/self/fd")) - began,
        "the good neighbour's link was lost": at_alice.downs,
        "errors": 0 if listener.failure is None else repr(listener.failure),
    }
    dialler.stop()
    listener.stop()
    result = {"frames": count, **counts, "memory grown, MB": round(grown / 1e6, 1), "on the wire": on_wire}
    print(json.dumps(result, indent=2))
    return result


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    which = sys.argv[1:] or ["lines", "hostile"]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in which:
        results[name] = {"lines": lines, "hostile": hostile}[name]()
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")

"""Links on real sockets: frames arrive whole, in order and once, through breaks, slow lines and hostile bytes."""

import asyncio
import contextlib
import gc
import random
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from decaf_lora.engines.links import Links, Neighbour
from decaf_lora.engines.links.connection import Connection, Ended
from decaf_lora.engines.mesh.frames import PART, At, Closed, Data, Get, Have, Hello, Last, Ping, split
from decaf_lora.errors import UserError
from endpoints import PATIENCE, QUICK, SHORT, Heard, Proxy, own, pair, until

D, R = b"d" * 32, b"r" * 32


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return own(folder, "alice"), own(folder, "bob")


@pytest.fixture
def ends():
    """Links to stop at the end of the test."""
    made = []
    yield made
    for end in made:
        end.stop()


def connected(agents, ends, **options):
    (alice, at_alice), (bob, at_bob) = pair(*agents, **options)
    ends += [alice, bob]
    until(lambda: alice.up(1) and bob.up(0), "the connection")
    return (alice, at_alice), (bob, at_bob)


def message(size, exchange=1, seed=0):
    payload = random.Random(seed).randbytes(size)
    parts = list(split(payload))
    return payload, [Data(1, exchange, k, len(parts), D, R, part) for k, part in enumerate(parts)]


def test_every_kind_of_frame_arrives_both_ways(agents, ends):
    (alice, at_alice), (bob, at_bob) = connected(agents, ends)
    frames = [
        Hello(1, 2**64 - 1, b"facts"),
        Data(1, 2, 0, 3, D, R, b"payload"),
        Data(1, 2, 1, 3, D, R, b""),
        Have(2, 1, D),
        Closed(2**40, 2**40, D),
        At(3),
        Get(3),
        Last(3, 0, 1, D, b"adapter"),
        Ping(3),
    ]
    for frame in frames:
        alice.send(1, frame)
        bob.send(0, frame)
    until(lambda: len(at_bob.frames()) == len(at_alice.frames()) == len(frames))
    assert at_bob.frames() == at_alice.frames() == frames
    assert at_bob.kinds() == ["up"] + ["frame"] * len(frames)


def test_ten_megabytes_arrive_in_order(agents, ends):
    (alice, _), (_, at_bob) = connected(agents, ends)
    payload, frames = message(10_000_000)
    assert len(frames) == 10
    for frame in frames:
        alice.send(1, frame)
    until(lambda: len(at_bob.frames()) == len(frames))
    assert [frame.part for frame in at_bob.frames()] == list(range(10))
    assert b"".join(frame.payload for frame in at_bob.frames()) == payload
    assert alice.status(1).sent > len(payload)


def test_a_break_is_noticed_on_both_ends_and_mended(agents, ends):
    proxies = []

    def through(port):
        proxies.append(Proxy(port))
        return proxies[0].port

    (alice, at_alice), (bob, at_bob) = connected(agents, ends, through=through)
    (proxy,) = proxies
    proxy.cut()
    until(lambda: not alice.up(1) and not bob.up(0), "the break")
    alice.send(1, At(1))  # to nobody
    proxy.mend()
    until(lambda: alice.up(1) and bob.up(0), "the new connection")
    alice.send(1, At(2))
    until(at_bob.frames)
    assert at_bob.frames() == [At(2)]
    assert at_bob.kinds() == ["up", "down", "up", "frame"]
    assert at_alice.kinds() == ["up", "down", "up"]
    assert alice.status(1).connections == 2
    numbers = [event[2] for event in at_alice.events]
    assert numbers == sorted(numbers)
    assert numbers[0] == numbers[1] < numbers[2]
    proxy.stop()


def test_an_end_that_starts_later_is_reached(agents, ends):
    """The dialler tries until somebody listens."""
    (alice, _), (bob, _) = pair(*agents)
    ends.append(alice)
    port = bob.port
    bob.stop()
    until(lambda: "not reached" in alice.status(1).why, "the reason")
    again = Links(
        agents[1],
        [Neighbour("alice", agents[0].certificate, None, 0, True)],
        listen=f"127.0.0.1:{port}",
        timing=QUICK,
    )
    ends.append(again)
    again.start(Heard())
    until(lambda: alice.up(1) and again.up(0), "the connection")


def test_a_silent_end_is_lost(agents, ends):
    """Bytes stop, and no connection is closed: the own ping notices."""
    proxies = []

    def through(port):
        proxies.append(Proxy(port))
        return proxies[0].port

    (alice, _), (bob, _) = connected(agents, ends, through=through, timing=SHORT)
    proxies[0].rate = 1e-3  # a byte takes 17 minutes
    until(lambda: not alice.up(1) and not bob.up(0), "the loss")
    assert alice.status(1).why == bob.status(0).why == "silent for 3 s"
    proxies[0].stop()


def test_a_new_connection_supersedes_the_old(agents, ends):
    """The frames of the old one that are not yet read are never read."""
    proxies = []

    def through(port):
        proxies.append(Proxy(port))
        return proxies[0].port

    (alice, at_alice), (bob, at_bob) = connected(agents, ends, through=through)
    proxies[0].open = False  # alice keeps what she has, and does not come back
    at_bob.gate.clear()
    for number in range(1, 50):
        alice.send(1, At(number))
    until(lambda: alice.status(1).sent > 0)
    to_bob = Neighbour("bob", agents[1].certificate, f"127.0.0.1:{bob.port}", 1, False)
    twin = Links(agents[0], [to_bob], timing=QUICK)
    ends.append(twin)
    twin.start(Heard())
    until(lambda: twin.up(1) and "down" in at_alice.kinds(), "the end of the old connection")
    at_bob.gate.set()
    twin.send(1, At(1000))
    until(lambda: At(1000) in at_bob.frames())
    old = [event for event in at_bob.events if event[2] == 1]
    assert [event[0] for event in old] in (["up", "down"], ["up", "frame", "down"])  # that which was being dealt with
    assert [event[0] for event in at_bob.events if event[2] == 2] == ["up", "frame"]
    assert [event[2] for event in at_bob.events] == sorted(event[2] for event in at_bob.events)
    proxies[0].stop()


def test_what_the_owner_does_not_take_in_waits_at_the_sender(agents, ends):
    """Backpressure; a slow owner is not a lost one, and the link of the sender stays up."""
    (alice, at_alice), (bob, at_bob) = connected(agents, ends, timing=SHORT)
    at_bob.gate.clear()
    payload, frames = message(64 * PART)
    for frame in frames:
        alice.send(1, frame)
    bob.send(0, At(1))
    until(at_alice.frames)
    assert alice.status(1).sent < len(payload) / 2
    time.sleep(1.5 * SHORT.lost)
    assert alice.up(1)
    assert bob.up(0)
    assert alice.status(1).sent < len(payload) / 2
    at_bob.gate.set()
    until(lambda: len(at_bob.frames()) == len(frames))
    assert b"".join(frame.payload for frame in at_bob.frames()) == payload
    assert at_bob.kinds().count("down") == at_alice.kinds().count("down") == 0


def test_an_end_that_never_reads_is_cut_off(agents, ends):
    (alice, at_alice), (_, at_bob) = connected(agents, ends, most_queued=8 * PART)
    at_bob.gate.clear()
    for frame in message(64 * PART)[1]:
        alice.send(1, frame)
    until(lambda: "down" in at_alice.kinds(), "the end")
    assert "does not read" in alice.status(1).why
    at_bob.gate.set()


def test_a_slow_line(agents, ends):
    """A message takes longer than the silence after which an end is lost, and the line stays up."""
    proxies = []

    def through(port):
        proxies.append(Proxy(port))
        return proxies[0].port

    (alice, at_alice), (_, at_bob) = connected(agents, ends, through=through, timing=SHORT)
    proxies[0].rate = 400_000
    payload = random.Random(0).randbytes(2_000_000)
    parts = list(split(payload, 50_000))
    for k, part in enumerate(parts):
        alice.send(1, Data(1, 1, k, len(parts), D, R, part))
    until(lambda: len(at_bob.frames()) == len(parts))
    assert b"".join(frame.payload for frame in at_bob.frames()) == payload
    assert at_alice.kinds() == ["up"]
    proxies[0].stop()


def test_the_owner_may_answer_from_within_an_event(agents, ends):
    """Nothing that the owner calls waits for its own thread."""
    (alice, at_alice), (bob, at_bob) = connected(agents, ends)
    at_bob.reply = lambda peer, connection, frame: bob.send(peer, Have(1, frame.exchange, frame.digest))
    for frame in message(5 * PART)[1]:
        alice.send(1, frame)
    until(lambda: len(at_alice.frames()) == 5)
    at_bob.reply = lambda peer, connection, frame: bob.close(peer, "it lied")
    alice.send(1, At(1))
    until(lambda: bob.status(0).why == "it lied")
    until(lambda: alice.up(1) and bob.up(0), "the next connection")


def test_what_is_queued_goes_out_before_the_end(agents, ends):
    (alice, _), (_, at_bob) = connected(agents, ends)
    payload, frames = message(3 * PART)
    for frame in frames:
        alice.send(1, frame)
    alice.send(1, At(7))
    alice.stop()
    until(lambda: At(7) in at_bob.frames())
    assert b"".join(frame.payload for frame in at_bob.frames()[:-1]) == payload


def test_an_owner_that_raises_is_heard_of(agents, ends):
    (alice, _), (bob, at_bob) = connected(agents, ends)

    def fails(peer, connection, frame):
        raise ZeroDivisionError("a bug")

    at_bob.reply = fails
    alice.send(1, At(1))
    until(lambda: bob.failure is not None)
    assert isinstance(bob.failure, ZeroDivisionError)


def test_a_taken_port_is_one_clear_line(agents, ends):
    _, (bob, _) = connected(agents, ends)
    twin = Links(agents[1], [Neighbour("alice", agents[0].certificate, None, 0, True)], listen=f"127.0.0.1:{bob.port}")
    with pytest.raises(UserError, match=rf"listen: cannot listen on 127.0.0.1:{bob.port} \(Address already in use"):
        twin.start(Heard())


def test_an_address_that_is_not_this_machines(agents):
    end = Links(agents[1], [Neighbour("alice", agents[0].certificate, None, 0, True)], listen="192.0.2.1:7447")
    with pytest.raises(UserError, match=r"listen: cannot listen on 192\.0\.2\.1:7447"):
        end.start(Heard())


def test_two_ends_that_never_started_stop(agents):
    Links(agents[0], []).stop()


def test_the_generated_module_is_current(tmp_path):
    """`make proto` would change nothing."""
    source = Path(__file__).parents[2] / "src"
    proto = source / "decaf_lora/engines/links/mesh.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"--python_out={tmp_path}"]
    subprocess.run([*command, f"--pyi_out={tmp_path}", proto], check=True, timeout=PATIENCE)
    made, kept = (
        [(folder / name).read_text() for name in ("mesh_pb2.py", "mesh_pb2.pyi")]
        for folder in (tmp_path / "decaf_lora/engines/links", proto.parent)
    )
    version, described = "# Protobuf Python Version: ", "DESCRIPTOR = "
    releases, descriptions = (
        [next(line for line in text.splitlines() if line.startswith(start)) for text in (made[0], kept[0])]
        for start in (version, described)
    )
    assert descriptions[0] == descriptions[1]
    if releases[0] == releases[1]:  # another release of the tools lays the same out otherwise
        assert made == kept


@pytest.mark.parametrize("error", [Ended("ended by the other end"), grpc.aio.UsageError("RPC already finished.")])
def test_a_read_that_fails_as_the_connection_ends_is_not_told(error):
    """Both ends refuse each other in the same moment; asyncio would print the second error with its traceback."""
    told = []

    async def ends_on_both_sides() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
        connection = Connection(1, 0, lost=60, ping=60, most_queued=2**20)

        async def read() -> bytes:
            connection.end("refused")
            raise error

        async def write(frame: bytes) -> None:
            await asyncio.sleep(0)

        async def close() -> None: ...

        async def deliver(*heard: object) -> None: ...

        with contextlib.suppress(Ended, grpc.aio.UsageError):
            await connection.carry(read, write, close, deliver)
        await asyncio.sleep(0)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(ends_on_both_sides())
    assert told == []

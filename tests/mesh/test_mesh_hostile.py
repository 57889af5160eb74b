"""A member that lies: whatever bytes it sends, the agent lives, its memory stays, and the others' frames arrive."""

import os
import random
import threading
from pathlib import Path

import grpc
import pytest

from decaf_lora.engines.links import Links, Neighbour, codec, tls
from decaf_lora.engines.links import mesh_pb2 as pb
from decaf_lora.engines.mesh.frames import PART, At, Closed, Data, Get, Have, Hello, Last, Ping
from endpoints import PATIENCE, QUICK, Heard, own, until

D, R = b"d" * 32, b"r" * 32
GOOD = [
    Hello(1, 5, b"facts"),
    Data(1, 2, 0, 3, D, R, b"payload"),
    Have(2, 1, D),
    Closed(4, 4, D),
    At(3),
    Get(3),
    Last(3, 0, 1, D, b"adapter"),
    Ping(3),
]


def mutated(rng: random.Random) -> bytes:
    """An encoded frame with some bytes changed, removed or added."""
    out = bytearray(codec.encode(rng.choice(GOOD)))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(3):
            case 0 if at < len(out):
                out[at] = rng.randrange(256)
            case 1:
                del out[at : at + rng.randint(1, 8)]
            case _:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(out)


def test_bytes_are_a_frame_within_its_bounds_or_are_refused():
    rng = random.Random(0)
    kinds = {"frame": 0, "refused": 0}
    for _ in range(10_000):
        try:
            frame = codec.decode(mutated(rng))
        except codec.BadFrameError:
            kinds["refused"] += 1
            continue
        kinds["frame"] += 1
        if frame is not None:
            assert codec.decode(codec.encode(frame)) == frame
    assert min(kinds.values()) > 500


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (pb.Frame(), "no known kind"),
        (pb.Frame(next=2**63, at=pb.At()), "next is"),
        (pb.Frame(next=1, have=pb.Have(exchange=0, digest=D)), "exchange is 0"),
        (pb.Frame(next=1, have=pb.Have(exchange=2**63, digest=D)), "exchange is"),
        (pb.Frame(next=1, closed=pb.Closed(exchange=1, digest=D[:31])), "digest has 31 bytes, not 32"),
        (pb.Frame(next=1, data=pb.Data(exchange=1, part=2, parts=2, digest=D, record=R)), "part 2 of 2"),
        (pb.Frame(next=1, data=pb.Data(exchange=1, part=0, parts=0, digest=D, record=R)), "part 0 of 0"),
        (pb.Frame(next=1, data=pb.Data(exchange=1, parts=1, digest=D, record=R + R)), "record has 64 bytes"),
        (pb.Frame(next=1, last=pb.Last(parts=1, digest=D, payload=bytes(PART + 1))), "payload has 1048577 bytes"),
        (pb.Frame(next=1, data=pb.Data(payload=bytes(2 * PART))), "a frame of 2097"),
    ],
)
def test_every_bound_is_kept(frame, what):
    with pytest.raises(codec.BadFrameError, match=what):
        codec.decode(frame.SerializeToString())


def test_a_frame_above_the_bound_is_not_sent():
    with pytest.raises(codec.BadFrameError):
        codec.encode(Data(1, 1, 0, 1, D, R, bytes(PART + 2048)))


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return [own(folder, name) for name in ("alice", "bob", "mallory")]


class Scene:
    """bob listens; alice is a good neighbour; mallory has a certificate of the file and speaks in raw bytes."""

    def __init__(self, agents):
        alice, bob, self.mallory = agents
        neighbours = [
            Neighbour("alice", alice.certificate, None, 0, True),
            Neighbour("mallory", self.mallory.certificate, None, 2, True),
        ]
        self.bob, self.at_bob = Links(bob, neighbours, listen="127.0.0.1:0", timing=QUICK), Heard()
        self.bob.start(self.at_bob)
        self.address = f"127.0.0.1:{self.bob.port}"
        self.pinned = tls.Pinned("bob", bob.certificate, self.address)
        to_bob = Neighbour("bob", bob.certificate, self.address, 1, False)
        self.alice, self.at_alice = Links(alice, [to_bob], timing=QUICK), Heard()
        self.alice.start(self.at_alice)
        until(lambda: self.alice.up(1) and self.bob.up(0))

    def says(self, stream, patience=PATIENCE):
        """Sends bytes until bob ends the connection; the code that it ends with."""
        options = [
            ("grpc.ssl_target_name_override", "bob"),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
        ]
        with grpc.secure_channel(self.address, tls.dialling(self.mallory, self.pinned), options=options) as channel:
            call = channel.stream_stream("/decaf_lora.mesh.v1.Mesh/Talk")
            answers = call(iter(stream), metadata=(("agent", "mallory"),), timeout=patience)
            try:
                for _ in answers:
                    pass
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    def still_works(self):
        """Frames of alice arrive; her link has been up all the time."""
        before = len(self.at_bob.frames(0))
        self.alice.send(1, At(before + 1))
        until(lambda: len(self.at_bob.frames(0)) > before)
        assert self.at_alice.kinds() == ["up"]
        assert self.bob.failure is None

    def stop(self):
        self.alice.stop()
        self.bob.stop()


@pytest.fixture
def scene(agents):
    made = Scene(agents)
    yield made
    made.stop()


def test_what_is_no_frame_ends_the_connection_and_is_counted(scene):
    assert scene.says([codec.ALIVE, b"\xff" * 100]) is not grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: not scene.bob.up(2) and scene.bob.status(2).bad == 1)
    assert scene.bob.status(2).why == "it sent bytes that are no frame"
    assert scene.at_bob.frames(2) == []
    scene.still_works()


def test_a_liar_has_to_wait(scene):
    """A connection that was ended for a fault is not at once followed by the next."""
    scene.bob._timing = type(QUICK)(lost=2.0, last_retry=1000.0)
    scene.says([codec.ALIVE, b"\xff" * 100])
    until(lambda: scene.bob.status(2).bad == 1)
    assert scene.says([codec.ALIVE]) is grpc.StatusCode.UNAVAILABLE
    scene.still_works()


def test_who_is_cut_off_is_told_at_once(scene, monkeypatch):
    """A connection may be over while its first bytes are on their way to the other end. gRPC then lost its end."""
    begun = scene.bob._connection

    def over(neighbour):
        connection = begun(neighbour)
        connection.end("enough")
        return connection

    monkeypatch.setattr(scene.bob, "_connection", over)
    assert scene.says([codec.ALIVE], patience=20) is grpc.StatusCode.OK


def test_mutated_frames_on_the_wire(scene):
    rng = random.Random(1)
    for _ in range(40):
        scene.bob._not_before[2] = 0.0
        scene.says([codec.ALIVE, *(mutated(rng) for _ in range(20)), b"\xff"])
    until(lambda: scene.bob.status(2).bad == 40)
    assert all(isinstance(frame, tuple(type(good) for good in GOOD)) for frame in scene.at_bob.frames(2))
    scene.still_works()


def test_an_oversized_frame(scene):
    """gRPC refuses it by its length, before it is read."""
    huge = pb.Frame(next=1, data=pb.Data(payload=bytes(64 * PART))).SerializeToString()
    before = resident()
    assert scene.says([codec.ALIVE, huge]) is not grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: not scene.bob.up(2))
    assert scene.at_bob.frames(2) == []
    scene.still_works()
    assert resident() - before < 256 * 2**20  # what the test itself holds


def test_a_flood_is_not_taken_in(scene):
    """The owner is slow, and bob's memory does not grow by what mallory offers (1 GiB); nor does alice starve."""
    frame = codec.encode(Data(1, 1, 0, 1, D, R, bytes(PART)))
    offered = 0

    def flood():
        nonlocal offered
        yield codec.ALIVE
        for _ in range(1024):
            offered += len(frame)
            yield frame

    first = threading.Event()

    class Slow(Heard):
        def on_frame(self, peer, connection, frame):
            if peer == 2:
                first.set()
                self.gate.wait(0.05)
                frame = None  # not kept, as an owner would not
            super().on_frame(peer, connection, frame)

    slow = Slow()
    slow.events = scene.at_bob.events
    scene.bob._events = slow
    slow.gate.clear()
    slow_gate_open = threading.Timer(1.0, slow.gate.set)
    before = resident()
    thread = threading.Thread(target=scene.says, args=(flood(),), daemon=True)
    thread.start()
    assert first.wait(PATIENCE)
    slow_gate_open.start()
    scene.still_works()
    grown = resident() - before
    taken = offered
    scene.bob.close(2, "enough")
    until(lambda: not scene.bob.up(2))
    thread.join(PATIENCE)
    assert taken < 1024 * len(frame)
    assert grown < 128 * 2**20


def test_many_small_frames_and_many_connections(scene):
    small = codec.encode(At(1))
    before = resident()
    for _ in range(20):
        scene.bob._not_before[2] = 0.0
        scene.says([codec.ALIVE, *[small] * 200])
    until(lambda: len(scene.at_bob.frames(2)) == 4000)
    scene.still_works()
    assert resident() - before < 64 * 2**20
    until(lambda: not scene.bob.up(2))


def resident():
    """Bytes of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")

"""Agents on real sockets of this machine, for the tests of links."""

import contextlib
import socket
import threading
import time
from pathlib import Path

from decaf_lora.engines.links import Links, Neighbour, Timing
from decaf_lora.engines.links.tls import Own
from decaf_lora.federation import keys

QUICK = Timing(lost=20.0, first_retry=0.02, last_retry=0.2)
"""Seconds for tests: an end is lost after far more than a loaded machine stands still, and dialled again at once."""

SHORT = Timing(lost=3.0, first_retry=0.02, last_retry=0.2)
"""For tests of what takes longer than the silence after which an end is lost."""

PATIENCE = 180.0
"""Seconds until a test stops to wait for what must happen."""


def until(condition, what="it"):
    """Waits until `condition()` is true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)


class Heard:
    """Events of an end, in order, as (kind, peer, connection, frame)."""

    def __init__(self, on_frame=None):
        self.events = []
        self.reply = on_frame
        self.gate = threading.Event()
        self.gate.set()

    def on_up(self, peer, connection):
        self.events.append(("up", peer, connection, None))

    def on_down(self, peer, connection):
        self.events.append(("down", peer, connection, None))

    def on_frame(self, peer, connection, frame):
        self.gate.wait(PATIENCE)
        self.events.append(("frame", peer, connection, frame))
        if self.reply:
            self.reply(peer, connection, frame)

    def frames(self, peer=None):
        return [e[3] for e in list(self.events) if e[0] == "frame" and peer in (None, e[1])]

    def kinds(self):
        return [e[0] for e in list(self.events)]


def own(folder: Path, name: str, days: float = 30, file: str | None = None) -> Own:
    """A new agent called `name`."""
    return keys.make_identity(name, folder / (file or f"{name}.key"), days)


def pair(alice: Own, bob: Own, *, alice_sees=None, bob_sees=None, through=None, timing=QUICK, start=True, **options):
    """Bob (1) listens and alice (0) dials: ((links, heard), (links, heard)).

    alice_sees, bob_sees: the certificates that each takes the other for, where it is not the right one.
    through: port -> port: what stands between them.
    """
    bob_end = Links(
        bob,
        [Neighbour("alice", (bob_sees or alice).certificate, None, 0, True)],
        listen="127.0.0.1:0",
        timing=timing,
        **options,
    )
    bob_heard = Heard()
    bob_end.start(bob_heard)
    port = through(bob_end.port) if through else bob_end.port
    alice_end = Links(
        alice,
        [Neighbour("bob", (alice_sees or bob).certificate, f"127.0.0.1:{port}", 1, False)],
        timing=timing,
        **options,
    )
    alice_heard = Heard()
    if start:
        alice_end.start(alice_heard)
    return (alice_end, alice_heard), (bob_end, bob_heard)


class Proxy:
    """Forwards connections to a port of this machine: slowly, if `rate` (bytes a second) is set; may be cut.

    `spoken` keeps the first bytes that each connection's far end has sent.
    """

    def __init__(self, target: int, rate: float | None = None):
        self.target, self.rate = target, rate
        self.spoken: list[bytearray] = []
        self.open = True
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if not self.open:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # nobody listens there yet
                near.close()
                continue
            for end in (near, far):  # a slow line holds little
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            self._sockets += [near, far]
            said = bytearray()
            self.spoken.append(said)
            threading.Thread(target=self._pump, args=(near, far, None), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, said), daemon=True).start()

    def _pump(self, source, sink, said):
        try:
            while data := source.recv(16384):
                if said is not None and len(said) < 4096:
                    said += data
                sink.sendall(data)
                if self.rate:
                    time.sleep(len(data) / self.rate)
        except OSError:
            pass
        for end in (source, sink):
            end.close()

    def cut(self):
        """Breaks all connections, and takes no new ones until `mend`."""
        self.open = False
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def mend(self):
        self.open = True

    def stop(self):
        self._listener.close()
        self.cut()

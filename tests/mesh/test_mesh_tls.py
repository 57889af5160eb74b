"""Who may talk: an end takes the one certificate of the file for the name that is claimed, and tells others nothing."""

import contextlib
import datetime
import socket
import ssl
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from decaf_lora.engines.links import Links, Neighbour, codec, tls
from decaf_lora.engines.mesh.frames import At
from decaf_lora.federation import keys
from endpoints import PATIENCE, QUICK, Heard, Proxy, own, pair, until


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    """alice, bob; and who is not what the file says: a forged alice and bob, expired ones, and carol."""
    folder = tmp_path_factory.mktemp("keys")
    return {
        "alice": own(folder, "alice"),
        "bob": own(folder, "bob"),
        "carol": own(folder, "carol"),
        "forged alice": own(folder, "alice", file="forged-alice.key"),
        "forged bob": own(folder, "bob", file="forged-bob.key"),
        "expired alice": own(folder, "alice", days=-1, file="expired-alice.key"),
        "expired bob": own(folder, "bob", days=-1, file="expired-bob.key"),
    }


@pytest.fixture
def ends():
    made = []
    yield made
    for end in made:
        end.stop()


def refused(ends, alice, bob, **options):
    """Why alice is not connected; asserts that neither end hears anything."""
    (dialler, at_dialler), (listener, at_listener) = pair(alice, bob, **options)
    ends += [dialler, listener]
    until(lambda: dialler.status(1).why != "not yet connected", "the refusal")
    until(lambda: dialler._counts[1] >= 3, "more attempts")
    assert at_dialler.events == at_listener.events == []
    assert not dialler.up(1)
    assert not listener.up(0)
    assert dialler.status(1).received == listener.status(0).received == 0
    return dialler.status(1).why


def test_a_good_pair_talks_over_tls_1_3(known, ends):
    """What the listener answers (ServerHello) chooses the version: extension 43 with 0x0304."""
    proxies = []

    def through(port):
        proxies.append(Proxy(port))
        return proxies[0].port

    (alice, _), (bob, at_bob) = pair(known["alice"], known["bob"], through=through)
    ends += [alice, bob]
    until(lambda: alice.up(1) and bob.up(0))
    alice.send(1, At(1))
    until(at_bob.frames)
    hello = bytes(proxies[0].spoken[0])
    assert hello[0] == 22  # a record of the handshake
    assert hello[5] == 2  # ServerHello
    assert b"\x00\x2b\x00\x02\x03\x04" in hello
    proxies[0].stop()


SAME = "refused by bob after its certificate was shown: ask whether the file of bob is version 7."


def test_a_forged_dialler(known, ends):
    why = refused(ends, known["forged alice"], known["bob"], bob_sees=known["alice"], version=7)
    assert why == SAME


def test_a_forged_listener(known, ends):
    why = refused(ends, known["alice"], known["forged bob"], alice_sees=known["bob"], version=7)
    assert "does not have the certificate of bob: ask bob whether the address is right and the file is version 7" in why


def test_an_expired_dialler(known, ends):
    why = refused(ends, known["expired alice"], known["bob"])
    assert why.startswith("the certificate of alice expired at ")
    assert "this machine's clock says" in why


def test_an_expired_listener(known, ends):
    why = refused(ends, known["alice"], known["expired bob"])
    assert why.startswith("the certificate of bob expired at ")


def test_another_name(known, ends):
    """Carol's certificate is in the file, and hers is not the name that is dialled."""
    why = refused(ends, known["alice"], known["carol"], alice_sees=known["carol"])
    assert "does not have the certificate of bob" in why


def test_a_neighbour_who_claims_anothers_name(known, ends):
    """TLS lets in every neighbour; the pin compares the name with the certificate."""
    listener = Links(
        known["bob"],
        [
            Neighbour("alice", known["alice"].certificate, None, 0, True),
            Neighbour("carol", known["carol"].certificate, None, 2, True),
        ],
        listen="127.0.0.1:0",
        timing=QUICK,
    )
    heard = Heard()
    listener.start(heard)
    ends.append(listener)
    bob = Neighbour("bob", known["bob"].certificate, f"127.0.0.1:{listener.port}", 1, False)

    def says(me, name):
        options = [("grpc.ssl_target_name_override", "bob"), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(bob.address, tls.dialling(me, bob), options=options) as channel:
            call = channel.stream_stream("/decaf_lora.mesh.v1.Mesh/Talk")
            metadata = () if name is None else (("agent", name),)
            answers = call(iter([codec.ALIVE]), metadata=metadata, timeout=PATIENCE)
            try:
                return next(answers)
            except grpc.RpcError as error:
                return error.code(), error.details()

    refusal = (grpc.StatusCode.UNAUTHENTICATED, "refused")
    assert says(known["carol"], "alice") == refusal
    assert says(known["alice"], "carol") == refusal
    assert says(known["alice"], "dave") == refusal
    assert says(known["alice"], None) == refusal
    assert heard.events == []
    assert says(known["alice"], "alice") == codec.ALIVE


def test_a_member_who_is_no_neighbour(known, ends):
    """Carol is in the file, but bob's trust store has his neighbours only."""
    why = refused(ends, known["carol"], known["bob"], bob_sees=known["alice"], version=7)
    assert why == SAME


def test_an_end_that_is_to_be_dialled_does_not_dial(known, ends):
    """One end of an edge dials; the other's calls are refused, or the two would replace each other for ever."""
    listener = Links(
        known["bob"],
        [
            Neighbour("alice", known["alice"].certificate, None, 0, True),
            Neighbour("carol", known["carol"].certificate, "127.0.0.1:1", 2, False),
        ],
        listen="127.0.0.1:0",
        timing=QUICK,
    )
    listener.start(Heard())
    ends.append(listener)
    carol = Links(
        known["carol"],
        [Neighbour("bob", known["bob"].certificate, f"127.0.0.1:{listener.port}", 1, False)],
        timing=QUICK,
        version=7,
    )
    carol.start(Heard())
    ends.append(carol)
    until(lambda: carol.status(1).why != "not yet connected")
    assert carol.status(1).why == SAME


def test_a_certificate_that_a_neighbour_has_issued(known, ends, tmp_path):
    """To trust a neighbour's certificate is not to trust whom it vouches for."""
    alice = known["alice"]
    issuer = x509.load_pem_x509_certificate(alice.certificate)
    signer = serialization.load_pem_private_key(alice.key, None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    issued = (
        x509.CertificateBuilder()
        .subject_name(issuer.subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("alice")]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    certificate = issued.public_bytes(serialization.Encoding.PEM)
    path = tmp_path / "issued.key"
    keys.write_private(path, pem + certificate)
    why = refused(ends, tls.Own("alice", certificate, pem, path), known["bob"], bob_sees=alice, version=7)
    assert why == SAME


def test_plaintext_is_refused_by_both_ends(known, ends):
    (alice, at_alice), (bob, at_bob) = pair(known["alice"], known["bob"], start=False)
    ends.append(bob)
    with socket.create_connection(("127.0.0.1", bob.port), PATIENCE) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        answer = plain.recv(4096)
        assert answer[:1] in (b"", b"\x15")  # closed, or a TLS alert; no frame of HTTP/2
    with grpc.insecure_channel(f"127.0.0.1:{bob.port}") as channel:
        with pytest.raises(grpc.RpcError) as error:
            next(channel.stream_stream("/decaf_lora.mesh.v1.Mesh/Talk")(iter([codec.ALIVE]), timeout=PATIENCE))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert at_bob.events == []
    alice.stop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        dialler = Links(
            known["alice"], [Neighbour("bob", known["bob"].certificate, f"127.0.0.1:{port}", 1, False)], timing=QUICK
        )
        dialler.start(at_alice)
        ends.append(dialler)
        server.settimeout(PATIENCE)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(1) == b"\x16"  # a TLS handshake, and nothing in the clear
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            server.close()
    until(lambda: dialler.status(1).why != "not yet connected")
    assert at_alice.events == []


def test_a_dialler_without_a_certificate(known, ends):
    """The listener demands one before anything is said."""
    _, (bob, at_bob) = pair(known["alice"], known["bob"], start=False)
    ends.append(bob)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=known["bob"].certificate.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", bob.port), PATIENCE) as plain,
        context.wrap_socket(plain, server_hostname="bob") as secure,
        contextlib.suppress(ssl.SSLError, ConnectionResetError),
    ):
        assert secure.recv(100) == b""
    assert at_bob.events == []


def test_what_is_not_there_and_what_is_no_tls(known):
    neighbour = tls.Pinned("bob", known["bob"].certificate, "127.0.0.1:1")
    assert "bob not reached: 127.0.0.1:1: Connection refused" in tls.diagnose(known["alice"], neighbour, 1).why
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        why = tls.diagnose(known["alice"], tls.Pinned("bob", known["bob"].certificate, address), 1, timeout=0.2)
        assert why.kind == "not reached"
        assert why.why == f"bob not reached: no answer from {address} (firewall, or bob is not running)."


def test_a_clock_that_is_behind(known):
    early = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=3)
    fault = tls.invalid(known["alice"].certificate, "alice", early)
    assert fault.startswith("the certificate of alice is valid from ")
    assert tls.invalid(known["alice"].certificate, "alice") is None


def test_the_listeners_log_has_the_reason(known):
    """gRPC writes it to standard error, where an agent's log goes."""
    script = textwrap.dedent(
        """
        import sys, time
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        from endpoints import Heard, QUICK
        from decaf_lora.engines.links import Links, Neighbour
        from decaf_lora.federation import keys
        bob, alice = (keys.load_identity(Path(path)) for path in sys.argv[2:4])
        links = Links(bob, [Neighbour("alice", alice.certificate, None, 0, True)], listen="127.0.0.1:0", timing=QUICK)
        links.start(Heard())
        print(links.port, flush=True)
        sys.stdin.read()
        links.stop()
        """
    )
    here = str(Path(__file__).parents[1] / "helpers")
    command = [sys.executable, "-c", script, here, str(known["bob"].path), str(known["alice"].path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        port = int(process.stdout.readline())
        bob = tls.Pinned("bob", known["bob"].certificate, f"127.0.0.1:{port}")
        assert tls.diagnose(known["forged alice"], bob, 7) == ("refused", SAME)
        time.sleep(0.1)
        _, log = process.communicate("", timeout=PATIENCE)
    finally:
        process.kill()
    assert "CERTIFICATE_VERIFY_FAILED" in log

"""Who may connect, and why was a connection refused? TLS with both ends' certificates pinned.

There is no certificate authority: an end trusts the certificates of its neighbours and nothing else. An agent's
certificate may not sign others, so a chain has one certificate. gRPC has no switch to demand TLS 1.3; two agents of
this package negotiate it.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import grpc
from cryptography import x509


@dataclass(frozen=True)
class Own:
    """This end: an agent's certificate and the key that proves it."""

    name: str
    certificate: bytes
    """PEM."""
    key: bytes
    """PEM; never sent."""
    path: Path
    """File that holds both, for its owner alone."""


@dataclass(frozen=True)
class Pinned:
    """The other end of an edge, as the federation file says."""

    name: str
    certificate: bytes
    """PEM."""
    address: str | None
    """host:port; None where this end does not dial."""

    @property
    def pin(self) -> str:
        """SHA-256 of the certificate, as hexadecimal digits."""
        return sha256(self.certificate)


def sha256(pem: bytes) -> str:
    """SHA-256 of a certificate's DER bytes, as hexadecimal digits."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode("ascii").strip())).hexdigest()


def listening(own: Own, neighbours: Sequence[Pinned]) -> grpc.ServerCredentials:
    """Credentials of the end that is dialled: it asks for a certificate, and accepts its neighbours' only."""
    roots = b"".join(neighbour.certificate for neighbour in neighbours)
    return grpc.ssl_server_credentials([(own.key, own.certificate)], roots, require_client_auth=True)


def dialling(own: Own, neighbour: Pinned) -> grpc.ChannelCredentials:
    """Credentials of the end that dials: it shows its own certificate, and accepts this neighbour's only."""
    return grpc.ssl_channel_credentials(neighbour.certificate, own.key, own.certificate)


def shown(context: grpc.aio.ServicerContext) -> str | None:
    """SHA-256 of the certificate that a dialler has shown and proved to own; None unless it showed exactly one."""
    found = context.auth_context().get("x509_pem_cert", [])
    return sha256(found[0]) if len(found) == 1 else None


def invalid(pem: bytes, name: str, now: datetime | None = None) -> str | None:
    """Why a certificate is not valid; None if it is.

    Args:
        pem: the certificate.
        name: of its owner, for the text.
        now: the time to check; None: by this machine's clock.
    """
    now = now or datetime.now(UTC)
    certificate = x509.load_pem_x509_certificate(pem)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    clock = f"this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
    if now > ends:
        return f"the certificate of {name} expired at {ends:%Y-%m-%d %H:%M} UTC, and {clock}"
    if now < begins:
        return f"the certificate of {name} is valid from {begins:%Y-%m-%d %H:%M} UTC, and {clock}"
    return None


class Answer(NamedTuple):
    """How an attempt to connect went."""

    kind: Literal["up", "not reached", "refused", "own"]
    """`own`: the fault lies with this agent itself, which did not try."""
    why: str
    """One sentence, with the remedy."""


def diagnose(mine: Own, neighbour: Pinned, version: int, timeout: float = 5.0) -> Answer:
    """Whether this agent can connect to a neighbour that it dials, and if not, why.

    The attempt uses the standard library, whose errors say more than gRPC's. An end that refuses a certificate says why
    only in its own log, so the remedy is then to ask its owner.

    Args:
        mine: this agent's certificate and key.
        neighbour: the end to connect to; it has an address.
        version: of this agent's federation file, for the remedy.
        timeout: seconds to wait for each answer.
    """
    name, address = neighbour.name, neighbour.address
    assert address is not None
    host, _, port = address.rpartition(":")
    own = _outdated(mine.certificate, mine.name)
    if own:
        return Answer("own", own)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=neighbour.certificate.decode())
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(mine.path)
    refused = Answer(
        "refused",
        f"refused by {name} after its certificate was shown: ask whether the file of {name} is version {version}.",
    )
    stranger = Answer(
        "refused",
        f"what answers at {address} does not have the certificate of {name}: ask {name} whether the address is right "
        f"and the file is version {version}.",
    )
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout) as plain,
            context.wrap_socket(plain, server_hostname=name) as secure,
        ):
            secure.settimeout(timeout)
            der = secure.getpeercert(binary_form=True)
            if der is None or hashlib.sha256(der).hexdigest() != neighbour.pin:
                return stranger
            # With TLS 1.3 the dialler's handshake ends before the other end has checked its certificate. Only a byte
            # from the other end shows that it was accepted.
            return Answer("up", f"{name} answers at {address}.") if secure.recv(1) else refused
    except ssl.SSLCertVerificationError:
        # The certificate that was shown is not known here. If the pinned one is outdated, that is the likely reason.
        outdated = _outdated(neighbour.certificate, name)
        return Answer("refused", outdated) if outdated else stranger
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError) as error:
        if isinstance(error, ssl.SSLError) and "WRONG_VERSION" in str(error.reason):
            return Answer(
                "refused", f"what answers at {address} does not speak TLS: ask {name} whether the address is right."
            )
        return refused
    except TimeoutError:
        why = f"{name} not reached: no answer from {address} (firewall, or {name} is not running)."
    except OSError as error:
        why = f"{name} not reached: {address}: {error.strerror or error} (is {name} running, is the address right?)."
    return Answer("not reached", why)


def _outdated(pem: bytes, name: str) -> str | None:
    fault = invalid(pem, name)
    return fault and f"{fault}: set the clock, or make a new request and ask the organiser for a new file."

"""Who is who? Keys and certificates of agents, and the key of a federation's organiser.

An agent has a P-256 key and a self-signed certificate for TLS, both in one file that only its owner may read. The
organiser has an Ed25519 key that signs the federation file. No private key ever leaves the machine it was made on.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from decaf_lora.engines.links.tls import Own, sha256
from decaf_lora.errors import UserError

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Pattern of the names of agents and federations: labels of a DNS name, since certificates carry them as such."""

DAYS = 365
"""Days that a certificate is valid by default."""

_EARLY = timedelta(days=1)
"""Time before its making from which a certificate is valid, since the clocks of the sites differ."""

_MOST = 65536
"""Largest size of a key file, and of a certificate, in bytes."""


def check_name(name: str, field: str = "name") -> str:
    """Returns `name` if an agent or a federation may have it; otherwise UserError says what a name may be."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{field}: {name!r} is not a name; use 1 to 63 lower-case letters, digits and inner hyphens, as in alice."
        )
    return name


# Files that only their owner may read


def write_private(path: Path, content: bytes) -> None:
    """Writes a new file of mode 600. UserError if there is one already: a key that is lost cannot be made again."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UserError(f"key: {path} exists already; move it away if you really want a new key.") from None
    except OSError as error:
        raise UserError(f"key: cannot write {path} ({error.strerror}).") from error
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask is
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def read_private(path: Path) -> bytes:
    """The content of a key file. UserError if it is missing, or if anybody but its owner may read or change it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"key: cannot read {path} ({error.strerror}).") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UserError(f"key: {path} is not a file.")
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            raise UserError(f"key: others may use {path} (mode {mode:o}); run `chmod 600 {path}`.")
        if status.st_uid != os.geteuid():
            raise UserError(f"key: {path} belongs to another user; copy it to a file of your own.")
        content = file.read(_MOST + 1)
    if len(content) > _MOST:
        raise UserError(f"key: {path} is too large for a key.")
    return content


# Agents


def make_identity(name: str, path: Path, days: float = DAYS) -> Own:
    """A new key, and a certificate for it that is valid for `days`, written to `path` (mode 600).

    Raises:
        UserError: an agent may not have this name, or `path` exists or cannot be written.
    """
    check_name(name)
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC).replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, now + timedelta(days=days)) - _EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        # No authority: the certificate vouches for this key alone, so that to trust it is to pin it.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    key = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = certificate.public_bytes(Encoding.PEM)
    write_private(path, key + pem)
    return Own(name, pem, key, path)


def load_identity(path: Path) -> Own:
    """The identity in the key file `path`; UserError if the file is unsafe, damaged, or of another kind."""
    content = read_private(path)
    try:
        key = load_pem_private_key(content, password=None)
        certificate = x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise UserError(
            f"key: {path} does not hold a key and its certificate; `decaf federation request` makes one."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise UserError(f"key: the key in {path} is not that of the certificate in it; make a new request.")
    pem = certificate.public_bytes(Encoding.PEM)
    return Own(
        read_certificate(pem.decode(), f"certificate in {path}").name,
        pem,
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        path,
    )


@dataclass(frozen=True)
class Certificate:
    """What an agent's certificate says."""

    name: str
    pem: str
    sha256: str
    """SHA-256 of the DER bytes, as hexadecimal digits: what the others pin."""
    expires: datetime


def read_certificate(pem: str, field: str = "certificate") -> Certificate:
    """What a certificate says. It need not be valid today: see `tls.invalid`.

    Raises:
        UserError: `pem` is no certificate as `make_identity` makes it: one, self-signed, P-256, no authority, and
            for one name.
    """
    if len(pem) > _MOST:
        raise UserError(f"{field}: too large for a certificate.")
    try:
        (found,) = x509.load_pem_x509_certificates(pem.encode())
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.DNSName
        )
        common = [attribute.value for attribute in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        authority = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        key = found.public_key()
        found.verify_directly_issued_by(found)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise UserError(
            f"{field}: not one self-signed certificate; make it with `decaf federation request`."
        ) from error
    if authority or not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UserError(f"{field}: not the P-256 certificate of one agent; make it with `decaf federation request`.")
    if len(names) != 1 or common != names or not NAME.fullmatch(names[0]):
        raise UserError(
            f"{field}: it is for {', '.join(map(str, names)) or 'nobody'}, and must be for one agent's name."
        )
    return Certificate(
        names[0],
        found.public_bytes(Encoding.PEM).decode(),
        sha256(found.public_bytes(Encoding.PEM)),
        found.not_valid_after_utc,
    )


# The organiser


@dataclass(frozen=True)
class Organiser:
    """The Ed25519 key that signs a federation file."""

    private: ed25519.Ed25519PrivateKey

    @classmethod
    def make(cls, path: Path) -> Organiser:
        """A new key, written to `path` (mode 600); UserError if there is a file already."""
        private = ed25519.Ed25519PrivateKey.generate()
        write_private(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return cls(private)

    @classmethod
    def load(cls, path: Path) -> Organiser:
        """The key in `path`; UserError if the file is unsafe, or holds no such key."""
        content = read_private(path)
        try:
            private = load_pem_private_key(content, password=None)
        except ValueError as error:
            raise UserError(f"key: {path} does not hold a key.") from error
        if not isinstance(private, ed25519.Ed25519PrivateKey):
            raise UserError(f"key: {path} is not the key of an organiser (Ed25519).")
        return cls(private)

    @property
    def public(self) -> str:
        """The public key: 64 hexadecimal digits."""
        return self.private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, message: bytes) -> str:
        """The signature of `message`: 128 hexadecimal digits."""
        return self.private.sign(message).hex()


def signed_by(public: str, signature: str, message: bytes) -> bool:
    """Whether the organiser with this public key has signed `message`; false also for what is no key or signature."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), message)
    except (ValueError, InvalidSignature):
        return False
    return True


def fingerprint(public: str) -> str:
    """What people compare by telephone: 128 bits of the public key's SHA-256, in eight groups of four digits."""
    digits = hashlib.sha256(bytes.fromhex(public)).hexdigest()[:32]
    return "-".join(digits[k : k + 4] for k in range(0, 32, 4))


def read_fingerprint(text: str) -> str:
    """A typed fingerprint in the form that `fingerprint` writes; UserError if it has not 32 hexadecimal digits."""
    digits = re.sub(r"[\s:-]", "", text.lower())
    if not re.fullmatch(r"[0-9a-f]{32}", digits):
        raise UserError(
            f"trust: {text!r} is not a fingerprint: eight groups of four digits 0-9 a-f, as the organiser's "
            "`decaf federation seal` prints it."
        )
    return "-".join(digits[k : k + 4] for k in range(0, 32, 4))

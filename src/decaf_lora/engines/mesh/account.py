"""The account of an edge: which exchanges have both ends added to it?

With symmetric weights the correction of gradient tracking is a sum over edges, c_i = sum_j f_ij with f_ij = -f_ji. It
stays so only if both ends add the same exchanges to f. The record of an edge says which they were: a hash chain over
the pairs of messages that were added, `EMPTY` while f is 0. Ends whose records differ empty the account on both sides.
"""

from __future__ import annotations

import hashlib
import struct

from decaf_lora.engines.mesh.frames import DIGEST

EMPTY = bytes(DIGEST)
"""The record of an account to which nothing has been added."""


def digest(exchange: int, life: int, record: bytes, content: bytes) -> bytes:
    """The name of a message: SHA-256 over its exchange, its sender's life, the record sent with it and its payload.

    content: the SHA-256 of the payload, so that a payload that goes to many neighbours is hashed once.
    """
    return hashlib.sha256(struct.pack(">QQ", exchange, life) + record + content).digest()


def extended(record: bytes, exchange: int, lower: bytes, higher: bytes) -> bytes:
    """The record after an exchange was added.

    lower, higher: digests of the messages of the end with the lower and of the end with the higher agent number.
    """
    return hashlib.sha256(record + struct.pack(">Q", exchange) + lower + higher).digest()

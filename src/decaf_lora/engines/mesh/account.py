"""The account of an edge: which exchanges have both ends added to it?

With symmetric weights the correction of gradient tracking is a sum over edges, c_i = sum_j f_ij with f_ij = -f_ji. The
two f stay opposite only if both ends add the same exchanges. The record of an edge says which ones an end has added: it
is a hash chain over the pairs of messages, and `EMPTY` while f is 0. Where the records of the two ends differ, both
ends empty the account.
"""

from __future__ import annotations

import hashlib
import struct

from decaf_lora.engines.mesh.frames import DIGEST

EMPTY = bytes(DIGEST)
"""The record of an account to which nothing has been added."""


def digest(exchange: int, life: int, record: bytes, content: bytes) -> bytes:
    """The name of a message: a SHA-256 over all that identifies it.

    Args:
        exchange: of the message.
        life: of the sender's process (`frames.Hello`).
        record: of the edge, as sent with the message.
        content: the SHA-256 of the payload, so that a payload that goes to many neighbours is hashed once.
    """
    return hashlib.sha256(struct.pack(">QQ", exchange, life) + record + content).digest()


def extended(record: bytes, exchange: int, lower: bytes, higher: bytes) -> bytes:
    """The record of an edge after an exchange was added to its account.

    Args:
        record: before.
        exchange: the one that was added.
        lower: digest of the message of the end with the lower agent number.
        higher: digest of the message of the other end.
    """
    return hashlib.sha256(record + struct.pack(">Q", exchange) + lower + higher).digest()

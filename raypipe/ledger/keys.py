"""Who says so, and about which bytes: Ed25519 key files (RFC 8032) and digests of big vectors.

A private key is made where it is used and never leaves: a PEM file of mode 0600. Each kind of statement is signed
under a name of its own, so that a signature given for one cannot be shown for another.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from blake3 import blake3
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from raypipe.errors import ConfigError
from raypipe.ledger.offline import is_signed, under
from raypipe.security.files import write_secret

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Domain: TypeAlias = Literal["update", "head", "witness"]
MANY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Key:
    """A private key; `public` is its public half, 64 hex digits."""

    public: str
    _private: Ed25519PrivateKey = field(repr=False)

    def sign(self, domain: Domain, payload: bytes) -> str:
        """128 hex digits."""
        return self._private.sign(under(domain, payload)).hex()


def verify(public: str, domain: Domain, payload: bytes, signature: str) -> bool:
    """Whether the holder of this key signed the payload as a statement of this kind. False for anything malformed."""
    return is_signed(public, domain, payload, signature)


def fingerprint(public: str) -> str:
    """16 hex digits of sha256 of the raw public key: for people to compare. Raises ValueError if it is no key."""
    if not re.fullmatch("[0-9a-f]{64}", public):
        raise ValueError("a public key is 64 lower-case hex digits")
    return sha256(bytes.fromhex(public)).hexdigest()[:16]


def load_key(path: Path) -> Key:
    """Raises ConfigError: no such file, others can read it, not an Ed25519 key."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise ConfigError(f"key file {path} can be read by others (mode {mode:04o}): chmod 600 {path}")
            private = load_pem_private_key(file.read(), password=None)
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it is encrypted
        raise ConfigError(f"key file {path} is not an unencrypted Ed25519 private key in PEM") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise ConfigError(f"key file {path} holds a key of another kind; an Ed25519 key is needed")
    return Key(private.public_key().public_bytes_raw().hex(), private)


def load_or_make_key(path: Path) -> Key:
    """The key of this file, made there first if there is none; a file that is there is never overwritten.

    Durable when it returns. Raises ConfigError.
    """
    if not os.path.lexists(path):
        _make(path)
    return load_key(path)


def _make(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_secret(path, pem, once=True)


def digest(data: Array | bytes | bytearray | memoryview, *, threads: int | None = None) -> str:
    """`b3:` and 64 hex digits: BLAKE3 of the raw little-endian bytes; dtype and shape are not part of it.

    No copy of a contiguous array, read-only ones included. `threads` None: two for what is above 8 MiB (44 MiB take
    7 ms, not 11), else one, since a second one costs a tenth of a millisecond to start; 1 where the cores are others'.
    """
    if isinstance(data, np.ndarray):
        little = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
        data = little.reshape(-1).view(np.uint8).data
    if threads is None:
        threads = 2 if memoryview(data).nbytes > MANY_BYTES else 1
    return "b3:" + blake3(data, max_threads=threads).hexdigest()

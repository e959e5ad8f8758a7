"""Files that are there whole or not at all; secret ones made for their owner alone, refused when others can read."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from raypipe.errors import ConfigError


def write_secret(path: Path, data: bytes, mode: int = 0o600, *, once: bool = False) -> None:
    """Durable and whole or not at all; never readable by others, not even while it is written. Raises ConfigError.

    `once`: what is there stays; of two processes that start together the first one's is there for both.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        if once:
            with contextlib.suppress(FileExistsError):  # a link, unlike a rename, fails where another was first
                os.link(part, path)
        else:
            part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def sync_folder(folder: Path) -> None:
    """A new name is durable only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_secret(path: Path, what: str) -> bytes:
    """Raises ConfigError: not there, not a file, others can read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise ConfigError(f"{what} {path} can be read by others (mode {mode:04o}): chmod 600 {path}")
            return file.read()
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from None

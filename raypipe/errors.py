"""Errors, first split by whose fault it is.

    RaypipeError
    ├── ConfigError         yours: a configuration, a policy file, a command line (exit code 2, nothing started)
    ├── RunError            the run cannot begin or go on: no quorum, disk full, no cluster (exit code 1)
    └── StoreError          theirs; training goes on with the others
        ├── StoreRefused    the store's policy or its data said no
        │   ├── StoreSuperseded   a newer coordinator has the run; this one is to end
        │   └── StoreClosed       not now: it says when it may be asked again
        ├── StoreUnreachable
        └── UpdateRejected  not finite, of the wrong shape, of an unknown ticket

A message is one line: what is wrong, where, and what would be right. It never holds anything read from
private data. Every error survives pickling, since Ray carries it between processes.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from typing import Any


class RaypipeError(Exception):
    """Base of all errors that raypipe raises on purpose."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,)


class ConfigError(RaypipeError):
    """What is written down cannot be done; `problems` holds every one found, a line each."""

    exit_code = 2

    def __init__(self, message: str | Iterable[str]) -> None:
        self.problems = [message] if isinstance(message, str) else list(message)
        super().__init__("\n".join(self.problems))


class RunError(RaypipeError):
    """The run cannot begin or go on."""


class StoreError(RaypipeError):
    """One store's trouble; the run goes on without it."""


class StoreRefused(StoreError):
    """The store's own policy or data forbids what was asked."""


class StoreSuperseded(StoreRefused):
    """A coordinator of a later epoch has taken the run over: whoever hears this ends itself."""


class StoreClosed(StoreRefused):
    """Not now, by the store's own policy: nobody's fault. `wait_s` by the store's clock, then it may be asked again."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.wait_s)


class StoreUnreachable(StoreError):
    """No answer: the node, the process or the link is gone."""


class UpdateRejected(StoreError):
    """An update that must not be folded."""


FULL = (errno.ENOSPC, errno.EDQUOT)
ROOM_S = 30.0  # then a store whose disk was full is asked again


def unwritten(what: str, error: OSError) -> StoreError:
    """A store's failed write as one line without a path; where room is all it lacks, one that is tried again."""
    if error.errno in FULL:
        return StoreClosed(f"{what}: {error.strerror}; free some room there", ROOM_S)
    return StoreError(f"{what}: {error.strerror}")


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """` Did you mean 'clip'?`, or the allowed values when nothing is close."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(given, allowed, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(allowed)}." if allowed else ""

"""Who may contribute: a store's name and the key it signs with, on the coordinator's disk.

`tofu` (trust on first use) enrols the key that a store first comes with; `closed` only what was enrolled by hand.
Either way another key under a known name is refused until someone says that it is right: a store that lost its disk
and a stranger under its name look the same from here.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from raypipe.errors import ConfigError, RunError, StoreRefused, UpdateRejected
from raypipe.ledger.entries import exact
from raypipe.ledger.keys import Domain, fingerprint, verify
from raypipe.security.files import sync_folder

FILE = "roster.json"
Rule: TypeAlias = Literal["tofu", "closed"]


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Times are in seconds since the epoch; a key that is revoked stays in the list."""

    store: str
    key: str  # public
    enrolled: float
    revoked: float | None = None


@dataclass(frozen=True, slots=True)
class Roster:
    """In the order of enrolment; a store has at most one key that stands."""

    enrolments: tuple[Enrolment, ...] = ()

    def key_of(self, store: str) -> str | None:
        """The key that stands."""
        return next((e.key for e in self.enrolments if e.store == store and e.revoked is None), None)


def enroll(roster: Roster, store: str, key: str, at: float) -> Roster:
    """By hand: from now on this key, and no other, is the store's. Raises ConfigError if it is no key."""
    try:
        fingerprint(key)
    except ValueError as error:
        raise ConfigError(f"store {store}: {error}") from None
    if roster.key_of(store) == key:
        return roster
    kept = revoke(roster, store, at) if roster.key_of(store) is not None else roster
    return Roster((*kept.enrolments, Enrolment(store, key, float(at))))


def revoke(roster: Roster, store: str, at: float) -> Roster:
    """The store's key counts no more. Raises ConfigError when it has none."""
    if roster.key_of(store) is None:
        raise ConfigError(f"store {store} has no key that stands in the roster")
    return Roster(
        tuple(replace(e, revoked=float(at)) if e.store == store and e.revoked is None else e for e in roster.enrolments)
    )


def admit(roster: Roster, store: str, key: str, at: float, rule: Rule) -> Roster:
    """A store comes with a key: the roster as it is then. Raises StoreRefused."""
    standing = roster.key_of(store)
    if standing == key:
        return roster
    known = any(e.store == store for e in roster.enrolments)
    how = f"if it is right: raypipe ledger enroll {store} {key}"
    if standing is not None:
        raise StoreRefused(
            f"store {store} came with another key ({_short(key)}) than the one enrolled ({_short(standing)}); {how}"
        )
    if known:
        raise StoreRefused(f"the key of store {store} was revoked; {how}")
    if rule == "closed":
        raise StoreRefused(f"store {store} (key {_short(key)}) is not in the roster, which is closed; {how}")
    try:
        return enroll(roster, store, key, at)
    except ConfigError as error:
        raise StoreRefused(error.message) from None


def check_signature(roster: Roster, store: str, domain: Domain, payload: bytes, signature: str) -> str:
    """The store's key. Raises UpdateRejected: unknown store, revoked key, wrong signature."""
    key = roster.key_of(store)
    if key is None:
        revoked = any(e.store == store for e in roster.enrolments)
        raise UpdateRejected(f"store {store}'s key was revoked" if revoked else f"store {store} is not in the roster")
    if not verify(key, domain, payload, signature):
        raise UpdateRejected(f"the signature is not of store {store}'s enrolled key ({_short(key)})")
    return key


def load_roster(path: Path) -> Roster:
    """The roster of this file; an empty one where there is none. Raises ConfigError."""
    try:
        plain = json.loads(path.read_text("utf-8"))
        return Roster(tuple(exact(Enrolment, one) for one in plain["enrolments"]))
    except FileNotFoundError:
        return Roster()
    except OSError as error:
        raise ConfigError(f"the roster {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the roster {path} is damaged: {error}") from None


def save_roster(path: Path, roster: Roster) -> None:
    """Replaces the file, durably. Raises RunError."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            json.dump({"enrolments": [asdict(e) for e in roster.enrolments]}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"the roster {path} could not be written: {error.strerror}") from None


def change_roster(path: Path, change: Callable[[Roster], Roster]) -> Roster:
    """Read, change and write the file while no other process does; the roster as it is then.

    Raises what `change` raises, ConfigError for a damaged file, RunError when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = load_roster(path)
            after = change(before)
            if after is not before:
                save_roster(path, after)
            return after
    except OSError as error:
        raise RunError(f"the roster {path} could not be locked: {error.strerror}") from None


def _short(key: str) -> str:
    try:
        return fingerprint(key)
    except ValueError:
        return "no key"

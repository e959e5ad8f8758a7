"""Where a vault lies, and what its owner has said about it.

<vaults>/<store>/           root's; others may pass through
    vault.yaml              root's; the settings below
    code/                   root's; its own copy of raypipe, and vault.py, which starts it
    gate/vault.sock         where the actor's user, and no other, may connect
    home/                   the vault's user's alone (0700): policy.yaml, data, keys, state (outbox), budget.json

store: south
user: 990            # the number of the vault's user
actor_user: 1000     # the number of the user that Ray runs as
cpus: 1              # torch threads
gpus: 0              # share of the GPU's memory
memory_gb: 8         # beyond it an allocation fails, and the ticket with it
limits: {}           # see guard.py
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raypipe.config.schema import NAME
from raypipe.errors import ConfigError
from raypipe.placement.homes import vaults_home
from raypipe.vault.guard import Limits

Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Number: TypeAlias = Annotated[int, Field(ge=0)]
MAX_SOCKET = 107  # bytes of a unix socket's path


class Settings(BaseModel):
    """`vault.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: Annotated[str, Field(pattern=NAME.pattern)]
    user: Number
    actor_user: Number
    cpus: Positive = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    memory_gb: Positive | None = None
    limits: Limits = Limits()


def checked(said: Any, where: str) -> Settings:
    """Raises ConfigError with every problem, a line each."""
    try:
        return Settings.model_validate(said)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg'].lower()}" for e in error.errors()]
        raise ConfigError([f"{where}: {line}" for line in lines]) from None


class Place:
    """The folders of one vault."""

    def __init__(self, store: str, vaults: Path | None = None) -> None:
        if not NAME.match(store):
            raise ConfigError("a store id holds letters, digits, '.', '_' and '-', at most 63, no spaces")
        self.store = store
        self.folder = (vaults or vaults_home()) / store
        self.settings, self.code, self.home = self.folder / "vault.yaml", self.folder / "code", self.folder / "home"
        self.gate = self.folder / "gate"
        self.socket = self.gate / "vault.sock"
        if len(os.fsencode(self.socket)) > MAX_SOCKET:
            raise ConfigError(f"{self.socket}: a unix socket's path has {MAX_SOCKET} bytes at most; set RAYPIPE_VAULTS")

    def read(self) -> Settings:
        """Raises ConfigError with every problem, a line each."""
        try:
            settings = checked(yaml.safe_load(self.settings.read_text("utf-8")), str(self.settings))
        except OSError as error:
            hint = f"; first: raypipe vault install {self.store}" if isinstance(error, FileNotFoundError) else ""
            raise ConfigError(f"{self.settings} cannot be read: {error.strerror}{hint}") from None
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ConfigError(f"{self.settings} is not YAML") from None
        if settings.store != self.store:
            raise ConfigError(f"{self.settings} is of store {settings.store!r}, not of {self.store!r}")
        return settings


def changeable_by(user: int, places: Iterable[Path]) -> Path | None:
    """The first file or folder, in these places or above them, that this user could change; None: there is none.

    By owner and by mode, as far as they say; links to elsewhere are not followed.
    """
    groups = _groups(user)
    seen: set[Path] = set()
    for place in places:
        real = place.resolve()
        for above in (real, *real.parents):
            if above not in seen and above.exists():
                seen.add(above)
                if _changeable(user, groups, above.stat()):
                    return above
        if real.is_dir():
            for path, status in _under(real):
                if _changeable(user, groups, status):
                    return path
    return None


def _groups(user: int) -> set[int]:
    try:
        known = pwd.getpwuid(user)
    except KeyError:
        return {user}
    return set(os.getgrouplist(known.pw_name, known.pw_gid))


def _changeable(user: int, groups: set[int], status: os.stat_result) -> bool:
    if status.st_uid == user or user == 0:
        return True
    if status.st_mode & 0o1000 and stat.S_ISDIR(status.st_mode):
        return False  # sticky: what others own in it cannot be moved away
    return bool(status.st_mode & 0o002 or (status.st_mode & 0o020 and status.st_gid in groups))


def _under(folder: Path) -> Iterator[tuple[Path, Any]]:
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                hidden = entry.name.startswith(".") and entry.is_file(follow_symlinks=False)  # a lock: never imported
                if not entry.is_symlink() and not hidden:
                    yield Path(entry.path), entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)

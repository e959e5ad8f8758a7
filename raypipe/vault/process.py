"""A vault's own process, from root's or its user's shell to the gate.

start     becomes `python -I <vault>/code/vault.py <vault>`, with an empty environment
main      (from vault.py) looks whether the walls stand, gives up root, shuts what can be shut, serves
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

from raypipe.errors import ConfigError
from raypipe.placement.plan import KEEP_FREED_MEMORY
from raypipe.vault.place import Place, Settings, changeable_by

PATH = "/usr/local/bin:/usr/bin:/bin"
NO_DUMPS, NO_NEW_PRIVILEGES = 4, 38  # linux/prctl.h


def start(place: Place) -> NoReturn:
    """Become the vault. Raises ConfigError when there is none."""
    place.read()
    command = [sys.executable, "-I", "-B", str(place.code / "vault.py"), str(place.folder)]
    os.chdir(place.folder)
    os.execve(command[0], command, environment())


def environment() -> dict[str, str]:
    """The vault's own, nothing of the caller's but which GPUs there are; also what the unit file sets."""
    devices = {key: value for key, value in os.environ.items() if key in ("CUDA_VISIBLE_DEVICES",)}
    return {"PATH": PATH, "LANG": "C.UTF-8", **KEEP_FREED_MEMORY, **devices}


def check(place: Place, settings: Settings) -> None:
    """Raises ConfigError when the vault's walls have a hole. What else its Python imports, it looks at itself."""
    if os.geteuid() not in (0, settings.user):
        raise ConfigError(f"the vault of store {place.store} is started by root or by user {settings.user}")
    try:
        status = place.home.stat()
    except OSError as error:
        raise ConfigError(f"{place.home}: {error.strerror}") from None
    if status.st_uid != settings.user or status.st_mode & 0o077:
        raise ConfigError(f"{place.home} has to be user {settings.user}'s alone: chown {settings.user}, chmod 700")
    check_code(settings, [place.settings, place.code])


def check_code(settings: Settings, code: list[Path]) -> None:
    """Raises ConfigError when the actor's user could change any of it."""
    if settings.user == settings.actor_user:
        return  # a trial, as `install --same-user` has said
    if (hole := changeable_by(settings.actor_user, code)) is not None:
        raise ConfigError(
            f"user {settings.actor_user}, the actor's, could change {hole}, and with it what the vault runs; "
            "install Python and raypipe for the vault where only root can write"
        )


def main(folder: Path) -> int:
    """The vault, in a process that is nothing else. Raises ConfigError."""
    place = Place(folder.name, folder.parent)
    settings = place.read()
    check(place, settings)
    check_code(settings, [Path(sys.executable), *(Path(path) for path in sys.path if Path(path).exists())])
    give_up_root(settings)
    harden(settings)
    from raypipe.vault.open import open_gate  # torch is imported as the vault's user

    gate = open_gate(place, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: gate.stop())
    gate.serve(place.socket)
    return 0


def give_up_root(settings: Settings) -> None:
    """For good: real, effective and saved user, and every group."""
    if os.geteuid() == 0 and settings.user != 0:
        os.setgroups([])
        os.setresgid(settings.user, settings.user, settings.user)
        os.setresuid(settings.user, settings.user, settings.user)
    if os.geteuid() != settings.user:
        raise ConfigError(f"the vault runs as user {settings.user}, this is user {os.geteuid()}")


def harden(settings: Settings) -> None:
    """No core dumps, no tracing, no new rights, nothing readable by others, memory as the owner allows."""
    os.umask(0o077)
    control = ctypes.CDLL(None, use_errno=True).prctl
    control(NO_DUMPS, 0, 0, 0, 0)
    control(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.memory_gb is not None:
        most = int(settings.memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

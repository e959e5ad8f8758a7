"""`raypipe vault install|start|status STORE`: for whoever owns a store's machine."""

from __future__ import annotations

import argparse
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raypipe.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from raypipe.vault.place import Place

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_parsers(subparsers: Parsers) -> None:
    """The verb `vault`. Handlers raise ConfigError."""
    help = "keep a store's data behind another user's process"
    verbs = subparsers.add_parser("vault", help=help, description=help, allow_abbrev=False)
    verbs = verbs.add_subparsers(required=True, metavar="VERB")  # type: ignore[assignment]
    made = _verb(verbs, "install", vault_install, "make a store's vault, or renew its code; as root")
    made.add_argument("--user", help="whose the vault is: a name or a number")
    made.add_argument("--actor-user", help="whom Ray runs as on this node: a name or a number")
    made.add_argument("--same-user", action="store_true", help="a trial without root, which protects nothing")
    made.add_argument("--from", dest="source", type=Path, help="a folder with a policy.yaml and its data, copied in")
    made.add_argument("--cpus", type=float)
    made.add_argument("--gpus", type=float)
    made.add_argument("--memory-gb", type=float)
    _verb(verbs, "start", vault_start, "become a store's vault, in the foreground")
    _verb(verbs, "status", vault_status, "say whether a store's vault answers, and whether its walls stand")


def _verb(verbs: Any, name: str, handler: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    sub: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=lambda options, *_: handler(options))
    sub.add_argument("store", metavar="STORE")
    return sub


def vault_install(options: argparse.Namespace) -> int:
    from raypipe.ledger.keys import load_key
    from raypipe.vault.install import install, key_file
    from raypipe.vault.place import Place, checked

    place = Place(options.store)
    said = {"store": options.store, **_users(options, place)}
    wanted = {"cpus": options.cpus, "gpus": options.gpus, "memory_gb": options.memory_gb}
    said |= {key: value for key, value in wanted.items() if value is not None}
    settings = checked(said, "vault install")
    if options.source is not None and not (options.source / "policy.yaml").is_file():
        raise ConfigError(f"--from {options.source}: there is no policy.yaml")
    install(place, settings, options.source)
    print(f"{place.folder}: user {settings.user}; the actor's is user {settings.actor_user}")
    public = load_key(key_file(place)).public
    print(f"its key is new to a head that knew the store before: raypipe ledger enroll {place.store} {public}")
    if settings.user == settings.actor_user:
        print("a trial: with one user for both, nothing is protected")
    elif options.source is not None:
        print(f"now remove {options.source}: it is still there for whoever can read it")
    print(f"start it: {place.folder}/start.sh or the unit beside it; then say store.transport: vault in the run's YAML")
    return 0


def _users(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """The settings that are there already, or the users that are named now."""
    if options.same_user:
        return {"user": os.geteuid(), "actor_user": os.geteuid()}
    named = {"user": options.user, "actor_user": options.actor_user}
    if place.settings.exists() and not any(named.values()):
        return place.read().model_dump(exclude_unset=True)
    if not all(named.values()):
        raise ConfigError("name both users: --user VAULT --actor-user RAY (or --same-user for a trial)")
    numbers = {key: _number(name) for key, name in named.items()}
    if numbers["user"] == numbers["actor_user"]:
        raise ConfigError("the vault's user and the actor's have to differ; --same-user for a trial")
    return dict(numbers)


def _number(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"there is no user {user!r} on this machine") from None


def vault_start(options: argparse.Namespace) -> int:
    from raypipe.vault.place import Place
    from raypipe.vault.process import start

    start(Place(options.store))


def vault_status(options: argparse.Namespace) -> int:
    """0: it answers and its walls stand."""
    from raypipe.store.code import code_hash
    from raypipe.vault.client import VaultSite
    from raypipe.vault.place import Place
    from raypipe.vault.process import check

    place = Place(options.store)
    settings = place.read()
    if os.geteuid() not in (0, settings.actor_user):
        raise ConfigError(f"ask as root or as user {settings.actor_user}: the vault answers nobody else")
    problems = []
    if os.geteuid() == 0:
        try:
            check(place, settings)
        except ConfigError as error:
            problems.append(error.message)
    site = VaultSite(place.socket, place.store, patience_s=0)
    try:
        with _as_user(settings.actor_user):
            card = site.describe()
        installed = code_hash(place.code / "raypipe")
        print(f"{place.store}: answers, speaks protocol {card.protocol}, code {card.code[:16]}")
        print("data: " + (", ".join(f"{name} {sum(counts.values())}" for name, counts in card.data.items()) or "none"))
        if card.code != installed:
            problems.append(f"it runs code {card.code[:16]}, installed is {installed[:16]}: restart it")
    except StoreError as error:
        problems.append(error.message)
    finally:
        site.close()
    if settings.user == settings.actor_user:
        problems.append("a trial: with one user for both, nothing is protected")
    for problem in problems:
        print(f"{place.store}: {problem}")
    return 1 if problems else 0


@contextmanager
def _as_user(user: int) -> Iterator[None]:
    """Connect as the actor's user would: the kernel tells the vault the effective one."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(before)

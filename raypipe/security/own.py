"""What this process would show at a cluster's door, looked at before it knocks: Ray's own words for it are few."""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from raypipe.errors import ConfigError
from raypipe.placement.homes import raypipe_home
from raypipe.security.certs import check_cert, load_cert
from raypipe.security.files import read_secret, write_secret

Check: TypeAlias = Callable[[Path], object]


def check_own(environment: Mapping[str, str], now: datetime.datetime) -> list[str]:
    """Names of what was looked at; none: the environment shows nothing at a door.

    Raises ConfigError, a line each: a token or key that others can read, a certificate that has ended, no file.
    """
    problems: list[str] = []
    due = list(_due(environment, now))
    for name, check in due:
        if not environment.get(name):
            problems.append(f"RAY_USE_TLS is set and {name} is not")
            continue
        try:
            check(Path(environment[name]).expanduser())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return [name for name, _ in due]


def show_local_token(*, make: bool) -> None:
    """Keep strangers out of the Ray that raypipe starts on this machine, which listens on every address it has.

    One token a user, in a file of his own, so that `raypipe stop` gets in. Call it before Ray is imported, which reads
    the mode then. Nothing where the user said how to get in, or, unless `make`, where there is no token.
    """
    path = raypipe_home() / "local.token"
    if "RAY_AUTH_MODE" in os.environ or not (make or path.exists()):
        return
    if not path.exists():
        write_secret(path, secrets.token_hex(32).encode(), once=True)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def _due(environment: Mapping[str, str], now: datetime.datetime) -> Iterator[tuple[str, Check]]:
    if environment.get("RAY_AUTH_MODE") == "token" and environment.get("RAY_AUTH_TOKEN_PATH"):
        yield "RAY_AUTH_TOKEN_PATH", lambda path: read_secret(path, "token")
    if environment.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        yield "RAY_TLS_SERVER_KEY", lambda path: read_secret(path, "key file")
        yield "RAY_TLS_SERVER_CERT", lambda path: check_cert(path, now)
        yield "RAY_TLS_CA_CERT", load_cert

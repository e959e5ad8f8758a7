"""What this process would show at a cluster's door, looked at before it knocks: Ray's own words for it are few."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from raypipe.errors import ConfigError
from raypipe.security.certs import check_cert, load_cert
from raypipe.security.files import read_secret

Check: TypeAlias = Callable[[Path], object]


def check_own(environment: Mapping[str, str], now: datetime.datetime) -> None:
    """Raises ConfigError, a line each: a token or key that others can read, a certificate that has ended, no file."""
    problems: list[str] = []
    for name, check in _due(environment, now):
        if not environment.get(name):
            problems.append(f"RAY_USE_TLS is set and {name} is not")
            continue
        try:
            check(Path(environment[name]).expanduser())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _due(environment: Mapping[str, str], now: datetime.datetime) -> Iterator[tuple[str, Check]]:
    if environment.get("RAY_AUTH_MODE") == "token" and environment.get("RAY_AUTH_TOKEN_PATH"):
        yield "RAY_AUTH_TOKEN_PATH", lambda path: read_secret(path, "token")
    if environment.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        yield "RAY_TLS_SERVER_KEY", lambda path: read_secret(path, "key file")
        yield "RAY_TLS_SERVER_CERT", lambda path: check_cert(path, now)
        yield "RAY_TLS_CA_CERT", load_cert

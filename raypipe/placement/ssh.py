"""One command on another machine by OpenSSH, and why it failed in one line.

Unlike Ray's own runner a machine's key is remembered at first contact and a changed one refused
(StrictHostKeyChecking=accept-new): whoever stands in the way of a later contact is found.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from raypipe.errors import RaypipeError
from raypipe.placement.homes import raypipe_home

SSH_FAILED = 255  # ssh's own exit code; any other is the command's
REASONS = {  # the first that fits: of a key that it could not read ssh goes on to say that it was refused
    "not accessible:": "the key file{key} is not there, or not yours to read",
    "bad permissions": "the key file{key} can be read by others: chmod 600 it",
    "permission denied": "it refused the key{key}: is its public half in ~/.ssh/authorized_keys of {user} there?",
    "host key verification failed": "its host key is another than before: if that is right, remove it from {known}",
    "could not resolve": "no machine has that name",
    "name or service not known": "no machine has that name",
    "connection refused": "nothing answers on its ssh port: is sshd running there?",
    "no route to host": "no way leads there: is it on, and in the same network?",
    "timed out": "no answer in {timeout_s:g} s: is it on, and may this machine reach it?",
}


class SshError(RaypipeError):
    """A machine that could not be reached, or a command that failed there."""


@dataclass(frozen=True, slots=True)
class Login:
    """How to get in. `key` None: ssh's own default keys and agent."""

    user: str
    key: str | None = None
    known: Path = field(default_factory=lambda: raypipe_home() / "known_hosts")


def options(login: Login, timeout_s: float) -> dict[str, str]:
    """ssh's `-o` options; it never asks for a password."""
    login.known.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return {
        "BatchMode": "yes",
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": str(login.known),
        "ConnectTimeout": f"{max(1, round(timeout_s))}",
        "ServerAliveInterval": "5",
        "ServerAliveCountMax": "3",
        "LogLevel": "ERROR",
    }


def arguments(login: Login, host: str, command: str, timeout_s: float = 10.0) -> list[str]:
    """The whole command line."""
    said = [f"-o{key}={value}" for key, value in options(login, timeout_s).items()]
    if login.key:
        said += ["-oIdentitiesOnly=yes", "-i", str(Path(login.key).expanduser())]
    return ["ssh", *said, f"{login.user}@{host}", "--", command]


def run(login: Login, host: str, command: str, *, timeout_s: float = 10.0, data: bytes = b"") -> str:
    """What the command printed; `data` is its input. Raises SshError in one line.

    `timeout_s` is for the connection; the command may take a minute longer.
    """
    try:
        done = subprocess.run(
            arguments(login, host, command, timeout_s), input=data, capture_output=True, timeout=timeout_s + 60
        )
    except subprocess.TimeoutExpired:
        raise SshError(f"{host}: {_short(command)} did not end in {timeout_s + 60:g} s") from None
    except OSError as error:
        raise SshError(f"ssh could not be started here: {error.strerror}") from None
    if done.returncode:
        raise SshError(explain(login, host, command, done.returncode, done.stderr.decode(errors="replace"), timeout_s))
    return done.stdout.decode(errors="replace")


def explain(login: Login, host: str, command: str, code: int, said: str, timeout_s: float) -> str:
    """A line for what ssh says in several."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code != SSH_FAILED:
        return f"{host}: {_short(command)} failed with code {code}: {lines[-1] if lines else 'it said nothing'}"
    for token, reason in REASONS.items():
        if token in said.lower():
            key = f" {login.key}" if login.key else ""
            text = reason.format(key=key, user=login.user, known=login.known, timeout_s=timeout_s)
            return f"{host}: {text}"
    return f"{host}: ssh failed: {lines[-1] if lines else 'it said nothing'}"


def _short(command: str) -> str:
    line = " ".join(command.split())
    return shlex.quote(line if len(line) < 60 else line[:57] + "...")

"""What one node says of itself, and what it can reach. Runs on the node; plain Python, Linux."""

from __future__ import annotations

import datetime
import http.client
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError, RaypipeError, StoreError
from raypipe.ledger.keys import digest
from raypipe.ledger.offline import canonical
from raypipe.ledger.receipts import write_apart
from raypipe.placement.homes import raypipe_home, stores_home, vaults_home
from raypipe.store.code import code_hash

PACKAGES = ("ray", "torch", "torchvision", "numpy", "msgpack", "cryptography")
CONNECT_S = 3.0
VAULT_S = 2.0  # in which a vault that is being started answers
LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


@dataclass(frozen=True, slots=True)
class Data:
    """One data set of a store: images of each split and the hash of all."""

    store: str
    name: str
    counts: dict[str, int]
    digest: str


@dataclass(frozen=True, slots=True)
class Facts:
    """A node's own word. `ports`: of Ray's processes, those that listen on more than loopback.

    `vaults`: of stores that are behind one, the hash of the code that it says it runs.
    """

    host: str
    at: float
    versions: dict[str, str]
    code: str
    gpus: tuple[str, ...]
    free_bytes: int
    shm_bytes: int
    data: tuple[Data, ...]
    troubles: tuple[str, ...]
    auth: str
    tls: bool
    cert_days: float | None
    ports: tuple[tuple[int, str], ...]
    vaults: tuple[tuple[str, str], ...] = ()


def look_around(stores: Sequence[str], now: datetime.datetime) -> Facts:
    """Of this node, which has these stores' data."""
    data, vaults, troubles = _data(stores)
    days, trouble = _cert_days(now)
    disks = [vaults_home() if _vaulted(store) else stores_home() for store in stores] or [raypipe_home()]
    return Facts(
        host=socket.gethostname(),
        at=time.time(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        code=code_hash(),
        gpus=_gpus(),
        free_bytes=min(shutil.disk_usage(_existing(disk)).free for disk in disks),
        shm_bytes=shutil.disk_usage("/dev/shm").free,
        data=tuple(data),
        troubles=(*troubles, *trouble),
        auth=os.environ.get("RAY_AUTH_MODE", "disabled"),
        tls=os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"),
        cert_days=days,
        ports=tuple(listening()),
        vaults=tuple(vaults),
    )


def reach(targets: Iterable[tuple[str, int]]) -> list[tuple[str, int, str]]:
    """Those that do not take a connection, and why."""

    def knock(target: tuple[str, int]) -> tuple[str, int, str] | None:
        try:
            socket.create_connection(target, CONNECT_S).close()
        except OSError as error:
            return (*target, "no answer" if isinstance(error, TimeoutError) else str(error.strerror or error))
        return None

    with ThreadPoolExecutor(64) as pool:
        return [one for one in pool.map(knock, targets) if one]


def http_answers(host: str, ports: Iterable[int]) -> dict[int, str]:
    """What a plain GET gets by port, where one speaks HTTP at all; no credentials are shown.

    `metrics`, or `HTTP 200`, `HTTP 401` and so on.
    """

    def ask(port: int) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection(host, port, timeout=CONNECT_S)
        try:
            connection.request("GET", "/api/jobs/")
            answer = connection.getresponse()
            metrics = answer.read(64).lstrip().startswith((b"# HELP", b"# TYPE"))
            return port, "metrics" if metrics else f"HTTP {answer.status}"
        except (OSError, http.client.HTTPException):
            return port, None
        finally:
            connection.close()

    with ThreadPoolExecutor(64) as pool:
        return {port: said for port, said in pool.map(ask, ports) if said is not None}


def listening() -> list[tuple[int, str]]:
    """(port, program) of this user's Ray processes that others could reach."""
    open_to_others = {}
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                host, _, port = fields[1].partition(":")
                if fields[3] == LISTEN and host not in LOOPBACK and not (len(host) == 8 and host.endswith("7F")):
                    open_to_others[fields[9]] = int(port, 16)
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "ray" not in name or "sshd" in name:
                continue
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    inode = os.readlink(link).removeprefix("socket:[").rstrip("]")
                    if inode in open_to_others:
                        found.add((open_to_others[inode], _program(name)))
    return sorted(found)


def _program(command: str) -> str:
    for token, name in (
        ("gcs_server", "control service"),
        ("raylet/raylet", "raylet"),
        ("dashboard/agent", "dashboard agent"),
        ("runtime_env", "runtime environment agent"),
        ("dashboard.py", "dashboard"),
        ("ray_client_server", "client server"),
        ("util.client.server", "client server"),
        ("monitor.py", "autoscaler"),
        ("ray::", "worker"),
    ):
        if token in command:
            return name
    return command[:40].strip()


def _data(stores: Sequence[str]) -> tuple[list[Data], list[tuple[str, str]], list[str]]:
    """Data sets, (store, code) of those behind a vault, what is wrong."""
    data, vaults, troubles = list[Data](), [], []
    for store in stores:
        try:
            if _vaulted(store):  # which writes its own receipts
                found, code = _of_vault(store)
                vaults.append((store, code))
            else:
                found = _told_of(store)
            data += found
        except RaypipeError as error:
            troubles.append(f"store {store}: {error.message.splitlines()[0]}")
    return data, vaults, troubles


def _told_of(store: str) -> list[Data]:
    """What its policy offers, with a receipt at the store, and so for why that cannot be told. Raises RaypipeError."""
    try:
        found = _of_policy(store)
    except RaypipeError as error:
        with suppress(StoreError):  # a line of ours: it holds nothing that may not leave
            _receipt(store, error.message.splitlines()[0])
        raise
    _receipt(store, [asdict(one) for one in found])
    return found


def _receipt(store: str, told: Any) -> None:
    """Raises StoreError (disk full): then it may not leave."""
    if (home := stores_home() / store).is_dir():
        raw = canonical(told)
        about = {"kind": "doctor", "run": "", "ticket": "", "why": "somebody looked the cluster over: raypipe doctor"}
        write_apart(home / "egress", at=time.time(), num_bytes=len(raw), digest=digest(raw), **about)


def _vaulted(store: str) -> bool:
    """By the vault's public description; what it guards is not this user's to look at."""
    return os.path.exists(vaults_home() / store / "vault.yaml")


def _of_vault(store: str) -> tuple[list[Data], str]:
    from raypipe.vault.client import VaultSite
    from raypipe.vault.place import Place

    place = Place(store)
    place.read()
    site = VaultSite(place.socket, store, patience_s=VAULT_S)
    try:
        card = site.describe()
    finally:
        site.close()
    if not card.data:
        raise StoreError("its vault has no data set that can be read; the log in the vault's home says why")
    return [Data(store, name, dict(counts), card.data_hashes[name]) for name, counts in card.data.items()], card.code


def _of_policy(store: str) -> list[Data]:
    from raypipe.data.dataset import open_data
    from raypipe.store.policy import read_policy

    policy = read_policy(stores_home() / store)
    if policy.store != store:
        raise ConfigError(f"its policy file is of store {policy.store}")
    opened = {name: open_data(e.folder, name=name, reader=e.reader) for name, e in policy.data.items()}
    return [Data(store, name, dict(found.counts), found.content_hash) for name, found in opened.items()]


def _cert_days(now: datetime.datetime) -> tuple[float | None, list[str]]:
    from raypipe.security.certs import load_cert
    from raypipe.security.own import check_own

    days, troubles = None, []
    try:
        check_own(os.environ, now)
    except ConfigError as error:
        troubles = list(error.problems)
    if path := os.environ.get("RAY_TLS_SERVER_CERT"):
        with suppress(ConfigError):
            days = (load_cert(Path(path).expanduser()).not_valid_after_utc - now).total_seconds() / 86400
    return days, troubles


def _gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip()) if not done.returncode else ()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _existing(path: Path) -> Path:
    while not path.exists() and path != path.parent:
        path = path.parent
    return path

"""`raypipe certs ...`: make and renew what the nodes need, send each its own, say how long it holds."""

from __future__ import annotations

import argparse
import datetime
import io
import ipaddress
import os
import socket
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

from raypipe.errors import ConfigError, RunError
from raypipe.placement.homes import raypipe_home
from raypipe.placement.ssh import Login, SshError, run
from raypipe.security.files import write_secret

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
FILES = {"node.key": 0o600, "node.crt": 0o644, "ca.crt": 0o644, "token": 0o600}
UNPACK = "umask 077 && mkdir -p ~/.raypipe/tls && chmod 700 ~/.raypipe/tls && tar -xpf - -C ~/.raypipe/tls"


def add_parsers(subparsers: Parsers) -> None:
    """The verb `certs`; handlers raise RaypipeError and return an exit code."""
    help = "make and renew the cluster's certificates and token, and send each node its own"
    certs = subparsers.add_parser("certs", help=help, description=help, allow_abbrev=False)
    verbs = certs.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, handler: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=lambda options, *_: handler(options))
        sub.add_argument("--folder", type=Path, help="of the CA; default: $RAYPIPE_HOME/certs, else ~/.raypipe/certs")
        return sub

    make = verb("make", certs_make, "make what is missing, renew what ends soon or names another address")
    send = verb("send", certs_send, "give each node its own files, over ssh, into ~/.raypipe/tls there")
    for sub in (make, send):
        sub.add_argument("stores", type=Path, metavar="STORES.csv")
        sub.add_argument("--head", required=True, metavar="HOST")
    make.add_argument("--new-token", action="store_true", help="a new token; every node needs it before it can meet")
    make.add_argument("--all", action="store_true", help="renew every node's certificate")
    send.add_argument("--user", default="raypipe")
    send.add_argument("--key", help="ssh private key; default: ssh's own")
    send.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these stores, or 'head'")
    verb("show", certs_show, "how long each certificate holds; exit code 1 if one has ended")
    help = "token, key and certificate as the environment names them, before a node shows them; exit code 2"
    check = verbs.add_parser("check", help=help, description=help, allow_abbrev=False)
    check.set_defaults(run=lambda *_: certs_check())
    node = verb("node", certs_node, "a certificate for this very machine, where the CA's folder is (images, clouds)")
    node.add_argument("--out", type=Path, required=True)
    node.add_argument("--address", nargs="+", default=[], help="names and addresses; default: this machine's own")


def certs_make(options: argparse.Namespace) -> int:
    """Again and again, from a timer say: what is good is left alone."""
    from raypipe.security.certs import fingerprint, make_node, open_authority, still_good, token_of

    folder, now = _folder(options), _now()
    authority = open_authority(folder, now)
    token = token_of(folder, anew=options.new_token)
    made = kept = 0
    for name, host in _hosts(options).items():
        place, addresses = folder / "nodes" / name, [host] if _is_address(host) else [host, *_look_up(host)]
        if not options.all and still_good(place, addresses, authority, now):
            kept += 1
        else:
            make_node(authority, place, name, addresses, now)
            made += 1
        write_secret(place / "token", token)
    print(f"{made} certificates made, {kept} kept; CA {fingerprint(authority.cert)} in {folder}")
    return 0


def certs_send(options: argparse.Namespace) -> int:
    """Side by side; 1 where a node did not take its files."""
    folder, login = _folder(options), Login(options.user, options.key)
    hosts = {name: host for name, host in _hosts(options).items() if not options.only or name in options.only}
    if unknown := sorted(set(options.only) - hosts.keys()):
        raise ConfigError(f"--only {unknown[0]}: no such store in {options.stores}")
    packed = {name: _pack(folder / "nodes" / name) for name in hosts}

    def send(name: str) -> str | None:
        try:
            run(login, hosts[name], UNPACK, data=packed[name])
        except SshError as error:
            return f"{name}: {error}"
        return None

    with ThreadPoolExecutor(32) as pool:
        failed = [line for line in pool.map(send, hosts) if line]
    print(f"{len(hosts) - len(failed)} of {len(hosts)} nodes have their files")
    if failed:
        raise RunError("\n".join(failed))
    return 0


def certs_show(options: argparse.Namespace) -> int:
    """A line a node, the one that ends first at the top."""
    from raypipe.security.certs import fingerprint, load_cert, standing

    folder, now = _folder(options), _now()
    ca = load_cert(folder / "ca.crt")
    print(f"CA {fingerprint(ca)}, until {ca.not_valid_after_utc:%Y-%m-%d}")
    found = [standing(place, now) for place in sorted((folder / "nodes").glob("*"))]
    for one in sorted(found, key=lambda one: one.days_left):
        left = f"{one.days_left:.0f} days" if one.days_left > 0 else "ENDED"
        print(f"{one.name:24} {left:>10}  {', '.join(one.addresses)}")
    return 1 if any(one.days_left <= 0 for one in found) else 0


def certs_check() -> int:
    """For the supervisors: Ray's own words for a certificate that has ended are few. Raises ConfigError."""
    from raypipe.security.own import check_own

    if not (looked_at := check_own(os.environ, _now())):
        raise ConfigError("the environment names no token and no certificate (RAY_AUTH_MODE, RAY_USE_TLS)")
    print(f"well: {', '.join(looked_at)}")
    return 0


def certs_node(options: argparse.Namespace) -> int:
    """Where nodes come and go under addresses that nobody knows before."""
    from raypipe.security.certs import make_node, open_authority, token_of

    folder = _folder(options)
    if not (folder / "ca.key").exists():
        raise ConfigError(f"{folder / 'ca.key'} is missing: the CA is made by raypipe certs make")
    addresses = options.address or _own_addresses()
    make_node(open_authority(folder, _now()), options.out, socket.gethostname(), addresses, _now())
    write_secret(options.out / "token", token_of(folder))
    print(f"certificate for {', '.join(addresses)} in {options.out}")
    return 0


def _hosts(options: argparse.Namespace) -> dict[str, str]:
    from raypipe.placement.inventory import HEAD, read_machines

    machines = read_machines(options.stores, options.head)
    return {HEAD: options.head} | {machine.store: machine.host for machine in machines}


def _pack(place: Path) -> bytes:
    """A tar archive with each file in the mode that it has to have."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, mode in FILES.items():
            try:
                data = (place / name).read_bytes()
            except OSError as error:
                raise ConfigError(f"{place / name}: {error.strerror}; first: raypipe certs make") from None
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _look_up(host: str) -> Sequence[str]:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(host, None)})
    except OSError:
        raise ConfigError(f"host {host}: no machine has that name; a certificate names addresses") from None


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _own_addresses() -> list[str]:
    """The address by which this machine would reach others; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return [str(probe.getsockname()[0]), socket.gethostname()]


def _folder(options: argparse.Namespace) -> Path:
    folder: Path = options.folder or raypipe_home() / "certs"
    return folder


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)

"""Who gets in at a cluster's front door: asked as a stranger would, not read from a setting."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a stranger's failed handshake is what is looked for

import grpc
from ray.core.generated import gcs_service_pb2
from ray.core.generated import gcs_service_pb2_grpc as services

from raypipe.errors import ConfigError, RunError

ANSWER_S = 5.0
SIOCGIFADDR = 0x8915  # Linux: a network card's address
asked: Any = gcs_service_pb2  # generated, without types
TLS_FILES = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")


@dataclass(frozen=True, slots=True)
class Doors:
    """Whether a stranger is kept out: by the certificate that he has not, by the token that he has not."""

    tls: bool
    token: bool


def look(address: str) -> Doors:
    """Of a cluster's control service, HOST:PORT, which is known to answer. Raises RunError if nothing can be said."""
    plain = _knock(_channel(address, tls=False))
    if plain is not grpc.StatusCode.UNAVAILABLE:
        return Doors(False, plain is not grpc.StatusCode.OK)
    behind = _knock(_channel(address, tls=True))
    if behind is grpc.StatusCode.UNAVAILABLE:
        raise RunError(f"the cluster at {address} did not take this machine's certificate: raypipe certs show")
    return Doors(True, behind is not grpc.StatusCode.OK)


def refuse_misfit(address: str) -> None:
    """Before Ray tries for half a minute: what its control service wants of this process and does not get.

    Raises RunError in one line.
    """
    tls_here = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    speaks_tls = _knock(_channel(address, tls=False)) is grpc.StatusCode.UNAVAILABLE
    if speaks_tls and not tls_here:
        raise RunError(f"the cluster at {address} speaks TLS: set RAY_USE_TLS=1 and {', '.join(TLS_FILES)}")
    if tls_here and not speaks_tls:
        raise RunError(f"the cluster at {address} does not speak TLS, and RAY_USE_TLS is set here")
    doors = look(address)
    if doors.token and os.environ.get("RAY_AUTH_MODE") != "token":
        raise RunError(f"the cluster at {address} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH")
    if doors.token and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        shown = (("authorization", f"Bearer {_read(path).decode().strip()}"),)
        if _knock(_channel(address, tls_here), shown) is grpc.StatusCode.UNAUTHENTICATED:
            raise RunError(f"the cluster at {address} has another token than {path}")


def refuse_open(address: str) -> None:
    """Raises ConfigError when a cluster that others can reach lets strangers run code on every node.

    Ray's control service listens on every address of its machine, whichever the cluster goes by. Where that is
    loopback a token will do: what goes over the wire there nobody else hears.
    """
    host, port = address.rpartition(":")[::2]
    inside = host.startswith("127.") or host.strip("[]") in {"localhost", "::1"}
    seen = next((own for own in _own_addresses() if _listens(own, int(port))), None) if inside else host
    if seen is None:
        return
    doors = look(address)
    closed = {"token authentication": doors.token, "TLS": doors.tls or inside}
    lacks = [name for name, is_closed in closed.items() if not is_closed]
    if lacks:
        raise ConfigError(
            f"the cluster at {address}{f', which answers at {seen} too,' if inside else ''} is open: "
            f"no {' and no '.join(lacks)}; whoever reaches it runs code on every store. "
            "See `raypipe certs` and cluster/, or say --insecure"
        )


def _own_addresses() -> list[str]:
    """By which others may reach this machine: IPv4, of each network card."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                asked_for = name.encode()[:15].ljust(256, b"\0")
                found.append(socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, asked_for)[20:24]))
    return [one for one in found if not one.startswith("127.")]


def _listens(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), ANSWER_S).close()
        return True
    return False


def _channel(address: str, tls: bool) -> grpc.Channel:
    if not tls:
        return grpc.insecure_channel(address)
    try:
        cert, key, ca = (_read(os.environ[name]) for name in TLS_FILES)
    except KeyError as error:
        raise RunError(f"the cluster at {address} speaks TLS, and {error.args[0]} is not set here") from None
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, cert))


def _knock(channel: grpc.Channel, shown: Sequence[tuple[str, str]] = ()) -> grpc.StatusCode:
    try:
        stub = services.NodeInfoGcsServiceStub(channel)
        stub.CheckAlive(asked.CheckAliveRequest(), timeout=ANSWER_S, metadata=shown)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return grpc.StatusCode.UNAVAILABLE if code is grpc.StatusCode.DEADLINE_EXCEEDED else code
    finally:
        channel.close()
    return grpc.StatusCode.OK


def _read(path: str) -> bytes:
    with open(os.path.expanduser(path), "rb") as file:
        return file.read()

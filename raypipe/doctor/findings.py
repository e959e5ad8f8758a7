"""From what the nodes said to what is wrong: pure, a line each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from raypipe.doctor.probe import Facts

SKEW_S = 2.0  # tickets carry deadlines, certificates and the ledger times
LEAST_FREE = 2 << 30
LEAST_SHM = 256 << 20
CERT_DAYS = 14
SLOW_MBS = 0.5  # 4 Mbit/s: an update of a few MB would take longer than most tickets
CLOSED = ("HTTP 401", "HTTP 403", "HTTP 404", "HTTP 405")  # a GET without credentials of what lists jobs
Level: TypeAlias = Literal["WRONG", "note"]


@dataclass(frozen=True, slots=True)
class Seen:
    """One node as the doctor saw it. `offered`: its resources; `link` None: it did not answer."""

    node: str
    address: str
    is_head: bool
    stores: tuple[str, ...]
    offered: Mapping[str, float]
    facts: Facts | None
    trouble: str = ""
    skew_s: float = 0.0  # ahead of the doctor's clock; sure to half the round trip
    ping_ms: float = 0.0
    down_mbs: float = 0.0  # to the node, MB/s
    up_mbs: float = 0.0
    unreached: tuple[tuple[str, int, str], ...] = ()
    http: Mapping[int, str] = field(default_factory=dict)  # what a GET without credentials gets, by port
    open_ports: tuple[int, ...] = ()  # gRPC that answers a stranger
    left: bool = False  # while it was looked at: an idle node may


@dataclass(frozen=True, slots=True)
class Finding:
    """`who`: a node's address, or the cluster."""

    level: Level
    who: str
    line: str


def stayed(seen: Sequence[Seen], alive: Collection[str]) -> list[Seen]:
    """What was seen, and who of them left meanwhile (`alive`: node ids): that others cannot reach those is no fault."""
    gone = {one.address for one in seen} - {one.address for one in seen if one.node in alive}
    return [
        replace(one, left=one.node not in alive, unreached=tuple(door for door in one.unreached if door[0] not in gone))
        for one in seen
    ]


def findings(
    seen: Sequence[Seen], wanted: Sequence[str], loopback: bool, troubles: Mapping[str, str] = MappingProxyType({})
) -> list[Finding]:
    """Everything, the worst first. `wanted`: stores that a configuration names; `loopback`: nobody else is near.

    `troubles`: stores whose node the autoscaler tries to start and cannot, and why.
    """
    found = [one for node in seen for one in _of_node(node)]
    head = next((one for one in seen if one.is_head), None)
    if head is None:
        found.append(Finding("WRONG", "cluster", "its head did not answer"))
    else:
        found += [one for node in seen for one in _unlike(node, head)]
    found += [one for node in seen for one in _doors(node, loopback)]
    there = {store: node.address for node in seen for store in node.stores}
    for store, trouble in troubles.items():
        if store not in there:
            found.append(Finding("WRONG", "cluster", f"store {store}: its node does not start: {trouble}"))
    for store in wanted:
        if store not in there and store not in troubles:
            found.append(Finding("note", "cluster", f"store {store}: no node; one starts when it is wanted, if it may"))
    return sorted(found, key=lambda one: one.level != "WRONG")


def _of_node(node: Seen) -> list[Finding]:
    if node.left:
        return [Finding("note", node.address, "left the cluster while it was looked at")]
    if node.facts is None:
        return [Finding("WRONG", node.address, node.trouble or "did not answer")]
    facts, found = node.facts, [("WRONG", trouble) for trouble in node.facts.troubles]
    if abs(node.skew_s) > SKEW_S + node.ping_ms / 2000:
        side = "ahead of" if node.skew_s > 0 else "behind"
        found.append(("WRONG", f"its clock is {abs(node.skew_s):.1f} s {side} this one: is time kept by NTP there?"))
    if facts.free_bytes < LEAST_FREE:
        found.append(("WRONG", f"{facts.free_bytes / 2**30:.1f} GiB left on its disk; {LEAST_FREE >> 30} are needed"))
    if facts.shm_bytes < LEAST_SHM:
        found.append(("WRONG", f"{facts.shm_bytes >> 20} MiB left in /dev/shm, where updates pass"))
    offered = node.offered.get("GPU", 0)
    if offered > len(facts.gpus):
        found.append(("WRONG", f"it offers {offered:g} GPU and its driver shows {len(facts.gpus)}"))
    for store, code in facts.vaults:
        if code != facts.code:
            line = f"store {store}: its vault runs other code ({code[:8]}) than this node ({facts.code[:8]})"
            found.append(("note", f"{line}; to renew it: raypipe vault install {store}, then restart it"))
    if facts.cert_days is not None and 0 < facts.cert_days < CERT_DAYS:
        found.append(("note", f"its certificate ends in {facts.cert_days:.0f} days: raypipe certs make, then send"))
    if node.down_mbs and min(node.down_mbs, node.up_mbs) < SLOW_MBS:
        found.append(("note", f"a slow link: {node.down_mbs:.2f} MB/s down, {node.up_mbs:.2f} up"))
    for host, port, why in node.unreached:
        found.append(("WRONG", f"cannot reach {host} port {port} ({why}); Ray needs every node to reach every other"))
    return [Finding(level, node.address, line) for level, line in found]  # type: ignore[arg-type]


def _unlike(node: Seen, head: Seen) -> list[Finding]:
    if node.facts is None or head.facts is None:
        return []
    lines = [
        f"{name} {mine} here, {head.facts.versions.get(name)} on the head"
        for name, mine in node.facts.versions.items()
        if mine != head.facts.versions.get(name)
    ]
    if node.facts.code != head.facts.code:
        lines.append(f"its raypipe is other code ({node.facts.code[:8]}) than the head's ({head.facts.code[:8]})")
    return [Finding("WRONG", node.address, line) for line in lines]


def _doors(node: Seen, loopback: bool) -> list[Finding]:
    if node.facts is None:
        return []
    found: list[Finding] = []
    level: Level = "note" if loopback else "WRONG"
    names = dict(node.facts.ports)
    if node.facts.auth != "token":
        found.append(Finding(level, node.address, "token authentication is off: RAY_AUTH_MODE=token"))
    if not node.facts.tls:
        found.append(Finding(level, node.address, "TLS is off: raypipe certs"))
    for port in node.open_ports:
        found.append(Finding(level, node.address, f"port {port} ({names.get(port, '?')}) takes calls from strangers"))
    for port, said in node.http.items():
        if said == "metrics":
            line = f"port {port} ({names.get(port, '?')}) tells strangers metrics: numbers, no calls"
            found.append(Finding("note", node.address, line))
        elif said not in CLOSED:
            found.append(Finding(level, node.address, f"port {port} ({names.get(port, '?')}): {said} for strangers"))
    return found

"""The doctor's hands: a probe on each node, asked one after the other so that links are measured alone."""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.doctor.findings import Seen, stayed
from raypipe.doctor.probe import Facts, http_answers, look_around, reach
from raypipe.placement.plan import resource
from raypipe.security import actor as _quiet  # noqa: F401  says that gRPC is not to tell failed handshakes

PINGS = 5
START_S = 60.0
PREFIX = resource("")
HARMLESS = (
    "/ray.rpc.NodeInfoGcsService/CheckAlive",
    "/ray.rpc.NodeManagerService/GetSystemConfig",
    "/ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "/ray.rpc.ReporterService/HealthCheck",  # of each node's agent
    "/ray.rpc.RayletDriver/ClusterInfo",  # Ray Client, which `ray start --head` cannot be told to leave out
)
SHUT = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
PROBE_BYTES = 8 << 20
ALL_TO_ALL = 24  # nodes up to which each tries every other; above, each tries so many others and the head


class Probe:
    """On one node."""

    def facts(self, stores: Sequence[str]) -> Facts:
        return look_around(stores, datetime.datetime.now(datetime.UTC))

    def clock(self) -> float:
        return time.time()

    def take(self, data: np.ndarray) -> int:
        return int(data.nbytes)

    def give(self, num_bytes: int) -> np.ndarray:
        return np.frombuffer(os.urandom(num_bytes), np.uint8)

    def reach(self, targets: list[tuple[str, int]]) -> list[tuple[str, int, str]]:
        return reach(targets)


ProbeActor: Any = ray.remote(num_cpus=0)(Probe)


def see_all(wait_s: float = START_S, num_bytes: int = PROBE_BYTES) -> list[Seen]:
    """Every live node. A node that does not answer in time is told as such."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    probes = {node["NodeID"]: _probe(node["NodeID"]) for node in nodes}
    seen = {node["NodeID"]: _first(node) for node in nodes}
    asked = {key: probe.facts.remote(seen[key].stores) for key, probe in probes.items()}
    until = time.monotonic() + wait_s
    for key, question in asked.items():
        try:
            facts = ray.get(question, timeout=max(0.1, until - time.monotonic()))
            seen[key] = replace(seen[key], facts=facts)
        except (ray.exceptions.RayError, TimeoutError) as error:
            seen[key] = replace(seen[key], trouble=f"did not answer in {wait_s:g} s ({type(error).__name__})")
    for key, probe in probes.items():
        if seen[key].facts is not None:
            with suppress(ray.exceptions.RayError, TimeoutError):
                seen[key] = _measured(seen[key], probe, num_bytes)
    _reachability(nodes, probes, seen)
    for probe in probes.values():
        ray.kill(probe)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return stayed([_knocked(one) for one in seen.values()], alive)


def _probe(node_id: str) -> Any:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ProbeActor.options(scheduling_strategy=where).remote()


def _first(node: dict[str, Any]) -> Seen:
    offered = node["Resources"]
    stores = tuple(sorted(name.removeprefix(PREFIX) for name in offered if name.startswith(PREFIX)))
    is_head = "node:__internal_head__" in offered
    return Seen(node["NodeID"], node["NodeManagerAddress"], is_head, stores, offered, None)


def _measured(one: Seen, probe: Any, num_bytes: int) -> Seen:
    """Clock, round trip and both directions of its link, with nothing else under way."""
    trips, skews = [], []
    for _ in range(PINGS):
        before = time.time()
        there = ray.get(probe.clock.remote(), timeout=START_S)
        after = time.time()
        trips.append(after - before)
        skews.append(there - (before + after) / 2)
    ping_s = statistics.median(trips)
    data = np.frombuffer(os.urandom(num_bytes), np.uint8)
    down_s = _timed(lambda: probe.take.remote(data)) - ping_s
    up_s = _timed(lambda: probe.give.remote(num_bytes)) - ping_s
    mbs = [num_bytes / 1e6 / max(spent, 1e-4) for spent in (down_s, up_s)]
    skew = skews[trips.index(min(trips))]
    return replace(one, skew_s=skew, ping_ms=ping_s * 1e3, down_mbs=mbs[0], up_mbs=mbs[1])


def _timed(call: Any) -> float:
    begin = time.monotonic()
    ray.get(call(), timeout=START_S)
    return time.monotonic() - begin


def _reachability(nodes: Sequence[dict[str, Any]], probes: dict[str, Any], seen: dict[str, Seen]) -> None:
    """Each node tries the others' raylet, object and worker ports; with many nodes, so many of them and the head."""
    well = [node for node in nodes if seen[node["NodeID"]].facts is not None]
    asked = {}
    for place, node in enumerate(well):
        others = [well[(place + step) % len(well)] for step in range(1, min(len(well), ALL_TO_ALL + 1))]
        others += [one for one in well if seen[one["NodeID"]].is_head and one is not node and one not in others]
        targets = [(one["NodeManagerAddress"], port) for one in others for port in _ports(one, seen[one["NodeID"]])]
        asked[node["NodeID"]] = probes[node["NodeID"]].reach.remote(targets)
    for key, question in asked.items():
        with suppress(ray.exceptions.RayError, TimeoutError):
            seen[key] = replace(seen[key], unreached=tuple(ray.get(question, timeout=START_S)))


def _ports(node: dict[str, Any], one: Seen) -> list[int]:
    """What others need of it: its raylet and object ports, and one worker's, its probe's."""
    workers = [port for port, name in one.facts.ports if name == "worker"] if one.facts else []
    return [node["NodeManagerPort"], node["ObjectManagerPort"], *workers[:1]]


def _knocked(one: Seen) -> Seen:
    """As a stranger who has neither token nor certificate."""
    if one.facts is None:
        return one
    ports = [port for port, _ in one.facts.ports]
    http = http_answers(one.address, ports)
    calls = [
        port for port in ports if port not in http and _takes_calls(f"{one.address}:{port}", one.facts.auth == "token")
    ]
    return replace(one, http=http, open_ports=tuple(calls))


def _takes_calls(address: str, token: bool) -> bool:
    """Whether a stranger's call is done. Only calls that change nothing are tried.

    A service answers for a method that it has not without asking for a token: then its node's own word counts.
    """
    with grpc.insecure_channel(address) as channel:
        for method in HARMLESS:
            try:
                channel.unary_unary(method)(b"", timeout=2.0)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    continue
                return error.code() not in SHUT
            return True
    return not token

"""One store is cut off while it trains, two hang on thin lines and are cut off while they hand over, a stranger with a
certificate of his own tries every door, and so does one with ours, without the token; see locked.py. By hand:
`pytest -s -m long tests/test_links.py`, twelve minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import ROOT
from locked import (
    CUT,
    DEADLINE_S,
    RATED,
    THIN,
    Locked,
    arrived,
    at_rest,
    gaps,
    half_handed_over,
    left,
    sent_again,
    site,
    under_way,
)
from machines import possible

__all__ = ["site"]
pytestmark = [pytest.mark.long, pytest.mark.skipif(not possible(), reason="needs root: machines are namespaces")]
AWAY_S = 6  # after which TCP tries again within as long: less than two heartbeats
KNOCK = """
import json, os, socket, ssl, sys
os.environ["GRPC_VERBOSITY"] = "NONE"
import grpc
from pathlib import Path
from raypipe.doctor.actor import HARMLESS

def call(address, own):
    parts = [Path(own, file).read_bytes() for file in ("ca.crt", "node.key", "node.crt")]
    codes = []
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(*parts)) as channel:
        for method in (*HARMLESS, "/ray.rpc.ObjectManagerService/Pull"):  # of no object to nobody
            try:
                channel.unary_unary(method)(b"", timeout=3)
                codes.append("OK")
            except grpc.RpcError as error:
                codes.append(error.code().name)
    return codes

found = {}
for address, port, trust, own in json.loads(sys.argv[1]):
    said = {"no token": call(f"{address}:{port}", own)}
    for way in ("plain", "nobody", "stranger"):
        try:
            link = socket.create_connection((address, port), 3)
            link.settimeout(3)
            if way != "plain":
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                context.set_alpn_protocols(["h2", "http/1.1"])
                if way == "stranger":
                    context.load_cert_chain(trust + "/node.crt", trust + "/node.key")
                link = context.wrap_socket(link)
                link.sendall(b"PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n" + bytes(3) + b"\\x04" + bytes(5))
            else:
                link.sendall(b"GET /api/version HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            heard = b""
            while b"# HELP" not in heard and len(heard) < 4000 and (more := link.recv(4000)):
                heard += more
            first = heard.decode("latin1").split("\\r\\n")[0][:60]
            said[way] = first + " metrics" * (b"# HELP" in heard)
        except OSError as error:
            said[way] = ""
    found[f"{address}:{port}"] = said
print(json.dumps(found))
"""


@pytest.mark.parametrize("store", [RATED, THIN])
def test_an_update_that_is_cut_off_on_its_way_arrives_and_little_is_sent_twice(site: Locked, store: str) -> None:
    machine = site.stores[store]
    before = at_rest(site, store)
    began, again, known = time.time(), sent_again(machine), len(arrived(site, store))
    site.until(lambda: half_handed_over(machine), 200, f"an update of {store} under way")
    assert len(arrived(site, store)) == known
    machine.cable("down")
    time.sleep(AWAY_S)
    machine.cable("up")
    site.until(lambda: len(arrived(site, store)) >= known + 2, 400, f"the update of {store}, and one more")
    sent = at_rest(site, store) - before
    moved = arrived(site, store)[known:]
    idle_bytes = site.idle_bytes_s[store] * (time.time() - began)
    more, longest = (sent - idle_bytes) / sum(moved) - 1, max(gaps(site, began))
    print(f"\n{store} ({machine.line}), cut off for {AWAY_S} s while it handed over: {len(moved)} updates of")
    print(f"{sum(moved) / 2**20:.2f} MiB; sent {sent / 2**20:.2f}, of it {idle_bytes / 2**20:.2f} Ray's own: ", end="")
    print(f"{more:.1%} more; pieces asked for twice: {left(site, store, began).get('again', 0)} bytes")
    print(f"TCP sent {sent_again(machine) - again} segments twice; in {time.time() - began:.0f} s; ", end="")
    print(f"longest time between two versions: {longest:.1f} s (deadline {DEADLINE_S} s)")
    records = site.records("store_left", "update_rejected", "ticket_failed")
    assert [body for at, body in records if at > began and body["store"] == store] == [], "what was under way came"
    assert more <= 0.1
    assert longest <= DEADLINE_S + 1, "and what it takes to make one"


@pytest.mark.parametrize("store", [RATED, THIN])
def test_an_update_on_a_link_that_is_away_for_long_comes_when_the_link_is_back(site: Locked, store: str) -> None:
    """So long that the store's process is given up: the update waits on the store's disk."""
    machine = site.stores[store]
    site.until(lambda: half_handed_over(machine) and under_way(site, store), 200, f"an update of {store} under way")
    machine.cable("down")
    began, late = time.time(), under_way(site, store)
    assert late
    site.until(lambda: [at for at, body in site.records("store_left") if at > began and body["store"] == store], 60,
               "the run misses it")  # fmt: skip
    assert late == under_way(site, store), "it was still on its way"
    machine.cable("up")
    healed = time.time()

    def counted() -> dict[str, int]:
        made = [body for at, body in site.records("version_published") if at > began]
        return {c["ticket"]: c["staleness"] for body in made for c in body["contributions"] if c["ticket"] in late}

    site.until(lambda: set(counted()) == late, 200, f"a version with what {store} had finished")
    print(f"\n{store}, cut off for {healed - began:.0f} s; its update is in a version ", end="")
    print(f"{time.time() - healed:.0f} s after the link was back, staleness {list(counted().values())}")
    records = site.records("update_rejected", "ticket_failed")
    assert [body for at, body in records if at > began and body["ticket"] in late] == []


def test_a_store_that_is_cut_off_stops_nobody_else(site: Locked) -> None:
    began = time.time()
    site.stores[CUT].cable("down")
    cut = time.time()
    site.until(lambda: [at for at, _ in site.records("store_left") if at > cut], 90, "the run misses it")
    site.until(lambda: len(gaps(site, cut)) >= 5, 120, "versions without it")
    site.stores[CUT].cable("up")
    healed = time.time()
    site.until(lambda: site.by(CUT, healed), 150, "it contributes again")
    print(f"cut for {healed - cut:.0f} s; back in a version after {time.time() - healed:.1f} s")
    longest = max(gaps(site, began))
    print(f"longest time between two versions: {longest:.1f} s (deadline {DEADLINE_S} s)")
    assert longest <= DEADLINE_S + 1, "and what it takes to make one"


def test_a_stranger_with_a_certificate_of_his_own_is_let_in_nowhere(site: Locked) -> None:
    doors: list[Any] = []
    for machine in [site.head, site.stores["north"]]:
        command = ["nsenter", "-t", str(machine.net.pid), "-n", "ss", "-Hltn"]
        lines = subprocess.check_output(command, text=True).splitlines()
        ports = {
            int(where.rpartition(":")[2]) for where in (line.split()[3] for line in lines) if "127.0.0.1" not in where
        }
        keys = [str(site.folder / whose / site.stores["east"].ip) for whose in ("strange", "certs")]
        doors += [(machine.ip, port, *keys) for port in sorted(ports)]
    stranger = site.stores["east"]
    command = ["nsenter", "-t", str(stranger.net.pid), "-n", sys.executable, "-c", KNOCK, json.dumps(doors)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = json.loads(subprocess.check_output(command, text=True, env=env))
    for door, said in found.items():
        print(door, {way: answer for way, answer in said.items() if answer} or "nothing")
    assert len(found) >= 8
    assert not any(said["stranger"] or said["nobody"] for said in found.values()), "TLS without our certificate"
    codes = {code for said in found.values() for code in said["no token"]}
    assert codes <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}, "a call was done"
    takes_calls = [door for door, said in found.items() if set(said["no token"]) != {"UNAVAILABLE"}]
    refused = [door for door, said in found.items() if "UNAUTHENTICATED" in said["no token"]]
    assert takes_calls == refused, "a service of which no method was tried, or that asks for no token"
    assert len(refused) >= 6, "with our certificate it was the token that was missing"
    assert f"{site.head.ip}:10001" in refused, "Ray Client, which runs code"
    assert {said["plain"] for said in found.values()} <= {"", "HTTP/1.1 401 Unauthorized", "HTTP/1.0 200 OK metrics"}

"""A head and five stores, each a machine, token and TLS on: one is cut off while it trains, two hang on thin lines and
are cut off while they hand over, a stranger with a certificate of his own tries every door, and so does one with ours,
without the token. By hand: `pytest -s -m long tests/test_links.py`, eight minutes.

The thin lines have 5 Mbit/s, 60 ms there and back, 1 % loss (tests/lines.py). One of the two stores says in its policy
how fast it may send, so that its updates come in pieces; the other's come as Ray sends them.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from lines import Line
from machines import Machine, Room, possible
from test_nodes import CONFIG, Site

from raypipe.data.sample import load_sample
from raypipe.data.stores import make_stores
from raypipe.security.certs import make_node, open_authority, token_of
from raypipe.tracking.book import run_folder

pytestmark = [pytest.mark.long, pytest.mark.skipif(not possible(), reason="needs root: machines are namespaces")]
STORES = ["north", "east", "south", "west", "mill"]
CUT, RATED, THIN = "south", "mill", "west"
RATE = 500_000  # bytes a second
DEADLINE_S = 20
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


@dataclass
class Locked(Site):
    """Each machine shows its own certificate."""

    idle_bytes_s: dict[str, float] = field(default_factory=dict)  # what Ray sends from a node that does nothing

    def run(self, machine: Machine, name: str, *command: str) -> subprocess.Popen[str]:
        log = (self.folder / f"{name}.log").open("a")
        env = self.env | self.shown(self.folder / "certs" / machine.ip)
        return machine.start(*command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def shown(self, own: Path) -> dict[str, str]:
        tls = {"CA_CERT": own / "ca.crt", "SERVER_CERT": own / "node.crt", "SERVER_KEY": own / "node.key"}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "certs" / "token")}
        return {"RAY_USE_TLS": "1", **{f"RAY_TLS_{name}": str(path) for name, path in tls.items()}, **token}


@pytest.fixture(scope="module")
def site() -> Iterator[Locked]:
    folder = Path(tempfile.mkdtemp(prefix="rp", dir="/tmp"))
    room = Room(folder)
    try:
        head = room.machine()
        stores = {store: room.machine(Line() if store in (RATED, THIN) else None) for store in STORES}
        made = Locked(folder, head, stores, opened=(), health=())
        now = datetime.datetime.now(datetime.UTC)
        for name in ("certs", "strange"):
            authority = open_authority(folder / name, now)
            for machine in room.machines:
                (folder / name / machine.ip).mkdir()
                make_node(authority, folder / name / machine.ip, machine.ip, [machine.ip, "127.0.0.1"], now)
        token_of(folder / "certs")
        split = {"name": "dirichlet", "alpha": 1.0}
        make_stores(folder / "stores", STORES, source=load_sample(), split=split, size_ratio=1.0, max_images=1000)
        with (folder / "stores" / RATED / "policy.yaml").open("a") as policy:
            policy.write(f"max_upload_bytes_s: {RATE}\n")
        config = {
            **CONFIG,
            "model": {"name": "small_cnn", "width": 8, "hidden": 1000},
            "stores": [{"id": store, "cpus": 0.2} for store in STORES],
            "pacing": {"budget_s": 2, "deadline_s": DEADLINE_S, "hung_s": 60, "join_s": 400},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        for machine in room.machines:
            machine.on()
        made.keep_head()
        made.until(lambda: "Ray runtime started" in made.log("head"), 300, "a head")
        for store in STORES:
            made.keep_store(store)
            made.until(lambda store=store: "runtime started" in made.log(store), 300, f"a node for {store}")
        made.idle_bytes_s = {store: idle(stores[store]) for store in (RATED, THIN)}
        made.run(head, "train", "raypipe", "train", str(folder / "run.yaml"), "--address", made.address)
        made.until(lambda: all(made.by(store) for store in STORES), 400, "versions with all stores")
        yield made
    finally:
        room.close()
        shutil.rmtree(folder, ignore_errors=True)


def carried(machine: Machine) -> int:
    """Bytes that it has sent so far, without the headers of Ethernet, IP and TCP; those that were lost, too."""
    num_bytes, frames = machine.sent()
    return num_bytes - 66 * frames


def idle(machine: Machine, seconds: float = 5.0) -> float:
    before = carried(machine)
    time.sleep(seconds)
    return (carried(machine) - before) / seconds


def at_rest(site: Site, store: str) -> int:
    """What `carried` says, at a moment at which no update is on its way; else 0."""
    before = carried(site.stores[store])
    if under_way(site, store):
        return 0
    time.sleep(0.5)
    after = carried(site.stores[store])
    return 0 if under_way(site, store) or after - before > 50_000 else after


def half_handed_over(machine: Machine) -> bool:
    """Whether more than acknowledgements and heartbeats has left it for a second and a half."""
    before = carried(machine)
    time.sleep(1.5)
    return carried(machine) - before > 150_000


def gaps(site: Site, since: float) -> list[float]:
    """Between versions, of which the later came after a moment; the last one goes on."""
    at = [when for when, _ in site.records("version_published")]
    return [after - before for before, after in pairwise([*at, time.time()]) if after > since]


def diary(site: Site) -> list[dict[str, Any]]:
    """What the coordinator was told, in turn."""
    files = sorted((run_folder("last", site.folder / "home") / "diary").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().split("\n")[1:-1]]


def arrived(site: Site, store: str) -> list[int]:
    """Bytes of each update of a store that has come."""
    mine = [event for event in diary(site) if event.get("ticket", "").endswith(f".{store}")]
    return [event["num_bytes"] for event in mine if event["event"] == "UpdateArrived"]


def under_way(site: Site, store: str) -> set[str]:
    """Tickets of a store whose update is finished and has not come."""
    events = [event for event in diary(site) if event.get("ticket", "").endswith(f".{store}")]
    done, come = ({e["ticket"] for e in events if e["event"] == kind} for kind in ("Trained", "UpdateArrived"))
    return done - come


def left(site: Site, store: str, since: float) -> dict[str, int]:
    """Bytes that have left a store since a moment, by its own receipts and their kinds."""
    found = dict[str, int]()
    for file in (site.folder / "stores" / store / "egress").rglob("egress-*.jsonl"):
        for line in file.read_text().splitlines():
            receipt = json.loads(line)["receipt"]
            if receipt["at"] >= since:
                found[receipt["kind"]] = found.get(receipt["kind"], 0) + receipt["num_bytes"]
    return found


def sent_again(machine: Machine) -> int:
    """TCP's segments, since the machine was made."""
    command = ["nsenter", "-t", str(machine.net.pid), "-n", "cat", "/proc/net/snmp"]
    names, numbers = (
        line.split() for line in subprocess.check_output(command, text=True).splitlines() if "Tcp:" in line
    )
    return int(numbers[names.index("RetransSegs")])


@pytest.mark.parametrize("store", [RATED, THIN])
def test_an_update_that_is_cut_off_on_its_way_arrives_and_little_is_sent_twice(site: Locked, store: str) -> None:
    machine = site.stores[store]
    before = site.until(lambda: at_rest(site, store), 200, f"nothing of {store} on its way")
    began, again, known = time.time(), sent_again(machine), len(arrived(site, store))
    site.until(lambda: half_handed_over(machine), 200, f"an update of {store} under way")
    assert len(arrived(site, store)) == known
    machine.cable("down")
    time.sleep(AWAY_S)
    machine.cable("up")
    site.until(lambda: len(arrived(site, store)) >= known + 2, 400, f"the update of {store}, and one more")
    sent = site.until(lambda: at_rest(site, store), 200, f"nothing of {store} on its way") - before
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

"""A head and five stores, each a machine, token and TLS on: one is cut off while it trains, one hangs on a thin line,
a stranger with a certificate of his own tries every door, and so does one with ours, without the token. Five minutes:
`pytest -m long tests/test_links.py`.

The thin line is 5 Mbit/s by a token bucket, its queue up to 300 ms long. Loss and delay need netem, which not every
kernel has: where it is there, they are on.
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from machines import Machine, Room, possible
from test_nodes import CONFIG, Site

from raypipe.data.sample import load_sample
from raypipe.data.stores import make_stores
from raypipe.security.certs import make_node, open_authority, token_of

pytestmark = [pytest.mark.long, pytest.mark.skipif(not possible(), reason="needs root: machines are namespaces")]
STORES = ["north", "east", "south", "west", "mill"]
CUT, THIN = "south", "mill"
DEADLINE_S = 20
THIN_LINE = (
    "netem rate 5mbit delay 30ms loss 1% limit 500",  # each way: 60 ms there and back
    "tbf rate 5mbit burst 32kbit latency 300ms",
)
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
        for method in HARMLESS:
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


class Locked(Site):
    """Each machine shows its own certificate."""

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
        head, *stores = [room.machine() for _ in range(1 + len(STORES))]
        made = Locked(folder, head, dict(zip(STORES, stores, strict=True)), opened=())
        now = datetime.datetime.now(datetime.UTC)
        for name in ("certs", "strange"):
            authority = open_authority(folder / name, now)
            for machine in room.machines:
                (folder / name / machine.ip).mkdir()
                make_node(authority, folder / name / machine.ip, machine.ip, [machine.ip, "127.0.0.1"], now)
        token_of(folder / "certs")
        split = {"name": "dirichlet", "alpha": 1.0}
        make_stores(folder / "stores", STORES, source=load_sample(), split=split, size_ratio=1.0, max_images=1000)
        config = {
            **CONFIG,
            "model": {"name": "small_cnn", "width": 8, "hidden": 1000},
            "stores": [{"id": store, "cpus": 0.2} for store in STORES],
            "pacing": {"budget_s": 2, "deadline_s": DEADLINE_S, "heartbeat_s": 2, "hung_s": 30, "join_s": 200},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(config))
        for machine in room.machines:
            machine.on()
        made.keep_head()
        made.until(lambda: "Ray runtime started" in made.log("head"), 120, "a head")
        for store in STORES:
            made.keep_store(store)
            made.until(lambda store=store: "runtime started" in made.log(store), 120, f"a node for {store}")
        made.run(head, "train", "raypipe", "train", str(folder / "run.yaml"), "--address", made.address)
        made.until(lambda: all(made.by(store) for store in STORES), 240, "versions with all stores")
        yield made
    finally:
        room.close()
        shutil.rmtree(folder, ignore_errors=True)


def thin_out(site: Site, machine: Machine) -> str:
    """How the line of a machine is now, both ways."""
    for how in THIN_LINE:
        words = how.split()
        there = ["nsenter", "-t", str(machine.net.pid), "-n", "tc", "qdisc", "replace", "dev", "eth0", "root", *words]
        back = ["nsenter", "-t", str(machine.switch), "-n", "tc", "qdisc", "replace", "dev", machine.port, "root"]
        if all(not subprocess.run(c, capture_output=True).returncode for c in (there, [*back, *words])):
            return how
    raise AssertionError("no line can be made thin here")


def sent_bytes(machine: Machine) -> int:
    command = ["nsenter", "-t", str(machine.net.pid), "-n", "cat", "/proc/net/dev"]
    line = next(line for line in subprocess.check_output(command, text=True).splitlines() if "eth0:" in line)
    return int(line.split(":")[1].split()[8])


def gaps(site: Site, since: float) -> list[float]:
    at = [when for when, _ in site.records("version_published") if when > since]
    return [after - before for before, after in pairwise(at)]


def test_a_cut_and_a_thin_line_stop_nobody_else(site: Locked) -> None:
    thin = site.stores[THIN]
    print("thin line:", thin_out(site, thin))
    began, before = time.time(), sent_bytes(thin)
    site.until(lambda: len(site.by(THIN, began + 1)) >= 2, 150, "updates over the thin line")
    published = [body for at, body in site.records("version_published") if at > began]
    moved = sum(c["bytes_up"] for body in published for c in body["contributions"] if c["store"] == THIN)
    print(
        f"over the thin line: {moved / 2**20:.1f} MiB of updates folded, {(sent_bytes(thin) - before) / 2**20:.1f} sent"
    )
    site.stores[CUT].cable("down")
    cut = time.time()
    site.until(lambda: [at for at, _ in site.records("store_left") if at > cut], 60, "the run misses it")
    site.until(lambda: len(gaps(site, cut)) >= 3, 120, "versions without it")
    site.stores[CUT].cable("up")
    healed = time.time()
    site.until(lambda: site.by(CUT, healed), 150, "it contributes again")
    print(f"cut for {healed - cut:.0f} s; back in a version after {time.time() - healed:.1f} s")
    longest = max(gaps(site, began))
    print(f"longest time between two versions: {longest:.1f} s (deadline {DEADLINE_S} s)")
    assert longest <= DEADLINE_S


def test_a_stranger_with_a_certificate_of_his_own_is_let_in_nowhere(site: Locked) -> None:
    doors: list[Any] = []
    for machine in [site.head, site.stores["north"]]:
        command = ["nsenter", "-t", str(machine.net.pid), "-n", "ss", "-Hltn"]
        lines = subprocess.check_output(command, text=True).splitlines()
        ports = {
            int(where.rpartition(":")[2]) for where in (line.split()[3] for line in lines) if "127.0.0.1" not in where
        }
        keys = [str(site.folder / whose / site.stores["west"].ip) for whose in ("strange", "certs")]
        doors += [(machine.ip, port, *keys) for port in sorted(ports)]
    stranger = site.stores["west"]
    command = ["nsenter", "-t", str(stranger.net.pid), "-n", sys.executable, "-c", KNOCK, json.dumps(doors)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = json.loads(subprocess.check_output(command, text=True, env=env))
    for door, said in found.items():
        print(door, {way: answer for way, answer in said.items() if answer} or "nothing")
    assert len(found) >= 8
    assert not any(said["stranger"] or said["nobody"] for said in found.values()), "TLS without our certificate"
    codes = {code for said in found.values() for code in said["no token"]}
    assert codes <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}, "a call was done"
    refused = [door for door, said in found.items() if "UNAUTHENTICATED" in said["no token"]]
    assert len(refused) >= 6, "with our certificate it was the token that was missing"
    assert f"{site.head.ip}:10001" in refused, "Ray Client, which runs code"
    assert {said["plain"] for said in found.values()} <= {"", "HTTP/1.1 401 Unauthorized", "HTTP/1.0 200 OK metrics"}

"""A head and five stores, each a machine, token and TLS on, two of them on thin lines, and a run that goes on; and what
was sent there, what came and what is on its way.

The thin lines have 5 Mbit/s, 60 ms there and back, 1 % loss (tests/lines.py). One of the two stores says in its policy
how fast it may send, so that its updates come in pieces; the other's come as Ray sends them.
"""

from __future__ import annotations

import datetime
import json
import shutil
import subprocess
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
from machines import Machine, Room
from test_nodes import CONFIG, Site

from raypipe.data.sample import load_sample
from raypipe.data.stores import make_stores
from raypipe.security.certs import make_node, open_authority, token_of
from raypipe.tracking.book import run_folder

STORES = ["north", "east", "south", "west", "mill"]
CUT, RATED, THIN = "south", "mill", "west"
RATE = 500_000  # bytes a second
DEADLINE_S = 20


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
        for store, rate in ((RATED, f"max_upload_bytes_s: {RATE}\n"), (THIN, "")):
            with (folder / "stores" / store / "policy.yaml").open("a") as policy:
                policy.write(f"{rate}yield_file: {folder / store}.busy\n")
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


def at_rest(site: Locked, store: str) -> int:
    """What `carried` says once all has come that was on its way, while the store's owner needs the machine."""
    busy = site.folder / f"{store}.busy"
    busy.touch()

    def still() -> int:
        before = carried(site.stores[store])
        time.sleep(4)
        after = carried(site.stores[store])
        return after if after - before < 4 * site.idle_bytes_s[store] + 50_000 else 0

    time.sleep(4)
    found: int = site.until(still, 200, f"nothing of {store} on its way")
    busy.unlink()
    return found


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
    """Tickets of a store whose update is finished, has not come, and is not given up."""
    events = [event for event in diary(site) if event.get("ticket", "").endswith(f".{store}")]
    done, come = ({e["ticket"] for e in events if e["event"] == kind} for kind in ("Trained", "UpdateArrived"))
    return done - come - {body["ticket"] for _, body in site.records("update_rejected", "ticket_failed")}


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

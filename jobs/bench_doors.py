"""What token and TLS cost: W2 (bench.py) with its coordinator on one host and its ten stores on another.

    python jobs/bench_doors.py [--repeats 3] [--versions 6] [--json] [--quick]

Needs root: the hosts are network namespaces of this machine (tests/machines.py), two without doors and two with
token and TLS, so that every model and every update crosses a (virtual) wire. Seconds per version, in turn, in one
run; also how fast one core encrypts here. Shown, with no bound. --quick: one repeat of four versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import STEADY
from bench_bed import IDS, ROOT, Bed, configuration
from bench_vault import WORKLOADS
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from machines import Machine, Room, possible

from raypipe.security.certs import make_node, open_authority, token_of
from raypipe.tracking.book import run_folder
from raypipe.tracking.journal import Journal

OBJECTS = 1 << 30  # bytes of each host's object store
DOORS: dict[str, dict[str, str]] = {"open": {"RAY_AUTH_MODE": "disabled"}, "locked": {"RAY_AUTH_MODE": "token"}}


class Pair:
    """A head and a host with all stores, one Ray cluster."""

    def __init__(self, name: str, folder: Path, room: Room) -> None:
        self.name, self._folder = name, folder
        self.head, self.stores = room.machine(), room.machine()
        for machine in (self.head, self.stores):
            machine.on()
        self._running: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        offered = json.dumps({f"store:{store}": 1 for store in IDS})
        here = f"--address={self.head.ip}:6379"
        ray = ["ray", "start", "--block", "--disable-usage-stats", f"--object-store-memory={OBJECTS}"]
        on_head = ["--head", "--port=6379", f"--node-ip-address={self.head.ip}", "--num-cpus=2"]
        self._run(self.head, "head", *ray, *on_head, "--include-dashboard=false")
        self._until("head", "Ray runtime started")
        self._run(self.stores, "stores", *ray, here, f"--resources={offered}", f"--num-cpus={len(IDS) + 1}")
        self._until("stores", "Ray runtime started")

    def seconds_per_version(self, config: Path) -> float:
        """A whole run by `raypipe train` on the head."""
        train = ["raypipe", "train", str(config), "--address", f"{self.head.ip}:6379"]
        train += ["--insecure"] if self.name == "open" else []
        if self._run(self.head, "train", *train).wait(600):
            raise RuntimeError(f"{self.name}: {self._log('train').read_text().strip().splitlines()[-1]}")
        folder = run_folder("last", self._folder / f"home-{self.name}")
        versions = [r.body for r in Journal(folder / "journal.sqlite").read(kinds=["version_published"])]
        if len(versions[-1]["contributions"]) != len(IDS):
            raise RuntimeError(f"{self.name}: a store is missing from a version")
        shutil.rmtree(folder)
        return median(b - a for a, b in pairwise(float(v["at"]) for v in versions if v["version"] >= STEADY))

    def wire_bytes(self) -> int:
        """That came to the head and left it so far."""
        command = ["nsenter", "-t", str(self.head.net.pid), "-n", "cat", "/proc/net/dev"]
        lines = subprocess.check_output(command, text=True).splitlines()
        numbers = next(line for line in lines if "eth0:" in line).split(":")[1].split()
        return int(numbers[0]) + int(numbers[8])

    def end(self) -> None:
        for machine in (self.head, self.stores):
            machine.off()
        for process in self._running:
            process.wait()

    def _run(self, machine: Machine, name: str, *command: str) -> subprocess.Popen[str]:
        shown = DOORS[self.name]
        if self.name == "locked":
            own = self._folder / "certs" / machine.ip
            tls = {"CA_CERT": own / "ca.crt", "SERVER_CERT": own / "node.crt", "SERVER_KEY": own / "node.key"}
            shown = shown | {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{key}": str(path) for key, path in tls.items()}
            shown |= {"RAY_AUTH_TOKEN_PATH": str(self._folder / "certs" / "token")}
        env = {**os.environ, **shown, "RAY_TMPDIR": str(self._folder / "disk")}  # each machine sees its own there
        env |= {"RAYPIPE_HOME": str(self._folder / f"home-{self.name}"), "PYTHONPATH": str(ROOT)}
        env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        log = self._log(name).open("a")
        self._running.append(machine.start(*command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
        return self._running[-1]

    def _log(self, name: str) -> Path:
        return self._folder / f"{self.name}-{name}.log"

    def _until(self, name: str, said: str) -> None:
        until = time.monotonic() + 120
        while said not in (text := self._log(name).read_text()):
            if time.monotonic() > until or self._running[-1].poll() is not None:
                raise RuntimeError(f"{self.name}: no {name}: {text[-500:]}")
            time.sleep(0.3)


def certificates(folder: Path, machines: list[Machine]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    authority = open_authority(folder, now)
    for machine in machines:
        (folder / machine.ip).mkdir()
        make_node(authority, folder / machine.ip, machine.ip, [machine.ip], now)
    token_of(folder)


def encrypted_gb_s() -> float:
    """AES-128-GCM on one core, in pieces as TLS has them."""
    cipher, piece = AESGCM(bytes(16)), bytes(16384)
    begin = time.process_time()
    for number in range(8192):
        cipher.encrypt(number.to_bytes(12, "big"), piece, None)
    return 8192 * len(piece) / (time.process_time() - begin) / 1e9


def measured(folder: Path, pairs: list[Pair], options: argparse.Namespace) -> dict[str, Any]:
    for pair in pairs:
        pair.start()
    said = configuration("w2", stop={"max_versions": options.versions}, **WORKLOADS["w2"])
    said |= {"evaluate": {"alone": False, "test": False}, "track": {"mlflow": False}}
    config = folder / "w2.json"  # JSON is YAML
    config.write_text(json.dumps(said))
    load, seconds = os.getloadavg()[0], {pair.name: list[float]() for pair in pairs}
    wire = {pair.name: -pair.wire_bytes() for pair in pairs}
    for _ in range(options.repeats):
        for pair in pairs:
            seconds[pair.name].append(pair.seconds_per_version(config))
    ratios = [locked / plain for plain, locked in zip(seconds["open"], seconds["locked"], strict=True)]
    line = {"figure": "doors_w2", "value": median(ratios), "ratios": ratios}
    line |= {f"{name}_s": median(found) for name, found in seconds.items()}
    for pair in pairs:
        total = (wire[pair.name] + pair.wire_bytes()) / options.repeats / options.versions
        line[f"{pair.name}_wire_mb_a_version"] = total / 1e6
    return {**line, "aes_gb_s": encrypted_gb_s(), "load": load}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="a JSON line")
    parser.add_argument("--quick", action="store_true", help="one short repeat")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.versions = 1, 4
    if not possible():
        parser.error("needs root: the hosts are network namespaces")
    folder = Path(tempfile.mkdtemp(prefix="rpd", dir="/tmp"))  # short: sockets lie in it
    room, pairs = Room(folder), list[Pair]()
    try:
        (folder / "bed").mkdir()
        Bed(folder / "bed", options.repeats, quick=options.quick)  # the data, and where it lies
        pairs = [Pair(name, folder, room) for name in DOORS]
        certificates(folder / "certs", [machine for pair in pairs for machine in (pair.head, pair.stores)])
        line = measured(folder, pairs, options)
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        print(json.dumps(line) if options.json else shown, flush=True)
    finally:
        for pair in pairs:
            with suppress(OSError):
                pair.end()
        room.close()
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

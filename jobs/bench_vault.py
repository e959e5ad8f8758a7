"""The vault against the site in the actor's process: seconds per version of W1 and W2 (bench.py), in turn, in one run.

    python jobs/bench_vault.py [--only w1,w2] [--repeats 3] [--versions 6] [--json] [--quick]

As root the vaults are one user's and all the rest, Ray too, another's, as it is meant to be; else one user has both
(a trial, `install --same-user`): what the walls cost is the other process and the socket, not the user's number.
Vaults run as nicely as Ray's workers do. --quick: one repeat of four versions. Exit code 1 above 1.10.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import STEADY
from bench_bed import IDS, Bed, configuration
from walls import ACTOR_USER, CAN, VAULT_USER, beside

from raypipe.vault.install import install
from raypipe.vault.place import Place, Settings

MUST = 1.10
NICE = ["nice", "-n", "15"]
WORKLOADS: dict[str, dict[str, Any]] = {
    "w1": {},
    "w2": {
        "model": {"name": "resnet18", "norm": "group", "small_images": False},
        "train": {"lr": 0.01, "batch_size": 32, "local_steps": 1},
    },
}


@contextmanager
def vaults(stores: Path, users: tuple[int, int], run: Callable[[list[str]], list[str]]) -> Iterator[None]:
    """A vault a store, each on a copy of the store's data. `users`: the vaults', the actors'."""
    running = []
    try:
        for store in IDS:
            place = Place(store)
            install(place, Settings(store=store, user=users[0], actor_user=users[1]), stores / store)
            running.append(subprocess.Popen(run([*NICE, str(place.folder / "start.sh")])))
        until = time.monotonic() + 240
        while not all(Place(store).socket.exists() for store in IDS):
            if time.monotonic() > until or any(process.poll() is not None for process in running):
                raise RuntimeError("a vault did not start")
            time.sleep(0.5)
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def seconds_per_version(bench: Bed, said: dict[str, Any], transport: str) -> float:
    name = f"{said['name']}-{transport}"  # a roster of its own: a vault has a key of its own
    records = bench.federate({**said, "name": name, "store": {"transport": transport}})
    versions = records["version_published"]
    behind = [bool(joined.get("vault_code")) for joined in records["store_joined"]]
    if set(behind) != {transport == "vault"} or len(versions[-1]["contributions"]) != len(IDS):
        raise RuntimeError(f"not all stores were behind transport {transport}, or one is missing from a version")
    at = [float(version["at"]) for version in versions if version["version"] >= STEADY]
    return median(after - before for before, after in pairwise(at))


def measure(bench: Bed, options: argparse.Namespace) -> bool:
    """With the vaults there. Whether every figure is as it must be."""
    good = True
    for name in options.only.split(","):
        said = configuration(name, stop={"max_versions": options.versions}, **WORKLOADS[name])
        load, pairs = os.getloadavg()[0], []
        for _ in range(options.repeats):
            plain = seconds_per_version(bench, said, "actor")
            pairs.append((plain, seconds_per_version(bench, said, "vault")))
        ratios = [vault / plain for plain, vault in pairs]
        good &= median(ratios) <= MUST
        line = {"figure": f"vault_{name}", "value": median(ratios), "must": MUST, "ratios": ratios}
        line |= {"actor_s": median(p for p, _ in pairs), "vault_s": median(v for _, v in pairs), "load": load}
        line |= {"users": len({os.geteuid(), Place(IDS[0]).read().user})}
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        print(json.dumps(line) if options.json else shown, flush=True)
    return good


def of_one_user(folder: Path, options: argparse.Namespace) -> int:
    bench, user = Bed(folder, options.repeats, quick=options.quick), os.geteuid()
    try:
        with vaults(bench.stores, (user, user), lambda command: command):
            return 0 if measure(bench, options) else 1
    finally:
        bench.close()


def of_two_users(folder: Path, options: argparse.Namespace) -> int:
    """The vaults are started here, by root; what is measured runs as the actors' user."""
    folder.chmod(0o755)
    bed = folder / "bed"
    bed.mkdir()
    before = dict(os.environ)
    stores = Bed(bed, options.repeats, quick=options.quick).stores
    for path in (bed, *bed.rglob("*")):
        os.chown(path, ACTOR_USER, ACTOR_USER)
    again = [sys.executable, __file__, "--measure", str(bed), *sys.argv[1:]]
    env = {**before, "HOME": str(bed), "RAYPIPE_VAULTS": os.environ["RAYPIPE_VAULTS"]}
    with vaults(stores, (VAULT_USER, ACTOR_USER), lambda command: beside(command, None)):
        return subprocess.run(beside(again, ACTOR_USER), env=env, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="a JSON line a figure")
    parser.add_argument("--quick", action="store_true", help="one short repeat")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # this very file, as the actors' user
    options = parser.parse_args()
    if unknown := [name for name in options.only.split(",") if name not in WORKLOADS]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if options.quick:
        options.repeats, options.versions = 1, 4
    if options.measure:
        bench = Bed(options.measure, options.repeats, quick=options.quick)
        try:
            return 0 if measure(bench, options) else 1
        finally:
            bench.close()
    folder = Path(tempfile.mkdtemp(prefix="rpv", dir="/tmp"))  # short: sockets lie in it
    os.environ["RAYPIPE_VAULTS"] = str(folder / "v")
    try:
        return (of_two_users if CAN else of_one_user)(folder, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())

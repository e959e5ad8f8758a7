"""The vault against the site in the actor's process: seconds per version of W1 and W2 (bench.py), in turn, in one run.

    python jobs/bench_vault.py [--only w1,w2] [--repeats 3] [--versions 6] [--json]

The vaults here are a trial of one user (`install --same-user`): what the walls cost is the other process and the
socket, not the user's number. They run as nicely as Ray's workers do. Exit code 1 above 1.10.
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
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import STEADY
from bench_bed import IDS, Bed, configuration

from raypipe.vault.install import install
from raypipe.vault.place import Place, Settings
from raypipe.vault.process import environment

MUST = 1.10
WORKLOADS: dict[str, dict[str, Any]] = {
    "w1": {},
    "w2": {
        "model": {"name": "resnet18", "norm": "group", "small_images": False},
        "train": {"lr": 0.01, "batch_size": 32, "local_steps": 1},
    },
}


@contextmanager
def vaults(stores: Path, folder: Path) -> Iterator[None]:
    """A vault a store, each on a copy of the store's data."""
    os.environ["RAYPIPE_VAULTS"] = str(folder)
    user, running = os.geteuid(), []
    try:
        for store in IDS:
            place = Place(store)
            install(place, Settings(store=store, user=user, actor_user=user), stores / store)
            command = ["nice", "-n", "15", sys.executable, "-I", str(place.code / "vault.py"), str(place.folder)]
            running.append(subprocess.Popen(command, env=environment()))
        until = time.monotonic() + 180
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--versions", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="a JSON line a figure")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="rpv", dir="/tmp"))  # short: sockets lie in it
    bench, good = Bed(folder, options.repeats, quick=False), True
    try:
        with vaults(bench.stores, folder / "v"):
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
                shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
                print(json.dumps(line) if options.json else shown, flush=True)
    finally:
        bench.close()
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

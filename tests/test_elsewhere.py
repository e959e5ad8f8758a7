"""A backup and the stores' data make the same bytes in another place: another user, home, network, code, threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from test_replay import SCENARIOS, TRACK
from test_resume import make
from test_shell import NAMES, SitePort, config, run
from walls import CAN, STRANGER, WHY, beside

from raypipe.replay import Replay
from raypipe.store.processor import chip_of, fewer, machine, same
from raypipe.store.site import Site
from raypipe.tracking.backup import backup

# Staleness of stores at their own pace; what stores keep, and a server's state. Each store trains with so many threads.
RUNS = {"fedbuff": 1, "momentum": 2}
# One process: `restore` and `replay --verify` of each backup, by the command itself.
THERE = """
import os, sys
import raypipe
from raypipe.cli import main
assert raypipe.__file__.startswith(os.environ["CODE"]), raypipe.__file__
assert os.getuid() == int(os.environ["USER_ID"]) and os.getpid() < 9, "its own processes"
assert open("/proc/net/dev").read().count(":") == 1, "no network but loopback"
worst = 0
for name in sys.argv[1:]:
    os.environ["RAYPIPE_HOME"] = os.path.join(os.environ["HOME"], name)
    os.environ["RAYPIPE_STORES"] = os.path.join(os.environ["HOME"], name + "-stores")
    assert main(["restore", os.path.join(os.environ["HOME"], name + ".tar")]) == 0
    worst = max(worst, main(["replay", "run", "--verify"]))
sys.exit(worst)
"""


@dataclass
class Place:
    """Another machine, as far as one machine can be another: what was carried there, and nothing else."""

    home: Path
    code: Path

    def replay(self, *names: str, cores: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        tied = ["taskset", "-c", cores] if cores else []
        known = {"HOME": str(self.home), "PYTHONPATH": str(self.code), "CODE": str(self.code), "USER_ID": str(STRANGER)}
        words = [f"{key}={value}" for key, value in {**known, "TZ": "Asia/Kolkata", **settings}.items()]
        inside = ["env", "-i", f"PATH={os.environ['PATH']}", *words, *tied, sys.executable, "-c", THERE, *names]
        apart = ["unshare", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        whole = [*apart, *beside(inside, STRANGER)]
        return subprocess.run(whole, cwd="/", capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    there = Path(tempfile.mkdtemp(prefix="rpe", dir="/tmp"))  # other users can go there
    try:
        for name, threads in RUNS.items():
            home = tmp_path_factory.mktemp(name)
            make(home / "stores")
            ports = {store: SitePort(home / "stores" / store) for store in NAMES}
            for store, port in ports.items():  # of one process, in which torch has one number of threads
                port.site.close()
                port.site = Site(home / "stores" / store, cpus=threads)
            run(config(**SCENARIOS[name], stop={"max_versions": 6}, track=TRACK), home, ports)
            backup(home / "runs" / "run", there / f"{name}.tar")
            for store in NAMES:
                kept = shutil.ignore_patterns("state", "heads", "egress", "keys", "site.log")
                shutil.copytree(home / "stores" / store, there / f"{name}-stores" / store, ignore=kept)
        shutil.copytree(ROOT / "raypipe", there / "code" / "raypipe", ignore=shutil.ignore_patterns("__pycache__"))
        there.chmod(0o755)
        for path in [there, *there.rglob("*")]:
            os.chown(path, STRANGER, STRANGER)
        yield Place(there, there / "code")
    finally:
        shutil.rmtree(there, ignore_errors=True)


@pytest.mark.skipif(not CAN, reason=WHY)
def test_a_backup_and_the_stores_data_make_the_same_bytes_in_another_place(place: Place) -> None:
    done = place.replay(*RUNS, OMP_NUM_THREADS="1", MKL_NUM_THREADS="2", cores="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 versions made again, each with the bytes that the record says") == len(RUNS)
    assert "note:" not in done.stdout


@pytest.mark.skipif(not CAN, reason=WHY)
def test_where_other_instructions_are_used_it_is_said(place: Place) -> None:
    """Of the same chip, fewer: the bytes may come out the same or not; what differs is said with the reason."""
    if "DEFAULT" in machine():
        pytest.skip("this machine has no vector instructions that could be left out")
    for name in RUNS:
        shutil.rmtree(place.home / name, ignore_errors=True)
    done = place.replay("momentum", ATEN_CPU_CAPABILITY="default")
    notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
    assert [line.split(" had ")[0] for line in notes] == ["note: the coordinator", *(f"note: store {s}" for s in NAMES)]
    assert all(f" had {machine()}; here is " in line and "DEFAULT" in line for line in notes)
    print(done.stdout, done.stderr)
    assert done.returncode in (0, 1)
    if done.returncode:
        assert "differs: made again it is" in done.stderr.splitlines()[0]
        assert f"the coordinator had {machine()}; here is" in done.stderr


@pytest.mark.parametrize(
    ("lines", "chip"),
    [
        (["processor\t: 0", "vendor_id\t: AuthenticAMD", "cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC",
          "", "processor\t: 1", "model\t\t: 18"], "AuthenticAMD 25 17"),
        (["processor\t: 0", "CPU implementer\t: 0x41", "CPU architecture: 8", "CPU part\t: 0xd0c"], "0x41 8 0xd0c"),
        (["nothing"], ""),
    ],
)  # fmt: skip
def test_a_chip_is_named_by_its_numbers(lines: list[str], chip: str) -> None:
    assert chip_of(lines) == chip


def test_what_was_not_recorded_then_is_no_difference() -> None:
    now: Any = "torch 2, x86_64 AVX2, AuthenticAMD 25 17"
    assert same("", now)
    assert same("torch 2, x86_64 AVX2", now)
    assert same(now, now)
    assert not same("torch 2, x86_64 AVX512", now)
    assert not same("torch 2, x86_64 AVX2, GenuineIntel 6 85", now)
    assert not same("torch 2, x86_64 AVX", now)


HERE = "torch 2, x86_64 AVX512, AuthenticAMD 25 17"


@pytest.mark.parametrize(
    ("then", "level"),
    [
        (["torch 2, x86_64 AVX2, GenuineIntel 6 85", "torch 2, x86_64 AVX2"], "avx2"),
        (["torch 2, x86_64 DEFAULT"], "default"),
        ([HERE], None),
        (["torch 2, x86_64 AVX2", "torch 2, x86_64 AVX512"], None),  # two stores of two kinds: not in one process
        (["torch 1, x86_64 AVX2"], None),
        (["torch 2, aarch64 DEFAULT"], None),
        (["torch 2, x86_64 SVE"], None),
        (["nothing of the kind"], None),
        ([], None),
    ],
)
def test_a_machine_goes_without_what_the_runs_had_not(then: list[str], level: str | None) -> None:
    assert fewer(then, HERE).get("ATEN_CPU_CAPABILITY") == level
    assert fewer(["torch 2, x86_64 AVX512"], "torch 2, x86_64 AVX2") == {}, "what is not there cannot be had"


def test_a_run_of_lesser_processors_is_made_again_on_a_better_one(tmp_path: Path) -> None:
    """The run in a process that goes without; the replay by the plain command, which finds out by itself."""
    lesser = fewer([machine().replace("AVX512", "AVX2")], machine())
    if not lesser:
        pytest.skip("this machine has no more than AVX2")
    code = f"import test_elsewhere as t; t.child({str(tmp_path)!r})"
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **paths, **lesser}, check=True, timeout=200)
    places = {"RAYPIPE_HOME": str(tmp_path), "RAYPIPE_STORES": str(tmp_path / "stores")}
    command = [sys.executable, "-m", "raypipe", "replay", "run", "--verify"]
    env = {**os.environ, **paths, **places}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "goes without the others: ATEN_CPU_CAPABILITY=avx2" in done.stdout
    assert "7 versions made again, each with the bytes that the record says" in done.stdout
    natively = Replay(tmp_path / "runs" / "run", tmp_path / "stores").versions()
    assert not all(made.same for made in natively), "with all that this machine has, it comes out otherwise"


def child(home: str) -> None:
    """A run with its stores in one process."""
    make(Path(home) / "stores")
    ports = {name: SitePort(Path(home) / "stores" / name) for name in NAMES}
    run(config(**SCENARIOS["momentum"], stop={"max_versions": 6}, track=TRACK), Path(home), ports)

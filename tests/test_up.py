"""`ray up`, `ray dashboard`, `ray job submit`, `ray down` for real: hosts with addresses and sshd in namespaces, token
and TLS on; this process is the laptop."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
import netns
import psutil
import pytest
import yaml
from conftest import CLASSES, ROOT

from raypipe.cli import main
from raypipe.doctor.findings import CLOSED
from raypipe.errors import RunError
from raypipe.placement.provider import StoreProvider
from raypipe.security.actor import refuse_misfit
from raypipe.tracking.journal import Journal

HEAD, STORES = "10.88.0.1", {"harbour": "10.88.0.2", "mill": "10.88.0.3"}
NOWHERE = "10.88.0.9"  # where the store is that nobody asks for
BIN = Path(sys.executable).parent
JOBS = 28266
IDLE_S = 6
SLOW_BYTES_S = 30_000  # seven seconds for an update
CONFIG: dict[str, Any] = {
    "name": "up",
    "task": {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
    "model": {"name": "small_cnn", "width": 8},
    "stores": [{"id": store, "cpus": 0.5} for store in STORES],
    "train": {"local_steps": 4, "batch_size": 16},
    "pace": "wait_for_all",
    "pacing": {"max_active_stores": 1},
    "stop": {"max_versions": 3},
    "evaluate": {"test": False, "alone": False},
    "track": {"mlflow": False},
    "local": {"sample": "fashion-mnist", "max_images": 800},
}
PATIENT = "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT=120"
HEAD_TAGS = {"ray-node-type": "head"}


@pytest.fixture(scope="module")
def hosts() -> Iterator[netns.Net]:
    """A head and two stores; where they cannot be made CI fails and others are told."""
    if why := netns.lacking():
        (pytest.fail if os.geteuid() == 0 else pytest.skip)(f"no hosts in network namespaces: {why}")
    with netns.net(["head", *STORES]) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYPIPE_HOME", str(made.folder / "home"))
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("RAY_ADDRESS", raising=False)
        for host in made.hosts:
            there = f"PYTHONPATH={ROOT} RAYPIPE_STORES={made.folder}/stores {PATIENT}"
            on(made, host, f"echo export {there} >> ~/.bashrc")
        yield made


def on(hosts: netns.Net, host: str, command: str, timeout_s: float = 60) -> str:
    """What a command prints there, both streams."""
    ssh = ["ssh", "-n", "-i", str(hosts.key), "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null"]
    target = [*ssh, "-oLogLevel=ERROR", f"root@{hosts.hosts[host].address}", command]
    return subprocess.run(target, text=True, stdout=-1, stderr=subprocess.STDOUT, timeout=timeout_s).stdout


def nodes(hosts: netns.Net) -> dict[str, str]:
    """Stores that are up and their nodes, by the head's book."""
    book = hosts.hosts["head"].home / ".raypipe/cluster/raypipe.json"
    found = json.loads(book.read_text()) if book.exists() else {}
    return {node.rpartition("-")[0]: node for node in found if not node.startswith("raypipe-")}


def test_a_wrong_key_and_an_unknown_host_are_said_and_start_nothing(hosts: netns.Net, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    for host, key, said in (
        (HEAD, tmp_path / "key", f"{HEAD}: it refused the key {tmp_path / 'key'}"),
        ("nobody.invalid", hosts.key, "nobody.invalid: no machine has that name"),
    ):
        said_in_config = {"ssh_user": "root", "ssh_private_key": str(key), "head_host": host}
        provider = StoreProvider(said_in_config, "wrong")
        with pytest.raises(click.ClickException, match=re.escape(f"the head cannot be started: {said}")):
            provider.create_node({"host": host}, HEAD_TAGS, 1)
        assert provider.non_terminated_nodes({}) == []


def ray(*arguments: str, seconds: float = 240) -> str:
    """What it printed. Fails as it does."""
    done = subprocess.run(["ray", *arguments], capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    return done.stdout


def test_stores_come_when_it_is_their_turn_go_when_idle_and_come_again(hosts: netns.Net) -> None:
    """A job submitted from here through the tunnel; a second user's process on a store's machine outlives it all."""
    rows = "".join(f"{store},{host},0,north,\n" for store, host in {**STORES, "station": NOWHERE}.items())
    (hosts.folder / "stores.csv").write_text(f"id,host,gpus,region,hours\n{rows}")
    where = [str(hosts.folder / "stores.csv"), "--head", HEAD]
    login = ["--user", "root", "--key", str(hosts.key)]
    assert main(["certs", "make", *where]) == 0
    assert main(["certs", "send", *where, *login, "--only", "head", *STORES]) == 0
    more = ["--venv", str(BIN.parent), "--idle-minutes", str(IDLE_S / 60), "--out", str(hosts.folder)]
    assert main(["cluster", "render", *where, *login, *more]) == 0
    (hosts.folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    assert main(["data", str(hosts.folder / "run.yaml"), "--out", str(hosts.folder / "stores")]) == 0
    with (hosts.folder / "stores" / "mill" / "policy.yaml").open("a") as policy:
        policy.write(f"max_upload_bytes_s: {SLOW_BYTES_S}\n")  # its turn outlasts the other's idle time
    on(hosts, "harbour", "RAY_CLOUD_INSTANCE_ID=anothers nohup sleep 600 >/dev/null 2>&1 &")
    cluster = str(hosts.folder / "stores.yaml")
    try:
        try:
            ray("up", "-y", "--no-config-cache", cluster, seconds=150)
        except (AssertionError, subprocess.TimeoutExpired):
            # Ray gives a node half a minute to start, which a busy machine may not have.
            ray("up", "-y", "--no-config-cache", cluster)
        assert nodes(hosts) == {}
        _take_turns(hosts, cluster)
    finally:
        ray("down", "-y", cluster)
    for host in hosts.hosts:
        assert "ray" not in on(hosts, host, "cat /proc/[0-9]*/comm | grep -E '^(raylet|gcs_server|ray::.*)$'")
    assert on(hosts, "harbour", "grep -lz RAY_CLOUD_INSTANCE_ID=anothers /proc/[0-9]*/environ | wc -l").strip() != "0"


@contextmanager
def tunnel(cluster: str) -> Iterator[dict[str, str]]:
    """`ray dashboard`: to the jobs' port, which is on the head's loopback; what a client shows at it."""
    command = ["ray", "dashboard", "--no-config-cache", "-p", str(JOBS), cluster]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=-1, stderr=subprocess.STDOUT, text=True)
    token = Path(os.environ["RAYPIPE_HOME"]) / "certs" / "token"
    try:
        until(lambda: answers(JOBS), 30, "the tunnel")
        yield {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.terminate()
        process.terminate()
        process.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(happened: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {what}"
        time.sleep(0.3)
    return found


def _take_turns(hosts: netns.Net, cluster: str) -> None:
    """Three turns of two stores, of whom one may have a process; then the doctor, as somebody on the head."""
    then = f"python jobs/federate.py {hosts.folder}/run.yaml && (raypipe doctor --json --megabytes 1; true)"
    submit = ["ray", "job", "submit", "--address", f"http://127.0.0.1:{JOBS}", "--working-dir", ".", "--"]
    gone: list[tuple[str, float]] = []
    with tunnel(cluster) as shown, (hosts.folder / "job.log").open("w+") as log:
        begun = time.time()
        job = subprocess.Popen([*submit, "sh", "-c", then], cwd=ROOT, env=os.environ | shown, stdout=log, stderr=log)
        _no_stranger_gets_in()
        seen, up = dict[str, float](), dict[str, str]()
        while job.poll() is None:
            before, up = up, nodes(hosts)
            seen |= {node: time.time() for node in up.values() if node not in seen}
            gone += [(node, time.time()) for node in before.values() if node not in up.values()]
            assert time.time() < begun + 400, log.name
            time.sleep(0.3)
        log.seek(0)
        said = log.read()
    assert job.returncode == 0, said[-3000:]
    first, second, third = (node.rpartition("-")[0] for node in seen)
    assert first == third != second, seen
    assert [node for node, _ in gone[:2]] == list(seen)[:2], "idle, it was released while the other had its turn"
    (journal,) = hosts.hosts["head"].home.glob(".raypipe/runs/up-*/journal.sqlite")
    records = list(Journal(journal).read())
    published = {r.body["version"]: r for r in records if r.kind == "version_published"}
    assert [[c["store"] for c in published[n].body["contributions"]] for n in (1, 2, 3)] == [[first], [second], [first]]
    released = {r.body["store"]: r.at for r in records if r.kind == "store_released"}
    asked = [r.at for r in records if r.kind == "store_asked"]
    joined = [r.at for r in records if r.kind == "store_joined"]
    took = [published[n + 1].at - at for n, at in enumerate(asked[:3])]
    print(f"submitted to its first record: {records[0].at - begun:.0f} s")
    print("asked for, node up and training, in a version, in seconds (load", f"{os.getloadavg()[0]:.1f}):")
    for n, (at, chosen, came) in enumerate(zip(asked, seen.values(), joined, strict=False)):
        print(f"  {chosen - at:.1f} to be wanted by the autoscaler, {came - chosen:.1f} until it joined, ", end="")
        print(f"{took[n] - came + at:.1f} until it was in a version: {took[n]:.1f}")
    idle = gone[0][1] - min(released.values())
    print(f"idle, released after {idle:.0f} s, {idle - IDLE_S:.0f} s over its idle time")
    crowd = max(1.5, os.getloadavg()[0] / (os.cpu_count() or 1) / 2)  # others on this machine
    assert max(came - at for at, came in zip(asked[:3], joined[:3], strict=True)) < 30 * crowd
    assert idle < IDLE_S + 30 * crowd
    assert "station" not in on(hosts, "head", "grep -h 'Adding' /tmp/ray/session_latest/logs/monitor.log")
    _no_open_door(_told(said), first)


def _told(said: str) -> dict[str, Any]:
    """The doctor's JSON among a job's lines, where Ray's own may hold braces too."""
    for at in (place for place, sign in enumerate(said) if sign == "{"):
        with suppress(ValueError):
            found = json.JSONDecoder().raw_decode(said[at:])[0]
            if "nodes" in found:
                return dict(found)
    raise AssertionError(said)


def _no_open_door(said: dict[str, Any], store: str) -> None:
    """By the doctor, who knocks as a stranger would; on a busy machine the store's node may be gone before he comes."""
    assert [one for one in said["findings"] if one["level"] == "WRONG"] == []
    assert {found for node in said["nodes"] for found in node["stores"]} <= {store}
    for node in (one for one in said["nodes"] if not one["left"]):
        assert len(node["facts"]["ports"]) >= 4
        assert node["open_ports"] == []
        assert set(node["http"].values()) <= {"metrics", *CLOSED}


def _no_stranger_gets_in() -> None:
    """Neither without a certificate nor, with one, without the token."""
    with pytest.raises(RunError, match=f"the cluster at {HEAD}:6379 speaks TLS: set RAY_USE_TLS=1"):
        refuse_misfit(f"{HEAD}:6379")
    own = Path(os.environ["RAYPIPE_HOME"]) / "certs" / "nodes" / "mill"
    files = {"RAY_TLS_SERVER_CERT": "node.crt", "RAY_TLS_SERVER_KEY": "node.key", "RAY_TLS_CA_CERT": "ca.crt"}
    with pytest.MonkeyPatch.context() as patch:
        for name, file in files.items():
            patch.setenv(name, str(own / file))
        patch.setenv("RAY_USE_TLS", "1")
        with pytest.raises(RunError, match=f"the cluster at {HEAD}:6379 wants a token: set RAY_AUTH_MODE=token"):
            refuse_misfit(f"{HEAD}:6379")

"""A cluster's doors, the doctor and what is left on a cluster, on the tests' own cluster, which has no doors."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, STORES, Place

from raypipe.errors import ConfigError, RunError
from raypipe.security.actor import Doors, look, refuse_misfit, refuse_open
from raypipe.tracking.journal import Journal

pytestmark = pytest.mark.cluster


def raypipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raypipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=180)


@pytest.fixture
def seen_by_others(cluster: Place) -> str:
    """Ray listens on every address, loopback's or not: this machine's own will do for a stranger."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        host = probe.getsockname()[0]
    return f"{host}:{cluster.address.rpartition(':')[2]}"


def test_a_cluster_that_lets_strangers_in_is_refused(cluster: Place, seen_by_others: str) -> None:
    assert look(seen_by_others) == Doors(tls=False, token=False)
    with pytest.raises(ConfigError, match="is open: no token authentication and no TLS; whoever reaches it runs code"):
        refuse_open(seen_by_others)
    with pytest.raises(ConfigError, match="is open: no token authentication; whoever reaches it"):
        refuse_open(cluster.address)  # loopback's, where it listens is everywhere


def test_what_only_this_machine_reaches_needs_no_door() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        refuse_open(f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(BlockingIOError):  # nobody has knocked
            server.accept()


def test_no_run_is_taken_up_where_strangers_get_in(
    seen_by_others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    (tmp_path / "runs" / "died").mkdir(parents=True)
    journal = Journal(tmp_path / "runs" / "died" / "journal.sqlite", write=True)
    config = {"name": "x", "stores": [{"id": "a"}], "stop": {"max_versions": 1}}
    journal.append("run_started", {"config": config, "cluster": True}, 0.0)
    journal.close()
    done = raypipe("resume", "--address", seen_by_others)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is open: no token authentication" in done.stderr


def test_what_a_cluster_does_not_speak_is_said(cluster: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_misfit(cluster.address)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with pytest.raises(RunError, match="does not speak TLS, and RAY_USE_TLS is set here"):
        refuse_misfit(cluster.address)


def test_no_head_is_said_at_once() -> None:
    done = raypipe("doctor", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["raypipe: no Ray cluster at 127.0.0.1:1: Connection refused"]


def test_the_doctor_looks_every_node_over(cluster: Place) -> None:
    done = raypipe("doctor", "--json", "--megabytes", "1", "--address", cluster.address)
    said: dict[str, Any] = json.loads(done.stdout)
    by_store = {store: node for node in said["nodes"] for store in node["stores"]}
    assert sorted(by_store) == STORES
    for store, node in by_store.items():
        (data,) = node["facts"]["data"]
        assert (data["store"], data["name"]) == (store, "products")
        assert len(data["digest"]) == 64
        assert min(node["down_mbs"], node["up_mbs"], node["ping_ms"]) > 0
        assert abs(node["skew_s"]) < 2
        assert node["unreached"] == []
    assert [one for one in said["findings"] if one["level"] == "WRONG"] == []
    open_ports = {one["who"] for one in said["findings"] if "takes calls from strangers" in one["line"]}
    assert len(open_ports) == len(said["nodes"])  # a note: they are on loopback
    assert done.returncode == 0


def test_a_run_without_a_coordinator_is_taken_down_and_no_other(cluster: Place) -> None:
    left = """
        import ray
        ray.init(address=%r, namespace="raypipe", log_to_driver=False)
        class Left:
            def here(self): return 1
            def stop(self, reason): return reason
            def progress(self, seen, timeout_s): return {"phase": "over"}
        made = ray.remote(num_cpus=0)(Left)
        for name in ("store/dead/shop-1/abc", "coordinator/alive", "store/alive/shop-1/abc", "other/dead/x"):
            actor = made.options(name=name, lifetime="detached").remote()
            ray.get(actor.here.remote())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(left) % cluster.address], check=True, timeout=120)
    first = raypipe("down", "--address", cluster.address).stdout.splitlines()
    assert first == ["ended: store/dead/shop-1/abc", "1 actors ended"]
    assert raypipe("down", "--address", cluster.address).stdout.splitlines() == ["nothing was left"]
    second = raypipe("down", "alive", "--address", cluster.address).stdout.splitlines()
    assert second == ["ended: coordinator/alive", "ended: store/alive/shop-1/abc", "2 actors ended"]
    third = raypipe("down", "alive", "--address", cluster.address)
    assert (third.returncode, third.stderr) == (2, "raypipe: no actor of a run named 'alive' is on this cluster\n")
    subprocess.run([sys.executable, "-c", textwrap.dedent(END) % cluster.address], check=True, timeout=120)


END = """
    import ray
    ray.init(address=%r, namespace="raypipe", log_to_driver=False)
    ray.kill(ray.get_actor("other/dead/x"))
"""

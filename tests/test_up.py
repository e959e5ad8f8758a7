"""`ray up cluster/stores.yaml` for real: hosts with addresses and sshd in network namespaces, token and TLS on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import netns
import pytest
import yaml
from conftest import CLASSES, ROOT

from raypipe.cli import main
from raypipe.doctor.findings import CLOSED
from raypipe.placement.provider import StoreProvider
from raypipe.placement.render import TLS, environment
from raypipe.placement.settings import Settings

HEAD, STORES = "10.88.0.1", {"harbour": "10.88.0.2", "mill": "10.88.0.3"}
BIN = Path(sys.executable).parent
IDLE_S = 18
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
            on(made, host, f"echo export PYTHONPATH={ROOT} {PATIENT} >> ~/.bashrc")
        yield made


def on(hosts: netns.Net, host: str, command: str, timeout_s: float = 60) -> str:
    """What a command prints there, both streams."""
    ssh = ["ssh", "-n", "-i", str(hosts.key), "-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null"]
    target = [*ssh, "-oLogLevel=ERROR", f"root@{hosts.hosts[host].address}", command]
    return subprocess.run(target, text=True, stdout=-1, stderr=subprocess.STDOUT, timeout=timeout_s).stdout


def at_head(hosts: netns.Net, command: str, timeout_s: float = 180) -> str:
    """As somebody who may: with the head's certificate and token."""
    shown = " ".join(f"{key}={value}" for key, value in environment(Settings(venv=str(BIN.parent)), TLS).items())
    return on(hosts, "head", f"export {shown} RAY_ADDRESS={HEAD}:6379; cd {ROOT}; {command}; echo code $?", timeout_s)


def up_nodes(hosts: netns.Net) -> set[str]:
    """Store nodes in the head's book."""
    book = json.loads(on(hosts, "head", "cat ~/.raypipe/cluster/raypipe.json"))
    return {node.rpartition("-")[0] for node in book} - {"raypipe"}


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


def test_a_store_comes_when_it_is_wanted_goes_when_idle_and_comes_again(hosts: netns.Net) -> None:
    rows = "".join(f"{store},{host},0,north,\n" for store, host in STORES.items())
    (hosts.folder / "stores.csv").write_text(f"id,host,gpus,region,hours\n{rows}")
    where = [str(hosts.folder / "stores.csv"), "--head", HEAD]
    login = ["--user", "root", "--key", str(hosts.key)]
    assert main(["certs", "make", *where]) == 0
    assert main(["certs", "send", *where, *login]) == 0
    more = ["--venv", str(BIN.parent), "--idle-minutes", str(IDLE_S / 60), "--out", str(hosts.folder)]
    assert main(["cluster", "render", *where, *login, *more]) == 0
    config = {
        "name": "up",
        "task": {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
        "model": {"name": "small_cnn", "width": 8},
        "stores": [{"id": "harbour", "cpus": 0.5}],
        "train": {"local_steps": 4, "batch_size": 16},
        "pace": "wait_for_all",
        "stop": {"max_versions": 2},
        "evaluate": {"test": False, "alone": False},
        "track": {"mlflow": False},
        "local": {"sample": "fashion-mnist", "max_images": 800},
    }
    (hosts.folder / "run.yaml").write_text(yaml.safe_dump(config))
    on(hosts, "harbour", f"cd {ROOT}; {BIN}/python -m raypipe data {hosts.folder}/run.yaml")
    on(hosts, "harbour", "RAY_CLOUD_INSTANCE_ID=anothers nohup sleep 600 >/dev/null 2>&1 &")
    cluster = str(hosts.folder / "stores.yaml")
    try:
        for _ in range(2):  # Ray gives a node half a minute to start, which a busy machine may not have
            done = subprocess.run(["ray", "up", "-y", "--no-config-cache", cluster], capture_output=True, text=True)
            if done.returncode == 0:
                break
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert up_nodes(hosts) == set()
        _comes_and_goes(hosts)
    finally:
        done = subprocess.run(["ray", "down", "-y", cluster], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    for host in hosts.hosts:
        assert "ray" not in on(hosts, host, "cat /proc/[0-9]*/comm | grep -E '^(raylet|gcs_server|ray::.*)$'")
    assert on(hosts, "harbour", "grep -lz RAY_CLOUD_INSTANCE_ID=anothers /proc/[0-9]*/environ | wc -l").strip() != "0"


def _comes_and_goes(hosts: netns.Net) -> None:
    train = f"raypipe train {hosts.folder}/run.yaml"
    for time_round in (1, 2):
        begin = time.monotonic()
        said = at_head(hosts, train)
        assert "code 0" in said, said
        assert re.search(r"harbour +800 .* 100.0%", said), said
        seconds = time.monotonic() - begin
        print(f"asked for, up, trained and over: {seconds:.0f} s")
        assert seconds < 120  # on a machine that does nothing else: 30 to the first version
        begin = time.monotonic()
        if time_round == 1:
            _no_open_door(hosts)
        while "harbour" in up_nodes(hosts):
            assert time.monotonic() - begin < IDLE_S + 45
            time.sleep(1)
        print(f"idle, released: {time.monotonic() - begin:.0f} s")
    assert "mill" not in on(hosts, "head", "grep -h 'Adding' /tmp/ray/session_latest/logs/monitor.log")


def _no_open_door(hosts: netns.Net) -> None:
    """The doctor, and a machine that has neither certificate nor token."""
    said = at_head(hosts, "raypipe doctor --json --megabytes 1")
    nodes = json.loads(said[said.index("{") : said.rindex("}") + 1])["nodes"]
    assert "code 0" in said, said
    assert {store for node in nodes for store in node["stores"]} == {"harbour"}
    for node in nodes:
        assert len(node["facts"]["ports"]) >= 4
        assert node["open_ports"] == []
        assert set(node["http"].values()) <= {"metrics", *CLOSED}
    stranger = subprocess.run(
        [sys.executable, "-m", "raypipe", "doctor", "--address", f"{HEAD}:6379"], capture_output=True, text=True
    )
    assert f"raypipe: the cluster at {HEAD}:6379 speaks TLS" in stranger.stderr

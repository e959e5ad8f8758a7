"""The supervisors of nodes with a program of ours in Ray's place: what they say, refuse, start again and end."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from ray.exceptions import RayTaskError

from raypipe.comeback import unfinished
from raypipe.config.schema import RunConfig
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.launch import _ended
from raypipe.placement.plan import store_options
from raypipe.security.certs import make_node, open_authority, token_of
from raypipe.security.files import write_secret
from raypipe.tracking.journal import Journal

FAKE = """#!/bin/bash
echo "$(date +%s.%N) $*" >> "$LOG"
{body}
"""


@pytest.fixture
def head() -> Iterator[str]:
    """Something that listens where a head would."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


class Place:
    """A store's folder and a folder of programs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        (folder / "bin").mkdir()
        (folder / "stores" / "a").mkdir(parents=True)
        (folder / "stores" / "a" / "policy.yaml").write_text("store: a\n")
        shutil.copytree(ROOT / "cluster", folder / "cluster")  # beside it an environment's programs would come first

    def program(self, name: str, body: str) -> None:
        file = self.folder / "bin" / name
        file.write_text(FAKE.format(body=body))
        file.chmod(0o755)

    def start(self, script: str, *arguments: str, insecure: bool = True, **said: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.folder / 'bin'}:/usr/bin:/bin", "LOG": str(self.log), "HOME": str(self.folder)}
        env |= {"RAYPIPE_STORES": str(self.folder / "stores"), "RAYPIPE_HOME": str(self.folder / "home")}
        env["RAYPIPE_VAULTS"] = str(self.folder / "v")
        command = [str(self.folder / "cluster" / script), *["--insecure"] * insecure, *arguments]
        env |= said
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def started(self) -> list[tuple[float, str]]:
        """When, and with what, programs were started."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(float(at), words) for at, words in (line.split(" ", 1) for line in lines)]

    def certify(self, made_at: datetime.datetime) -> None:
        """What `raypipe certs send` leaves on a node, and raypipe itself, to look at it."""
        tls = self.folder / ".raypipe" / "tls"
        make_node(open_authority(self.folder / "ca", made_at), tls, "a", ["127.0.0.1"], made_at)
        write_secret(tls / "token", token_of(self.folder / "ca"))
        self.program("raypipe", f'PYTHONPATH={ROOT} exec {sys.executable} -m raypipe "$@"')


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def wait_for(happened: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.05)


def ended(process: subprocess.Popen[str], how: int = signal.SIGTERM) -> tuple[int, str, str]:
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("store-node", [], "store '': a store's id has letters, digits, '.', '_' and '-', at most 63"),
        ("store-node", ["a b", "--address", "h:1"], "store 'a b': a store's id has letters"),
        ("store-node", ["a", "b"], "one store a node, not a and b"),
        ("store-node", ["a"], "--address '': write HOST:PORT, e.g. 10.0.0.1:6379"),
        ("store-node", ["a", "--address"], "--address '': write HOST:PORT"),
        ("store-node", ["a", "--address", "h:70000"], "--address h:70000: a port is 1 to 65535"),
        ("store-node", ["a", "--address", "h;ls:1"], "--address 'h;ls:1': write HOST:PORT"),
        ("store-node", ["a", "--address", "h:1", "--labels", "north"], "--labels north: write KEY=VALUE,KEY=VALUE"),
        ("store-node", ["b", "--address", "h:1"], "store b: no policy file"),
        ("store-node", ["a", "--adress", "h:1"], "no option --adress: store-node STORE --address HEAD:PORT"),
        ("store-node", ["a", "--address", "h:1"], "no program ray in PATH"),
        ("head-node", [], "--address '': write HOST:PORT"),
        ("head-node", ["a"], "no option a: head-node --address HOST:PORT"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(place: Place, script: str, arguments: list[str], said: str) -> None:
    out, err = (done := place.start(script, *arguments)).communicate(timeout=10)
    assert (done.returncode, out) == (2, "")
    assert err.startswith(f"{script}: {said}")
    assert err.count("\n") == 1
    assert place.started() == []


def test_a_store_behind_a_vault_has_no_policy_file_that_its_node_could_read(place: Place, head: str) -> None:
    place.program("ray", "exec sleep 60")
    (place.folder / "v" / "b").mkdir(parents=True)
    (place.folder / "v" / "b" / "vault.yaml").write_text("store: b\n")
    running = place.start("store-node", "b", "--address", head)
    wait_for(place.started)
    _, err = (second := place.start("store-node", "b", "--address", head)).communicate(timeout=10)
    assert second.returncode == 2
    assert err == f"store-node: another one is at work: it holds {place.folder}/home/node-b.lock\n"
    assert ended(running)[0] == 0
    assert not (place.folder / "stores" / "b").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "said", "line"),
    [
        ("store-node", ["a"], {}, "no {home}/.raypipe/tls: raypipe certs send gives a node its token and certificate"),
        ("head-node", [], {}, "no {home}/.raypipe/tls: raypipe certs send gives a node its token and certificate"),
        ("store-node", ["a"], {"RAY_TLS_SERVER_CERT": "/none"}, "token {home}/.raypipe/tls/token cannot be read"),
    ],
)
def test_without_token_and_certificate_no_node_is_started(
    place: Place, script: str, arguments: list[str], said: dict[str, str], line: str
) -> None:
    for name in ("ray", "raypipe"):
        place.program(name, f'PYTHONPATH={ROOT} exec {sys.executable} -m raypipe "$@"')
    done = place.start(script, *arguments, "--address", "h:1", insecure=False, **said)
    assert done.wait(30) == 2
    assert done.stderr.read().startswith(f"{script}: {line.format(home=place.folder)}")
    assert [words for _, words in place.started() if "start" in words] == []


@pytest.mark.parametrize(
    ("script", "arguments", "said", "line"),
    [
        ("store-node", ["a"], {"RAY_AUTH_MODE": "disabled"}, "RAY_AUTH_MODE=disabled RAY_USE_TLS=1 let strangers in"),
        ("head-node", [], {"RAY_USE_TLS": "0"}, "RAY_AUTH_MODE=token RAY_USE_TLS=0 let strangers in: token and 1, or"),
        ("head-node", ["--", "--dashboard-host=10.0.0.1"], {}, "--dashboard-host: the jobs' port is plain HTTP"),
        ("head-node", ["--", "--dashboard-host", "0.0.0.0"], {}, "--dashboard-host: the jobs' port is plain HTTP"),
    ],
)
def test_a_door_that_is_said_to_be_left_open_is_refused(
    place: Place, script: str, arguments: list[str], said: dict[str, str], line: str
) -> None:
    place.certify(datetime.datetime.now(datetime.UTC))
    place.program("ray", "exec sleep 60")
    first = arguments[:1] if arguments[:1] != ["--"] else []
    done = place.start(script, *first, "--address", "h:1", *arguments[len(first) :], insecure=False, **said)
    assert done.wait(30) == 2
    assert done.stderr.read().startswith(f"{script}: {line}")
    assert place.started() == []


def test_a_certificate_that_has_ended_is_said_before_a_node_is_started(place: Place, head: str) -> None:
    place.certify(datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400))
    place.program("ray", "exec sleep 60")
    _, err = (done := place.start("store-node", "a", "--address", head, insecure=False)).communicate(timeout=30)
    assert done.returncode == 2
    file = place.folder / ".raypipe" / "tls" / "node.crt"
    assert re.fullmatch(rf"store-node: certificate {file} ended on \S+: raypipe certs make, then .* send\n", err)
    assert [words for _, words in place.started() if words.startswith("start")] == []


def test_a_node_shows_what_certs_send_put_on_its_machine(place: Place, head: str) -> None:
    """And a certificate that ends while it is kept stops no supervisor: its node is begun anew when it is renewed."""
    now = datetime.datetime.now(datetime.UTC)
    place.certify(now)
    place.program("ray", f"env | grep -E '^RAY_(AUTH|TLS|USE)' | sort > {place.folder}/shown; sleep 4")
    running = place.start("store-node", "a", "--address", head, insecure=False)
    wait_for(lambda: (place.folder / "shown").exists() and (place.folder / "shown").read_text(), 30)
    tls = place.folder / ".raypipe" / "tls"
    assert (place.folder / "shown").read_text().split() == [
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={tls}/token",
        f"RAY_TLS_CA_CERT={tls}/ca.crt",
        f"RAY_TLS_SERVER_CERT={tls}/node.crt",
        f"RAY_TLS_SERVER_KEY={tls}/node.key",
        "RAY_USE_TLS=1",
    ]
    place.certify(now - datetime.timedelta(days=400))
    checks = sum("certs check" in words for _, words in place.started())
    wait_for(lambda: sum("certs check" in words for _, words in place.started()) >= checks + 2, 40)
    place.certify(now)
    wait_for(lambda: sum(words.startswith("start") for _, words in place.started()) == 2, 40)
    code, out, err = ended(running)
    assert (code, err) == (0, "")
    assert "ended on" in out


def test_an_option_that_ray_refuses_is_not_tried_again(place: Place, head: str) -> None:
    place.program("ray", "exit 2")
    _, err = (done := place.start("store-node", "a", "--address", head, "--", "--wrong")).communicate(timeout=20)
    assert done.returncode == 2
    assert "ray start refused an option" in err
    assert len(place.started()) == 1


def test_a_node_offers_what_its_store_is_pinned_to_and_is_started_again_with_growing_pauses(
    place: Place, head: str
) -> None:
    place.program("ray", "exit 1")
    running = place.start("store-node", "a", "--address", head, "--labels", "city=rome", "--", "--num-gpus=1")
    wait_for(lambda: len(place.started()) == 3)
    code, out, err = ended(running)
    assert (code, err) == (0, "")
    times, words = zip(*place.started(), strict=True)
    (wanted,) = store_options("a", 1, 0)["resources"]
    said = f'start --address={head} --block --disable-usage-stats --resources={{"{wanted}": 1}}'
    assert set(words) == {f"{said} --labels=store=a,city=rome --num-gpus=1"}
    assert times[1] - times[0] >= 1
    assert times[2] - times[1] >= 2
    assert "again in 1 s" in out
    assert "again in 2 s" in out


def test_it_waits_for_a_head_that_is_not_there_yet(place: Place) -> None:
    place.program("ray", "exec sleep 60")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        running = place.start("store-node", "a", "--address", address)
        time.sleep(1.5)
        assert place.started() == []
        free.listen()
        wait_for(place.started)
    out = ended(running)[1]
    assert out.splitlines() == [f"store-node: waits for {address}", f"store-node: joins {address} with store:a",
                                "store-node: stopped"]  # fmt: skip


def test_sigterm_ends_all_that_was_started_and_nothing_else(place: Place, head: str) -> None:
    """A child that hears no SIGTERM, and a grandchild; beside them a stranger with the same name."""
    place.program("ray", "trap '' TERM; sleep 61 & sleep 62; sleep 62")
    stranger = subprocess.Popen(["sleep", "61"])
    running = place.start("store-node", "a", "--address", head)
    wait_for(lambda: len(psutil.Process(running.pid).children(recursive=True)) >= 3)
    own = [
        p for p in psutil.Process(running.pid).children(recursive=True) if p.name() == "sleep" and "6" in p.cmdline()[1]
    ]
    code, out, _ = ended(running)
    assert code == 0
    assert out.endswith("store-node: stopped\n")
    assert [p for p in own if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_signal_is_heard_at_whatever_moment_it_comes(place: Place) -> None:
    """With short ticks, as a signal must meet the end of one: of 100 that waited by `wait -n`, two or more hung."""
    loop = f"""source {place.folder}/cluster/supervise.sh; exec {{lock}}</dev/null
               TICK_S=0.003; start sleep 60; trap 'stopping=1' TERM
               echo; while [[ -z $stopping ]]; do pause 1 "$started"; done; finish "$started"; echo "$ended" """

    def stopped(after_s: float) -> str:
        with subprocess.Popen(["bash", "-uc", loop], stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            running.stdout.readline()
            time.sleep(after_s)
            running.terminate()
            try:
                return running.communicate(timeout=5)[0]
            except subprocess.TimeoutExpired:
                running.kill()
                raise

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(stopped, [0.005 + 0.0001 * n for n in range(200)])) == {"143\n"}


def test_a_supervisor_that_is_killed_takes_its_node_with_it_and_another_may_begin(place: Place, head: str) -> None:
    place.program("ray", "exec sleep 60")
    first = place.start("store-node", "a", "--address", head)
    wait_for(place.started)
    (node,) = [p for p in psutil.Process(first.pid).children(recursive=True) if p.cmdline()[1:] == ["60"]]
    _, err = (second := place.start("store-node", "a", "--address", head)).communicate(timeout=10)
    assert second.returncode == 2
    assert err == f"store-node: another one is at work: it holds {place.folder}/stores/a/node.lock\n"
    ended(first, signal.SIGKILL)
    wait_for(lambda: not node.is_running() or node.status() == psutil.STATUS_ZOMBIE)
    third = place.start("store-node", "a", "--address", head)
    wait_for(lambda: len(place.started()) == 2)
    assert ended(third)[0] == 0


def test_a_ray_start_whose_raylet_is_gone_is_begun_anew(place: Place, head: str) -> None:
    """`ray start --block` lives on when its raylet ends with exit code 0, e.g. drained."""
    shutil.copy("/bin/sleep", place.folder / "bin" / "raylet")
    place.program("ray", "raylet 3 & sleep 60")
    running = place.start("store-node", "a", "--address", head)
    wait_for(lambda: len(place.started()) == 2, 15)
    assert ended(running)[0] == 0


def test_the_head_is_started_and_what_died_is_taken_up_until_that_succeeds(place: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    place.program("ray", f'exec python3 -c "{listen}"')
    place.program("raypipe", '[[ $(grep -c resume "$LOG") -ge 2 ]]')
    running = place.start("head-node", "--address", f"127.0.0.1:{port}", "--", "--num-cpus=0")
    wait_for(lambda: len(place.started()) == 3, 15)
    time.sleep(2.5)
    assert ended(running)[0] == 0
    words = [words for _, words in place.started()]
    start = f"start --head --block --disable-usage-stats --node-ip-address=127.0.0.1 --port={port} --num-cpus=0"
    assert words == [start, *[f"resume --address 127.0.0.1:{port} --insecure"] * 2]


@pytest.mark.parametrize("unit", ["raypipe-store@.service", "raypipe-head.service"])
def test_the_systemd_units_are_as_systemd_wants_them(unit: str, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze here")
    file = tmp_path / unit.replace("@.", "@shop.")
    file.write_text((ROOT / "cluster" / unit).read_text().replace("/opt/raypipe", str(ROOT)))
    env = {**os.environ, "SYSTEMD_LOG_LEVEL": "warning"}
    done = subprocess.run(
        [verify, "verify", str(file)], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_only_runs_of_a_cluster_that_are_not_over_are_taken_up(tmp_path: Path) -> None:
    config = {"name": "x", "stores": [{"id": "a"}], "stop": {"max_versions": 1}}
    over = ("run_finished", {"reason": "1 version"})

    def begun(config: dict[str, Any] = config, **where: bool) -> tuple[str, dict[str, Any]]:
        return "run_started", {"config": config, **where}

    runs: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        "old": [begun(cluster=True), ("version_published", {"version": 0})],
        "over": [begun(cluster=True), over],
        "alone": [begun(cluster=False)],
        "moved": [begun(cluster=True), begun(cluster=False)],
        "before-this": [begun()],
        "again": [begun(cluster=True), over, begun(cluster=True)],
        "strange": [begun({**config, "pace": "fast"}, cluster=True)],
        "empty": [],
    }
    for name, records in runs.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        journal = Journal(tmp_path / "runs" / name / "journal.sqlite", write=True)
        for kind, body in records:
            journal.append(kind, body, 0.0)
        journal.close()
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "journal.sqlite").write_bytes(b"no journal" * 500)
    found = unfinished(tmp_path)
    assert list(found) == ["again", "old", "strange", "torn"]
    assert found["old"] == found["again"] == RunConfig.model_validate(config)
    assert isinstance(found["strange"], ConfigError)
    assert "is not one of this raypipe: 1 mistake" in found["strange"].message
    assert isinstance(found["torn"], RunError)


@pytest.mark.parametrize("over", [False, True])
def test_a_run_that_could_not_go_on_for_now_is_tried_again(
    over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    (tmp_path / "runs" / "x").mkdir(parents=True)
    journal = Journal(tmp_path / "runs" / "x" / "journal.sqlite", write=True)
    config = {"name": "x", "stores": [{"id": "a"}], "stop": {"max_versions": 1}}
    journal.append("run_started", {"config": config, "cluster": True}, 0.0)
    if over:
        journal.append("run_finished", {"reason": "failed"}, 0.0)
    journal.close()

    def failed(cause: RaypipeError) -> dict[str, Any]:
        raise RayTaskError("work", "traceback", cause)

    full = "the diary could not be written: No space left on device"
    assert _ended("x", lambda: failed(RunError(full))) == (full, over)
    assert _ended("x", lambda: failed(ConfigError("wrong"))) == ("wrong", True)
    assert _ended("x", lambda: {"versions": 3, "reason": "3 versions"}) == ("3 versions, ended: 3 versions", True)

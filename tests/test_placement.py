"""A list of stores, the files made of it, the keys of its nodes: all without Ray running."""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import os
import platform
import re
import socket
import ssl
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import click
import psutil
import pytest
import yaml
from conftest import ROOT
from cryptography.hazmat.primitives.serialization import Encoding
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from raypipe.cli import main
from raypipe.config.load import load
from raypipe.doctor.findings import Seen, findings, stayed
from raypipe.doctor.probe import Data, Facts
from raypipe.errors import ConfigError
from raypipe.placement.book import Book, troubles
from raypipe.placement.inventory import Machine, open_at, read_machines
from raypipe.placement.kuberay import cluster_objects, job_objects
from raypipe.placement.offers import node_types
from raypipe.placement.plan import missing_advice, store_options
from raypipe.placement.provider import STOP, StoreProvider
from raypipe.placement.render import aws_config, render, stores_config
from raypipe.placement.settings import Settings
from raypipe.placement.ssh import Login, SshError, explain
from raypipe.security.certs import check_cert, load_cert, make_node, open_authority, standing, still_good, token_of
from raypipe.security.commands import _pack
from raypipe.security.files import read_secret, write_secret
from raypipe.security.own import check_own

NOW = datetime.datetime(2026, 11, 1, tzinfo=datetime.UTC)
REQUIREMENTS = ROOT / "cluster" / "requirements.txt"
HEADER = "id,host,gpus,region,hours"
REFUSED = "root@h: Permission denied (publickey)."
GOOD = "harbour,10.1.0.7,1,north,22:00-06:00 Europe/Berlin"
SETTINGS = Settings(head="10.1.0.1")


def written(tmp_path: Path, *rows: str, header: str = HEADER) -> Path:
    path = tmp_path / "stores.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_a_row_is_a_machine(tmp_path: Path) -> None:
    assert read_machines(written(tmp_path, GOOD, "", "mill,mill.example,,,")) == [
        Machine("harbour", "10.1.0.7", 1, "north", "22:00-06:00 Europe/Berlin"),
        Machine("mill", "mill.example"),
    ]


@pytest.mark.parametrize(
    ("rows", "header", "said"),
    [
        ([GOOD], "id,host,gpu,region,hours", "no column 'gpu' is known. Did you mean 'gpus'?"),
        ([GOOD], "id,host,gpus,region", "column hours is missing; the first row is: id,host,gpus,region,hours"),
        ([GOOD], "id,id,host,gpus,region,hours", "column id is there twice"),
        ([], HEADER, "no store in it; its first row names the columns"),
        (["a,10.0.0.1,0,x"], HEADER, "line 2: 4 fields where the first row has 5"),
        (["north mill,10.0.0.1,0,,"], HEADER, "line 2: id 'north mill': letters, digits,"),
        (["Head,10.0.0.1,0,,"], HEADER, "line 2: id 'Head' is the head's name"),
        (["a,-oProxyCommand=x,0,,"], HEADER, "line 2: host '-oProxyCommand=x' is neither"),
        (["a,root@10.0.0.1,0,,"], HEADER, "line 2: host 'root@10.0.0.1' is neither"),
        (["a,10.0.0.1,one,,"], HEADER, "line 2: gpus 'one': a whole number from 0 to 1024"),
        (["a,10.0.0.1,0,far away,"], HEADER, "line 2: region 'far away'"),
        (["a,10.0.0.1,0,,9-17"], HEADER, "line 2: hours '9-17': HH:MM-HH:MM"),
        (["a,10.0.0.1,0,,09:00-17:00 Mars/Base"], HEADER, "line 2: hours '09:00-17:00 Mars/Base': no time zone"),
        (["a,10.0.0.1,0,,09:00-09:00"], HEADER, "line 2: hours '09:00-09:00' is no time at all"),
        ([GOOD, "harbour,10.0.0.2,0,,"], HEADER, "line 3: store harbour is there already, in line 2"),
        ([GOOD, "mill,10.1.0.7,0,,"], HEADER, "line 3: store mill is on host 10.1.0.7, which is harbour's already"),
        (["mill,10.1.0.1,0,,"], HEADER, "line 2: store mill is on host 10.1.0.1, which is the head's already"),
    ],
)
def test_each_mistake_in_a_list_has_a_line_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], header: str, said: str
) -> None:
    path = written(tmp_path, *rows, header=header)
    assert main(["cluster", "render", str(path), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"raypipe: {path}: {said}")
    assert not (tmp_path / "out").exists()


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_machines(written(tmp_path, "a b,10.0.0.1,0,,", "c,10.0.0.2,-1,,"))
    assert len(caught.value.problems) == 2


def test_a_machine_is_open_in_its_own_time_zone() -> None:
    night = "22:00-06:00 Europe/Berlin"
    at = datetime.datetime(2026, 7, 1, 20, 30, tzinfo=datetime.UTC)  # 22:30 there, in summer
    assert open_at(night, at.timestamp())
    assert not open_at(night, (at - datetime.timedelta(hours=1)).timestamp())
    assert not open_at("22:00-06:00", at.timestamp())
    assert open_at("", at.timestamp())


def test_a_store_has_a_node_type_that_no_other_store_can_take() -> None:
    types = node_types([Machine("harbour", "a", 2, "north", "22:00-06:00"), Machine("mill", "b")])
    assert types["harbour"] == {
        "min_workers": 0,
        "max_workers": 1,
        "resources": {"CPU": 2, "GPU": 2, "store:harbour": 1},
        "labels": {"store": "harbour", "region": "north", "hours": "2200-0600"},
    }
    assert "store:harbour" not in types["mill"]["resources"]


def test_no_store_has_mlflows_login() -> None:
    """A job's environment reaches every actor of it; what an actor's own says goes before."""
    said = store_options("harbour", 1, 0)["runtime_env"]["env_vars"]
    secret = [f"MLFLOW_TRACKING_{what}" for what in ("URI", "USERNAME", "PASSWORD", "TOKEN")]
    assert {name: said.get(name) for name in secret} == dict.fromkeys(secret, "")


def test_five_hundred_stores_are_planned_within_a_second() -> None:
    machines = [Machine(f"shop-{i}", f"10.0.{i // 250}.{i % 250}", i % 3, "north") for i in range(500)]
    begin = time.process_time()
    assert len(node_types(machines)) == 500
    assert len(stores_config(machines, SETTINGS)["available_node_types"]) == 501
    assert time.process_time() - begin < 1
    for one in [*cluster_objects(machines, SETTINGS), *job_objects(machines, SETTINGS)]:
        assert len(str(one)) < 1_500_000  # what Kubernetes takes as one object


def test_the_configuration_that_the_readme_submits_runs_on_the_cluster_that_it_makes() -> None:
    """Its stores are those of the list, and each machine has what its store asks for."""
    submitted = re.search(r"ray job submit .* -- python jobs/federate.py (\S+)", (ROOT / "README.md").read_text())
    assert submitted
    there = {machine.store: machine for machine in read_machines(ROOT / "cluster" / "stores.csv")}
    stores = load(ROOT / submitted[1], (), lambda _: []).stores
    assert [store.id for store in stores] == list(there)
    assert [s.id for s in stores if s.cpus > there[s.id].cpus or s.gpus > there[s.id].gpus] == []


def test_a_job_uploads_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """By the archive that Ray itself makes of a working directory."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "job.zip", include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(tmp_path / "job.zip") as packed:
        names = set(packed.namelist())
    code = {str(file.relative_to(ROOT)) for file in (ROOT / "raypipe").rglob("*.py")}
    configs = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").glob("*.yaml")}
    assert code | configs | {"jobs/federate.py"} <= names
    assert not {"tests", "cluster", ".ci", ".git", "README.md"} & {name.split("/")[0] for name in names}
    assert [name for name in names if name.endswith(".parquet") or "/bench" in name or "/chaos" in name] == []


def test_an_image_has_what_raypipe_needs_at_run_time() -> None:
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [Requirement(line) for line in said]
    pinned = dict(re.findall(r"^([a-zA-Z0-9._-]+)(?:\[.*\])?==([^\s;]+)", REQUIREMENTS.read_text(), re.MULTILINE))
    named = {canonicalize_name(name): version for name, version in pinned.items()}
    assert [one.name for one in wanted if not one.specifier.contains(named.get(canonicalize_name(one.name), "0"))] == []


def test_the_files_in_cluster_are_what_their_list_renders_to() -> None:
    made = render(read_machines(ROOT / "cluster" / "stores.csv"), Settings())
    assert [name for name, text in made.items() if (ROOT / "cluster" / name).read_text() != text] == []


@pytest.mark.parametrize("name", ["stores.yaml", "aws.yaml"])
def test_ray_takes_the_files_for_ray_up(name: str) -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load((ROOT / "cluster" / name).read_text())
    validate_config(fillout_defaults(config) if name == "aws.yaml" else config)
    for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_USE_TLS=1" in command
        assert "0.0.0.0" not in command


def test_stores_that_are_one_name_in_kubernetes_are_refused() -> None:
    with pytest.raises(ConfigError, match="are one in Kubernetes: a-b"):
        cluster_objects([Machine("a.b", "x"), Machine("a-b", "y")], SETTINGS)


def test_a_store_with_more_gpus_than_a_cloud_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="store big: no AWS machine has 16 GPUs; at most 8"):
        aws_config([Machine("big", "x", 16)], SETTINGS)


def test_a_certificate_names_its_node_and_is_taken_by_openssl(tmp_path: Path) -> None:
    authority = open_authority(tmp_path, NOW)
    make_node(authority, tmp_path / "n", "harbour", ["10.1.0.7"], NOW)
    found = standing(tmp_path / "n", NOW)
    assert found.name == "harbour"
    assert {"10.1.0.7", "127.0.0.1"} <= set(found.addresses)
    checked = subprocess.run(
        f"openssl verify -attime {NOW.timestamp():.0f} -CAfile ca.crt -verify_ip 10.1.0.7 n/node.crt".split(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert checked.stdout == "n/node.crt: OK\n", checked.stderr
    ssl.create_default_context().load_cert_chain(tmp_path / "n" / "node.crt", tmp_path / "n" / "node.key")


def test_only_their_owner_reads_keys_and_tokens(tmp_path: Path) -> None:
    make_node(open_authority(tmp_path / "ca", NOW), tmp_path / "n", "a", [], NOW)
    token_of(tmp_path / "ca")
    secret = [tmp_path / "ca" / "ca.key", tmp_path / "ca" / "token", tmp_path / "n" / "node.key"]
    assert [oct(path.stat().st_mode & 0o777) for path in secret] == ["0o600"] * 3
    assert (tmp_path / "ca").stat().st_mode & 0o777 == 0o700


def test_what_is_good_is_kept_and_the_rest_renewed(tmp_path: Path) -> None:
    authority = open_authority(tmp_path, NOW)
    make_node(authority, tmp_path / "n", "a", ["10.0.0.1"], NOW)
    later = NOW + datetime.timedelta(days=340)
    assert still_good(tmp_path / "n", ["10.0.0.1"], authority, NOW)
    assert not still_good(tmp_path / "n", ["10.0.0.2"], authority, NOW)
    assert not still_good(tmp_path / "n", ["10.0.0.1"], authority, later)
    assert not still_good(tmp_path / "n", ["10.0.0.1"], open_authority(tmp_path / "other", NOW), NOW)
    (tmp_path / "n" / "node.key").chmod(0o644)
    assert not still_good(tmp_path / "n", ["10.0.0.1"], authority, NOW)


def test_the_command_renews_only_what_has_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stores = written(tmp_path, "a,10.0.0.1,0,,", "b,10.0.0.2,0,,")
    make = ["certs", "make", str(stores), "--head", "10.0.0.9", "--folder", str(tmp_path / "ca")]
    assert main(make) == 0
    kept = (tmp_path / "ca" / "nodes" / "a" / "node.crt").read_bytes()
    written(tmp_path, "a,10.0.0.1,0,,", "b,10.0.0.3,0,,")
    assert main(make) == 0
    assert "1 certificates made, 2 kept" in capsys.readouterr().out
    assert (tmp_path / "ca" / "nodes" / "a" / "node.crt").read_bytes() == kept
    token = (tmp_path / "ca" / "token").read_bytes()
    assert main([*make, "--new-token"]) == 0
    assert (tmp_path / "ca" / "nodes" / "a" / "token").read_bytes() != token
    assert main(["certs", "show", "--folder", str(tmp_path / "ca")]) == 0


def test_a_node_gets_its_own_files_and_no_other(tmp_path: Path) -> None:
    make_node(open_authority(tmp_path / "ca", NOW), tmp_path / "n", "a", [], NOW)
    (tmp_path / "n" / "token").write_bytes(token_of(tmp_path / "ca"))
    with tarfile.open(fileobj=io.BytesIO(_pack(tmp_path / "n"))) as archive:
        modes = {entry.name: entry.mode for entry in archive}
    assert modes == {"node.key": 0o600, "node.crt": 0o644, "ca.crt": 0o644, "token": 0o600}


def test_an_ended_certificate_is_said_with_what_to_do(tmp_path: Path) -> None:
    make_node(open_authority(tmp_path, NOW), tmp_path / "n", "a", [], NOW)
    check_cert(tmp_path / "n" / "node.crt", NOW)
    with pytest.raises(ConfigError, match="ended on 2027-11-01: raypipe certs make"):
        check_cert(tmp_path / "n" / "node.crt", NOW + datetime.timedelta(days=366))
    with pytest.raises(ConfigError, match="the clock"):
        check_cert(tmp_path / "n" / "node.crt", NOW - datetime.timedelta(days=2))


def test_a_token_that_others_can_read_stops_a_run_before_it_knocks(tmp_path: Path) -> None:
    make_node(open_authority(tmp_path, NOW), tmp_path / "n", "a", [], NOW)
    token_of(tmp_path)
    shown = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_USE_TLS": "1"}
    files = {"RAY_TLS_SERVER_CERT": "n/node.crt", "RAY_TLS_SERVER_KEY": "n/node.key", "RAY_TLS_CA_CERT": "ca.crt"}
    shown |= {name: str(tmp_path / file) for name, file in files.items()}
    assert len(check_own(shown, NOW)) == 4
    (tmp_path / "token").chmod(0o640)
    with pytest.raises(ConfigError) as caught:
        check_own({**shown, "RAY_TLS_CA_CERT": ""}, NOW + datetime.timedelta(days=400))
    assert [line.split(" ")[0] for line in caught.value.problems] == ["token", "certificate", "RAY_USE_TLS"]
    assert check_own({}, NOW) == []


def test_a_cluster_of_another_version_is_said_in_one_line_from_rays_own_words() -> None:
    from ray._private.utils import check_version_info

    from raypipe.placement.actor import why_not

    there = {"ray_version": "2.44.0", "python_version": "3.9.21"}
    with pytest.raises(RuntimeError) as theirs:
        check_version_info(there, "10.0.0.2", raise_on_mismatch=True, python_version_match_level="minor")
    here = f"Ray {importlib.metadata.version('ray')} and Python {platform.python_version()}"
    line = f"the cluster at 10.0.0.1:6379 has Ray 2.44.0 and Python 3.9.21, here is {here}: they have to be alike"
    assert why_not("10.0.0.1:6379", theirs.value) == line
    other = why_not("10.0.0.1:6379", ConnectionError("no\nmore"))
    assert other.startswith("no Ray cluster at 10.0.0.1:6379: no (is it running, and are RAY_AUTH_MODE")


def test_a_check_of_nothing_is_not_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in os.environ if name.startswith(("RAY_AUTH_", "RAY_USE_TLS"))]:
        monkeypatch.delenv(name)
    assert main(["certs", "check"]) == 2
    assert capsys.readouterr().err.startswith("raypipe: the environment names no token and no certificate")


@pytest.mark.parametrize(("mode", "is_open"), [("token", False), ("disabled", True)])
def test_the_doctor_tries_ray_clients_port_too(mode: str, is_open: bool) -> None:
    """It runs code for whoever gets in, and is behind a port of its own: the others' calls say nothing of it."""
    from raypipe.doctor.actor import _takes_calls

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "ab" * 32}
    command = [sys.executable, "-c", RAY_CLIENT, str(port)]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert "up" in server.stdout.readline()
        assert _takes_calls(f"127.0.0.1:{port}", token=True) is is_open
        server.kill()


RAY_CLIENT = """
import sys
from ray.util.client.server.proxier import serve_proxier
held = serve_proxier("127.0.0.1", int(sys.argv[1]), None)
print("up", flush=True)
sys.stdin.read()
"""


def test_a_ca_whose_key_was_replaced_is_refused(tmp_path: Path) -> None:
    open_authority(tmp_path, NOW)
    other = open_authority(tmp_path / "other", NOW)
    (tmp_path / "ca.crt").write_bytes(other.cert.public_bytes(Encoding.PEM))
    with pytest.raises(ConfigError, match=r"ca.crt is not of .*ca.key"):
        open_authority(tmp_path, NOW)
    assert load_cert(tmp_path / "ca.crt") == other.cert


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("root@h: Permission denied (publickey).", "h: it refused the key k: is its public half in"),
        (
            f"Warning: Identity file k not accessible: No such file or directory.\n{REFUSED}",
            "h: the key file k is not th",
        ),
        (
            f"keys are NOT accessible by others.\nLoad key k: bad permissions\n{REFUSED}",
            "h: the key file k can be read",
        ),
        ("ssh: Could not resolve hostname h: Name or service not known", "h: no machine has that name"),
        ("ssh: connect to host h port 22: Connection refused", "h: nothing answers on its ssh port"),
        ("Host key verification failed.", "h: its host key is another than before"),
        ("ssh: connect to host h port 22: Connection timed out", "h: no answer in 10 s"),
        ("something new", "h: ssh failed: something new"),
    ],
)
def test_a_failed_ssh_is_one_line(tmp_path: Path, said: str, line: str) -> None:
    login = Login("root", "k", tmp_path / "known")
    assert explain(login, "h", "true", 255, said, 10.0).startswith(line)


def test_a_key_that_is_not_there_ends_ray_up_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    config = {"ssh_user": "x", "ssh_private_key": str(key := tmp_path / "id")}
    with pytest.raises(click.ClickException, match=f"auth: ssh_private_key: {key} is not there"):
        StoreProvider(config, "c")
    key.touch()
    StoreProvider(config, "c")


def test_a_book_is_read_by_others_as_it_is_written(tmp_path: Path) -> None:
    mine, theirs = Book(tmp_path / "b.json"), Book(tmp_path / "b.json")
    mine.put(node="a-1", host="h", tags={"x": "1"})
    assert theirs.read() == {"a-1": {"host": "h", "tags": {"x": "1"}}}
    theirs.tag("a-1", {"y": "2"})
    theirs.tag("gone", {"y": "2"})
    assert mine.read()["a-1"]["tags"] == {"x": "1", "y": "2"}
    mine.remove("a-1")
    assert theirs.read() == {}


def test_a_node_that_does_not_start_is_told_by_the_coordinator_and_the_doctor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wrong key's own line, not after the quarter of an hour for which Ray tries; and gone when it starts."""
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    provider = StoreProvider({"ssh_user": "x", "head_host": "h"}, "c")
    provider.create_node({"store": "a", "host": "nobody.invalid"}, {"ray-node-type": "worker"}, 1)
    (node,) = provider.non_terminated_nodes({})
    runner = provider.get_command_runner("", node, {"ssh_user": "x"}, "c", subprocess, True)
    for _ in range(2):
        with pytest.raises(SshError):
            runner.run("uptime", timeout=10, run_env="host")
    line = "nobody.invalid: no machine has that name"
    assert troubles() == {"a": line}
    assert caplog.messages == [f"{node} does not start: {line}"], "once"
    assert missing_advice("a", 20, troubles()["a"]) == f"store a: no node offers store:a (for 20 s): {line}"
    (said,) = [one for one in findings([HEAD], ["a"], False, troubles()) if one.level == "WRONG"]
    assert said.line == f"store a: its node does not start: {line}"
    provider.note(node, "")
    assert troubles() == {}


def test_a_closed_store_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler.node_launch_exception import NodeLaunchException

    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    provider = StoreProvider({"ssh_user": "x", "head_host": "h"}, "c")
    worker = {"ray-node-type": "worker", "ray-user-node-type": "a"}
    hour = datetime.datetime.now(datetime.UTC)
    shut = f"{(hour.hour + 2) % 24:02}:00-{(hour.hour + 3) % 24:02}:00"
    with pytest.raises(NodeLaunchException, match="a: trains only"):
        provider.create_node({"store": "a", "host": "h", "hours": shut}, worker, 1)
    assert provider.non_terminated_nodes({}) == []
    provider.create_node({"store": "a", "host": "h"}, worker, 1)
    provider.create_node({"store": "b", "host": "g"}, {**worker, "ray-user-node-type": "b"}, 1)
    (first,) = provider.non_terminated_nodes({"ray-user-node-type": "a"})
    assert provider.internal_ip(first) == "h"
    assert provider.is_running(first)


def test_a_machine_is_woken_by_its_own_command_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAYPIPE_HOME", str(tmp_path))
    rows = [f"a,h,0,,,sleep 0.3; touch {tmp_path}/awake", "b,g,0,,,exit 3"]
    types = stores_config(read_machines(written(tmp_path, *rows, header=f"{HEADER},wake")), SETTINGS)
    provider = StoreProvider({"ssh_user": "x", "head_host": "h"}, "c")
    for store in ("a", "b"):
        tags = {"ray-node-type": "worker", "ray-user-node-type": store}
        provider.create_node(types["available_node_types"][store]["node_config"], tags, 1)
    assert not (tmp_path / "awake").exists()
    assert len(provider.non_terminated_nodes({})) == 2
    until = time.monotonic() + 10
    while not (tmp_path / "awake").exists() or not caplog.messages:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert caplog.messages == ["b: `exit 3` failed with code 3"]


def lives(process: psutil.Process) -> bool:
    """A child of nobody may wait for a while to be reaped."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_stopping_a_node_ends_its_processes_and_their_children_and_no_others(tmp_path: Path) -> None:
    def start(node: str) -> subprocess.Popen[bytes]:
        script = "env -i sleep 60 & exec sleep 60"  # the child has put its environment away
        return subprocess.Popen(["sh", "-c", script], env={"RAY_CLOUD_INSTANCE_ID": node, "PATH": "/usr/bin:/bin"})

    mine, other = start("a.1"), start("aX1")
    try:
        time.sleep(0.3)
        children = psutil.Process(mine.pid).children()
        done = subprocess.Popen(["sh", "-c", STOP.format(node="a.1")])
        assert done.wait(20) == 0, "nor does it wait for one that has ended and is not reaped yet"
        mine.wait(10)
        assert children
        assert not any(lives(child) for child in children)
        assert other.poll() is None
    finally:
        for child in psutil.Process(other.pid).children():
            child.kill()
        for process in (mine, other):
            process.kill()
            process.wait()


FACTS = Facts(
    host="h",
    at=0.0,
    versions={"ray": "2.58.0"},
    code="abc",
    gpus=(),
    free_bytes=50 << 30,
    shm_bytes=8 << 30,
    data=(Data("a", "products", {"train": 3}, "beef"),),
    troubles=(),
    auth="token",
    tls=True,
    cert_days=200.0,
    ports=((6385, "raylet"),),
)
HEAD = Seen("1", "10.0.0.1", True, (), {}, FACTS, http={6385: "metrics"})


def lines(*seen: Seen, level: str = "WRONG", loopback: bool = False) -> list[str]:
    found = findings(seen, ["a"], loopback)
    return [f"{one.who}: {one.line}" for one in found if one.level == level]


def test_a_well_cluster_has_nothing_wrong() -> None:
    assert lines(HEAD, Seen("2", "10.0.0.2", False, ("a",), {"store:a": 1}, FACTS)) == []
    assert lines(HEAD, level="note") == [
        "10.0.0.1: port 6385 (raylet) tells strangers metrics: numbers, no calls",
        "cluster: store a: no node; one starts when it is wanted, if it may",
    ]


def test_the_doctor_says_each_thing_that_is_wrong() -> None:
    ill = replace(
        FACTS,
        versions={"ray": "2.57.0"},
        code="xyz",
        free_bytes=1 << 30,
        shm_bytes=1 << 20,
        troubles=("store a: policy.yaml of the store cannot be read: No such file or directory",),
        auth="disabled",
        tls=False,
    )
    node = Seen("2", "b", False, ("a",), {"GPU": 1}, ill, skew_s=-30, ping_ms=80, down_mbs=0.2, up_mbs=9)
    node = replace(node, unreached=(("10.0.0.1", 6381, "no answer"),), open_ports=(10010,), http={8265: "HTTP 200"})
    assert lines(HEAD, node) == [
        "b: store a: policy.yaml of the store cannot be read: No such file or directory",
        "b: its clock is 30.0 s behind this one: is time kept by NTP there?",
        "b: 1.0 GiB left on its disk; 2 are needed",
        "b: 1 MiB left in /dev/shm, where updates pass",
        "b: it offers 1 GPU and its driver shows 0",
        "b: cannot reach 10.0.0.1 port 6381 (no answer); Ray needs every node to reach every other",
        "b: ray 2.57.0 here, 2.58.0 on the head",
        "b: its raypipe is other code (xyz) than the head's (abc)",
        "b: token authentication is off: RAY_AUTH_MODE=token",
        "b: TLS is off: raypipe certs",
        "b: port 10010 (?) takes calls from strangers",
        "b: port 8265 (?): HTTP 200 for strangers",
    ]
    assert len(lines(HEAD, node, loopback=True)) == 8
    assert lines(node) == [*lines(HEAD, node)[:6], "cluster: its head did not answer", *lines(HEAD, node)[8:]]


def test_a_node_that_leaves_while_it_is_looked_at_is_no_fault_of_the_cluster() -> None:
    unreached = (("10.0.0.2", 6381, "no answer"), ("10.0.0.3", 6381, "no answer"))
    head = replace(HEAD, unreached=unreached)
    idle = Seen("2", "10.0.0.2", False, ("a",), {}, None, trouble="did not answer in 60 s (ActorDiedError)")
    seen = stayed([head, idle, Seen("3", "10.0.0.3", False, (), {}, FACTS)], {"1", "3"})
    assert lines(*seen) == [
        "10.0.0.1: cannot reach 10.0.0.3 port 6381 (no answer); Ray needs every node to reach every other"
    ]
    assert "10.0.0.2: left the cluster while it was looked at" in lines(*seen, level="note")


def test_of_commands_that_start_together_the_first_makes_the_token_for_all(tmp_path: Path) -> None:
    seen = []

    def start(name: str) -> None:
        write_secret(tmp_path / "new" / "token", name.encode(), once=True)
        seen.append(read_secret(tmp_path / "new" / "token", "token"))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(start, map(str, range(64))))
    assert len(set(seen)) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["token"]

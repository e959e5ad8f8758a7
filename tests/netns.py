"""Hosts on one machine: network namespaces with addresses of their own, an sshd in each. Needs root and sshd.

A host has its own process ids, home folder, name and temp-dir of Ray, so that stopping Ray on one touches no other.
It is gone with its sshd, which is the first process of its process id namespace.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("sshd", "ip", "unshare", "ssh-keygen")

INSIDE = """
set -e
mkdir -p {room}/upper {room}/work {room}/tmp /tmp/ray
mount -t overlay overlay -o lowerdir={home},upperdir={room}/upper,workdir={room}/work {home}
mount --bind {room}/tmp /tmp/ray
rm -rf {home}/.raypipe {home}/.ray
hostname {name}
ip link set lo up
mkdir -p /run/sshd
exec {sshd} -D -e -p 22 -f {room}/sshd_config
"""
SSHD = """
HostKey {room}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
PidFile none
"""


def lacking() -> str:
    """Why no hosts can be made here; empty if they can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return "".join(f"needs {tool}" for tool in NEEDS if not shutil.which(tool, path=path))[:40]


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    space: str
    room: Path
    process: subprocess.Popen[bytes]

    @property
    def home(self) -> Path:
        """What its own home folder holds, seen from outside; what it has from this machine's is not in it."""
        return self.room / "upper"

    def cut(self) -> None:
        """Off the net."""
        sh(f"ip link set {self.space} nomaster down")

    def join(self, bridge: str) -> None:
        """Back on it."""
        sh(f"ip link set {self.space} master {bridge} up")

    def run(self, command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """In its network, with this machine's files."""
        return subprocess.run(
            ["ip", "netns", "exec", self.space, "bash", "-c", command],
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )


@dataclass
class Net:
    """All of them; this process is on their bridge too."""

    folder: Path
    bridge: str
    hosts: dict[str, Host]

    @property
    def key(self) -> Path:
        """The private key that opens each."""
        return self.folder / "key"


def sh(command: str) -> None:
    """Raises CalledProcessError."""
    subprocess.run(command.split(), check=True, capture_output=True)


@contextlib.contextmanager
def net(names: Sequence[str], subnet: str = "10.88.0") -> Iterator[Net]:
    """Hosts at subnet.1, .2, ...; this machine at subnet.254."""
    folder = Path(tempfile.mkdtemp(prefix="rpn", dir="/tmp"))
    number = os.getpid() % 10000
    made = Net(folder, f"rpb{number}", {})
    try:
        _key(folder / "key")
        sh(f"ip link add {made.bridge} type bridge")
        sh(f"ip addr add {subnet}.254/24 dev {made.bridge}")
        sh(f"ip link set {made.bridge} up")
        for place, name in enumerate(names, start=1):
            made.hosts[name] = _host(made, name, f"{subnet}.{place}", f"rph{number}x{place}")
        yield made
    finally:
        for host in made.hosts.values():
            _end(host)
        subprocess.run(["ip", "link", "del", made.bridge], capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _host(made: Net, name: str, address: str, space: str) -> Host:
    room = made.folder / name
    room.mkdir()
    _key(room / "host_key")
    sh(f"ip netns add {space}")
    sh(f"ip link add {space} type veth peer name eth0 netns {space}")
    sh(f"ip link set {space} master {made.bridge} up")
    sh(f"ip -n {space} addr add {address}/24 dev eth0")
    sh(f"ip -n {space} link set eth0 up")
    (room / "sshd_config").write_text(SSHD.format(room=room, folder=made.folder))
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin:/sbin")
    home = pwd.getpwuid(os.getuid()).pw_dir  # where ssh puts who comes in, whatever HOME says here
    script = INSIDE.format(room=room, home=home, name=name, sshd=sshd)
    command = ["ip", "netns", "exec", space, "unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"]
    with (room / "sshd.log").open("wb") as log:
        process = subprocess.Popen([*command, "--uts", "bash", "-c", script], stdout=log, stderr=log)
    until = time.monotonic() + 10
    while "Server listening" not in (room / "sshd.log").read_text():
        assert process.poll() is None, (room / "sshd.log").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    return Host(name, address, space, room, process)


def _end(host: Host) -> None:
    """`unshare` passes nothing on, but is followed by its child (--kill-child), and that by all of its host."""
    host.process.send_signal(signal.SIGKILL)
    host.process.wait()
    subprocess.run(["ip", "netns", "del", host.space], capture_output=True)
    subprocess.run(["ip", "link", "del", host.space], capture_output=True)

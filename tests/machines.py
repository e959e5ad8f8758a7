"""Machines for a test: each with a network card and processes of its own, on one switch. Needs Linux and root.

A machine's address and disk outlive its processes: it can be switched off (every process on it killed at once, by the
kernel) and on again. All of it ends with this process, whatever happens to it.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ONLY_WITH_ME = ["setpriv", "--pdeathsig", "KILL", "--"]
INIT = 'mount --bind "$0" "$1" && echo && { sleep infinity & wait; }'  # a machine's first process: it reaps


def possible() -> bool:
    """Whether this user may make namespaces here."""
    command = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _space(process: int) -> str:
    """The process namespace that it is in."""
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except OSError:
        return ""


def _net() -> subprocess.Popen[bytes]:
    """A network of its own, as long as its process lives."""
    holder = subprocess.Popen([*ONLY_WITH_ME, "unshare", "--net", "bash", "-c", "echo; exec sleep infinity"],
                              stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline(), "no network namespace"
    _run("nsenter", "-t", str(holder.pid), "-n", "ip", "link", "set", "lo", "up")
    return holder


@dataclass
class Machine:
    """One computer: `ip` on the switch, off at first. Its own disk is at `mount`, a path that is the same on all."""

    ip: str
    mount: Path
    disk: Path
    port: str  # of the switch
    switch: int
    net: subprocess.Popen[bytes]
    init: int = 0
    _power: subprocess.Popen[bytes] | None = None

    def on(self) -> None:
        into = ["nsenter", "-t", str(self.net.pid), "-n"]
        new = ["unshare", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
        first = ["bash", "-c", INIT, str(self.disk), str(self.mount)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._power = subprocess.Popen([*ONLY_WITH_ME, *into, *new, *first], **pipes)  # type: ignore[call-overload]
        assert self._power.stdout.readline(), "no process namespace"
        self.init = psutil.Process(self._power.pid).children()[0].pid

    def off(self) -> None:
        """Every process on it is killed at once."""
        if self._power is not None:
            os.kill(self.init, 9)
            self._power.wait()
            self._power = None

    def start(self, *command: str, **options: object) -> subprocess.Popen[str]:
        """A program on it; its pid here is that of a go-between, whose only child it is."""
        into = ["nsenter", "-t", str(self.init), "-n", "-p", "-m"]
        return subprocess.Popen([*into, *command], text=True, **options)  # type: ignore[call-overload,no-any-return]

    def processes(self) -> list[psutil.Process]:
        """All that run on it, but the first and its sleep."""
        found, own = [], _space(self.init)
        for process in psutil.process_iter():
            if own and _space(process.pid) == own and process.pid != self.init and process.ppid() != self.init:
                found.append(process)
        return found

    def cable(self, state: str) -> None:
        """`down`: nothing comes through, nobody is told; `up`."""
        _run("nsenter", "-t", str(self.switch), "-n", "ip", "link", "set", self.port, state)


@dataclass
class Room:
    """Machines on one switch: 10.9.0.1, 10.9.0.2, ... Each sees a folder of its own as `folder`/disk."""

    folder: Path

    switch: subprocess.Popen[bytes] = field(default_factory=_net)
    machines: list[Machine] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._in_switch("ip", "link", "add", "switch", "type", "bridge")
        self._in_switch("ip", "link", "set", "switch", "up")

    def machine(self) -> Machine:
        net, number = _net(), len(self.machines) + 1
        port, ip = f"port{number}", f"10.9.0.{number}"
        self._in_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(net.pid))
        self._in_switch("ip", "link", "set", port, "master", "switch", "up")
        for words in (f"addr add {ip}/24 dev eth0", "link set eth0 up", "route add default via 10.9.0.254"):
            _run("nsenter", "-t", str(net.pid), "-n", "ip", *words.split())
        mount, disk = self.folder / "disk", self.folder / port
        for place in (mount, disk):
            place.mkdir(exist_ok=True)
        self.machines.append(Machine(ip, mount, disk, port, self.switch.pid, net))
        return self.machines[-1]

    def close(self) -> None:
        for machine in self.machines:
            machine.off()
        for holder in [self.switch, *(machine.net for machine in self.machines)]:
            holder.kill()
            holder.wait()

    def _in_switch(self, *command: str) -> None:
        _run("nsenter", "-t", str(self.switch.pid), "-n", *command)

"""Machines for a test: each with a network card and processes of its own, on one switch. Needs Linux and root.

A machine's address and disk outlive its processes: it can be switched off (every process on it killed at once, by the
kernel) and on again. All of it ends with this process, whatever happens to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import lines
import psutil
from lines import Line

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
    line: str = "a wire"  # to the switch
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

    def sent(self) -> tuple[int, int]:
        """Bytes and frames so far, whether they arrived or not."""
        command = ["nsenter", "-t", str(self.net.pid), "-n", "cat", "/proc/net/dev"]
        card = next(line for line in subprocess.check_output(command, text=True).splitlines() if "eth0:" in line)
        numbers = card.split(":")[1].split()
        return int(numbers[8]), int(numbers[9])

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
    relays: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._in_switch("ip", "link", "add", "switch", "type", "bridge")
        self._in_switch("ip", "link", "set", "switch", "up")

    def machine(self, line: Line | None = None) -> Machine:
        """Its wire to the switch, or that line: by netem where the kernel has it, else by a relay."""
        net, number = _net(), len(self.machines) + 1
        port, ip = f"port{number}", f"10.9.0.{number}"
        wire = ["ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(net.pid)]
        self._in_switch(*wire)
        how = "a wire"
        if line is not None:
            how = f"{line}, by netem"
            if not self._shaped(line, port, net):
                how = f"{line}, by a relay of frames"
                self._in_switch("ip", "link", "del", port)
                self._relay(line, port, net)
        self._in_switch("ip", "link", "set", port, "master", "switch", "up")
        for words in (f"addr add {ip}/24 dev eth0", "link set eth0 up", "route add default via 10.9.0.254"):
            _run("nsenter", "-t", str(net.pid), "-n", "ip", *words.split())
        mount, disk = self.folder / "disk", self.folder / port
        for place in (mount, disk):
            place.mkdir(exist_ok=True)
        self.machines.append(Machine(ip, mount, disk, port, self.switch.pid, net, how))
        return self.machines[-1]

    def close(self) -> None:
        for machine in self.machines:
            machine.off()
        for holder in [*self.relays, self.switch, *(machine.net for machine in self.machines)]:
            holder.kill()
            holder.wait()

    def _shaped(self, line: Line, port: str, net: subprocess.Popen[bytes]) -> bool:
        """Both ends of a wire, frame by frame: an offloaded segment would be lost whole."""
        for process, device in ((self.switch.pid, port), (net.pid, "eth0")):
            into = ["nsenter", "-t", str(process), "-n"]
            whole = ["ip", "link", "set", device, "gso_max_segs", "1"]
            shape = ["tc", "qdisc", "replace", "dev", device, "root", *line.netem()]
            if any(subprocess.run([*into, *command], capture_output=True).returncode for command in (whole, shape)):
                return False
        return True

    def _relay(self, line: Line, port: str, net: subprocess.Popen[bytes]) -> None:
        ends = [str(self.switch.pid), port, str(net.pid), "eth0"]
        command = [*ONLY_WITH_ME, sys.executable, lines.__file__, lines.words(line), *ends]
        self.relays.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        said = self.relays[-1].stdout
        assert said is not None
        assert said.readline(), "no relay"

    def _in_switch(self, *command: str) -> None:
        _run("nsenter", "-t", str(self.switch.pid), "-n", *command)

"""A line between two networks with a rate, a delay, a loss and a short queue: frames carried by this very program.

For kernels without netem. Each end is a TAP device, which has no offloads: what comes are frames as a wire has them.

    python tests/lines.py {"rate_bit_s": 5e6, ...} PROCESS DEVICE PROCESS DEVICE    # ends in two processes' networks

Says `ready` when both are there, and carries until it is ended; the devices go with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TypeAlias

TUNSETIFF, TAP, PLAIN = 0x400454CA, 0x0002, 0x1000
NEW_NET = 0x40000000
AT_ONCE = 64  # frames that are read before others are written
LONGEST = 1514  # bytes: an Ethernet frame without its checksum

Frame: TypeAlias = bytes


@dataclass(frozen=True, slots=True)
class Line:
    """Each way; 60 ms there and back. `queue_s`: of frames that wait to be sent, what comes then is dropped."""

    rate_bit_s: float = 5e6
    delay_s: float = 0.03
    loss: float = 0.01
    queue_s: float = 0.3
    seed: int = 1

    def netem(self) -> list[str]:
        """The same in words of `tc`; its queue is in packets, and holds those that are under way too."""
        packets = (self.queue_s + self.delay_s) * self.rate_bit_s / 8 / LONGEST
        shape = f"rate {self.rate_bit_s:.0f}bit delay {self.delay_s * 1e3:g}ms loss {self.loss:.3%}"
        return ["netem", *shape.split(), "limit", str(round(packets))]

    def __str__(self) -> str:
        return f"{self.rate_bit_s / 1e6:g} Mbit/s, {self.delay_s * 2e3:g} ms there and back, {self.loss:.1%} lost"


@dataclass
class Way:
    """One direction. Pure: seconds are of any one clock."""

    line: Line
    chance: random.Random
    free_at: float = 0.0  # when the last bit of all that waits has left
    under_way: deque[tuple[float, Frame]] = field(default_factory=deque)  # when each arrives

    def take(self, frame: Frame, now: float) -> None:
        """A frame that came; one that is lost has used the line all the same."""
        if self.free_at - now > self.line.queue_s:
            return
        self.free_at = max(now, self.free_at) + len(frame) * 8 / self.line.rate_bit_s
        if self.chance.random() >= self.line.loss:
            self.under_way.append((self.free_at + self.line.delay_s, frame))

    def there(self, now: float) -> list[Frame]:
        """Those that have arrived since."""
        found = []
        while self.under_way and self.under_way[0][0] <= now:
            found.append(self.under_way.popleft()[1])
        return found

    def next_at(self) -> float:
        """When one arrives."""
        return self.under_way[0][0] if self.under_way else float("inf")


def _tap(process: int, name: str) -> int:
    """A device in the network of a process."""
    with open(f"/proc/{process}/ns/net") as space:
        if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), NEW_NET):
            raise OSError(ctypes.get_errno(), f"no way into the network of process {process}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP | PLAIN))
    return device


def carry(ends: tuple[int, int], line: Line) -> None:
    """For ever."""
    ways = {end: Way(line, random.Random(line.seed + place)) for place, end in enumerate(ends)}
    other = dict(zip(ends, reversed(ends), strict=True))
    while True:
        wait_s = max(0.0, min(way.next_at() for way in ways.values()) - time.monotonic())
        for end in select.select(ends, [], [], min(wait_s, 1.0))[0]:
            with suppress(OSError):  # none left, or its device is down
                for _ in range(AT_ONCE):
                    frame = os.read(end, 65536)
                    assert len(frame) <= LONGEST, "segments that no wire has: an offload is on"
                    ways[end].take(frame, time.monotonic())
        for end, way in ways.items():
            for frame in way.there(time.monotonic()):
                with suppress(OSError):  # its device is down: lost
                    os.write(other[end], frame)


def main() -> None:
    line = Line(**json.loads(sys.argv[1]))
    first, second = ((int(sys.argv[at]), sys.argv[at + 1]) for at in (2, 4))
    with suppress(OSError):  # its clock must hold where others compute
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    ends = _tap(*first), _tap(*second)
    print("ready", flush=True)
    carry(ends, line)


def words(line: Line) -> str:
    """As `main` takes it."""
    return json.dumps(asdict(line))


if __name__ == "__main__":
    main()

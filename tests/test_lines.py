"""The thin line on which other tests rely is as thin, as slow and as leaky as it says."""

from __future__ import annotations

import ctypes
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
from lines import LONGEST, NEW_NET, Line, Way
from machines import Machine, Room, possible

PORT = 5000


def test_frames_leave_one_after_the_other_at_the_rate_and_arrive_after_the_delay() -> None:
    way = Way(Line(rate_bit_s=8e6, delay_s=0.03, loss=0.0), random.Random(1))
    for byte in (b"a", b"b"):
        way.take(byte * 1000, now=10.0)
    assert way.next_at() == pytest.approx(10.031)
    assert way.there(10.0305) == []
    assert way.there(10.0315) == [b"a" * 1000]
    assert way.there(10.0325) == [b"b" * 1000]


def test_what_finds_the_queue_full_is_dropped_and_so_is_its_share_on_the_way() -> None:
    way = Way(Line(rate_bit_s=8 * 2**20, loss=0.0, queue_s=1 / 8), random.Random(1))
    for _ in range(200):
        way.take(bytes(1024), now=0.0)
    assert len(way.there(9.0)) == 129, "a frame is cut by nothing"
    leaky = Way(Line(loss=0.01), random.Random(1))
    for number in range(10_000):
        leaky.take(bytes(100), now=float(number))
    assert 70 <= 10_000 - len(leaky.there(1e9)) <= 130


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Machine]]:
    if not possible():
        pytest.skip("needs root: machines are namespaces")
    room = Room(tmp_path_factory.mktemp("line"))
    try:
        yield room.machine(), room.machine(Line())
    finally:
        room.close()


def made_at(machine: Machine, kind: socket.SocketKind) -> socket.socket:
    """A socket in a machine's network, used from here, so that both ends have one clock."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, Path(f"/proc/{machine.net.pid}/ns/net").open() as there:
        assert not libc.setns(there.fileno(), NEW_NET)
        try:
            return socket.socket(socket.AF_INET, kind)
        finally:
            assert not libc.setns(home.fileno(), NEW_NET)


def flood(sender: Machine, receiver: Machine, *, count: int, size: int, every_s: float) -> list[float]:
    """When each of so many datagrams arrived, where it did."""
    arrived = list[float]()
    with made_at(receiver, socket.SOCK_DGRAM) as into, made_at(sender, socket.SOCK_DGRAM) as out:
        into.bind((receiver.ip, PORT))
        into.settimeout(0.7)

        def take() -> None:
            try:
                while True:
                    into.recv(65536)
                    arrived.append(time.monotonic())
            except TimeoutError:
                pass

        out.sendto(b"who has it", (receiver.ip, PORT))
        into.recv(100)
        taking = threading.Thread(target=take)
        taking.start()
        begin = time.monotonic()
        for number in range(count):
            out.sendto(bytes(size), (receiver.ip, PORT))
            time.sleep(max(0.0, begin + (number + 1) * every_s - time.monotonic()))
        taking.join()
    return arrived


def test_a_line_delays_loses_and_carries_what_it_says(ends: tuple[Machine, Machine]) -> None:
    near, far = ends
    trips = list[float]()
    with made_at(near, socket.SOCK_STREAM) as door:
        door.bind((near.ip, PORT))
        door.listen()
        for _ in range(7):
            with made_at(far, socket.SOCK_STREAM) as caller:
                begin = time.monotonic()
                caller.connect((near.ip, PORT))
                trips.append(time.monotonic() - begin)
    lost = [1000 - len(flood(*pair, count=1000, size=60, every_s=0.001)) for pair in (ends, ends[::-1])]
    arrived = flood(far, near, count=900, size=LONGEST - 42, every_s=0.0012)
    rate = (len(arrived) - 1) * LONGEST * 8 / (arrived[-1] - arrived[0])
    print(f"{far.line}: TCP's first round trip {median(trips) * 1e3:.0f} ms, ", end="")
    print(f"lost of 1000 each way {lost}, {rate / 1e6:.2f} Mbit/s of 10")
    assert min(trips) >= 0.06
    assert median(trips) < 0.2
    assert all(1 <= number <= 30 for number in lost)
    assert 4.2e6 < rate < 5.3e6


def test_over_a_cable_that_is_pulled_nothing_comes(ends: tuple[Machine, Machine]) -> None:
    near, far = ends
    with made_at(near, socket.SOCK_DGRAM) as into, made_at(far, socket.SOCK_DGRAM) as out:
        into.bind((near.ip, PORT + 1))
        into.settimeout(0.5)

        def comes(word: bytes) -> bool:
            for _ in range(5):  # one may be lost
                out.sendto(word, (near.ip, PORT + 1))
            try:
                while into.recv(100) != word:
                    pass
            except TimeoutError:
                return False
            return True

        assert comes(b"before")
        far.cable("down")
        assert not comes(b"meanwhile")
        far.cable("up")
        assert comes(b"after")

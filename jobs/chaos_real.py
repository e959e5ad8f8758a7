"""A real federation while everything is killed: by a seeded schedule, with a supervisor and no person.

What is done, and how often of a hundred, is in PLAN. The next blow falls when the run has moved since the last one, or
has not for a while; a run that does not move at all is a violation, and so are too few kills and a coordinator that
takes too long to give out its next ticket. At the end the separate reader has the last word (chaos_reader.py), beside
what the coordinator's noisy network found (chaos_port.py).
"""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from chaos_place import Place, end
from chaos_reader import read_run

PLAN = {  # of a hundred blows; * is a kill
    "coordinator killed*": 24,
    "store killed*": 24,
    "store frozen*": 10,
    "raylet killed*": 9,
    "raylet frozen": 4,
    "coordinator frozen": 5,
    "command killed*": 4,
    "head killed*": 2,
    "everything killed*": 1,
    "MLflow server killed*": 4,
    "MLflow follower killed*": 5,
    "disk full": 4,
    "clock jumps": 4,
}
QUICK = (
    "store killed*",
    "coordinator killed*",
    "clock jumps",
    "raylet killed*",
    "MLflow follower killed*",
    "store frozen*",
    "disk full",
    "MLflow server killed*",
    "coordinator killed*",
    "head killed*",
    "store killed*",
)
STUCK_S = 300.0  # without a version
PATIENCE_S = 25.0  # after which the next blow falls although the last one is not over
CALM = 40  # versions of the calm run, at most
WAIT_S = 10.0  # from a coordinator's death to the next ticket, at most, where nothing else has struck meanwhile
QUICK_WAIT_S = 30.0  # the same in the quick run, which is for machines of any speed
QUICK_KILLS = 6  # of its nine: on a slow machine its time is up before the last
DISTURBING = ("coordinator", "command", "head", "everything", "disk")  # blows that make that wait longer


def schedule(seed: int, kills: int, *, quick: bool, fills: bool) -> list[str]:
    """What is done, in order; so many of them are kills. The quick one has every kind that is quickly over.

    `fills`: the disk can be filled.
    """
    if quick:
        return [what for what in QUICK if fills or what != "disk full"]
    chance = random.Random(f"plan/{seed}")
    plan: list[str] = []
    while sum(what.endswith("*") for what in plan) < kills:
        plan += chance.choices(list(PLAN), list(PLAN.values()))
    return [what for what in plan if fills or what != "disk full"]


def kills_of(done: Mapping[str, int]) -> int:
    """How many of the blows were kills."""
    return sum(count for what, count in done.items() if what.endswith("*"))


def figures(done: Mapping[str, int], waits: Sequence[float], *, kills: int, wait_s: float) -> list[str]:
    """What a run must have come to, where it did not."""
    found = kills_of(done)
    few = [f"{found} kills; there should be {kills}"] if found < kills else []
    return few + [f"a coordinator took {w:.1f} s to its next ticket; at most {wait_s:.0f}" for w in waits if w > wait_s]


@dataclass
class Wait:
    """For a killed coordinator's next ticket: since when, the newest diary then, whether something else has struck."""

    since: float
    diary: int
    disturbed: bool


class Chaos:
    """One run."""

    def __init__(self, seed: int, place: Place, config: Path) -> None:
        self.chance, self.place, self.config = random.Random(f"blows/{seed}"), place, config
        self.done: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.waits: list[float] = []  # seconds from the coordinator's death to the next ticket
        self.disturbed: list[float] = []  # the same, where something else struck meanwhile
        self._waiting: Wait | None = None

    def go(self, plan: list[str], until_s: float) -> str:
        """Deal out the blows; then wait for a few versions more. What is wrong, in one line, or nothing."""
        moved, newest, struck = time.monotonic(), -1, time.monotonic()
        pause, left, after = 2.0, list(plan), 0
        while left or after < 3:
            time.sleep(0.1)
            now = time.monotonic()
            self.place.mend(self.config)
            self._due(now)
            self._watch_diary(now)
            if (version := self.newest()) > newest:
                after += not left
                moved, newest = now, version
            if now - moved > STUCK_S:
                return f"stuck at version {newest} for {STUCK_S:.0f} s after {dict(self.done)}"
            if now > until_s and left:
                print(f"  time is up: {len(left)} blows were not dealt out")
                left = []
            ready = newest >= 1 and (moved > struck or now - struck > PATIENCE_S)
            if left and ready and now - struck > pause:
                what = left.pop(0)
                print(f"  {time.strftime('%H:%M:%S')} version {newest}: {what}", flush=True)
                hit = self.blow(what, time.monotonic())
                (self.done if hit else self.missed)[what] += 1
                left += [] if hit else [what]  # once more, at the end
                struck, pause = time.monotonic(), self.chance.uniform(0.2, 2.5)
        return ""

    def blow(self, what: str, now: float) -> bool:
        """False where the victim is not there just now; a coordinator that was hit is waited for from now on."""
        diary, busy = self._diary(), bool(self.later)
        if not self.strike(what):
            return False
        if self._waiting is not None:
            self._waiting.disturbed |= what.startswith(DISTURBING)
        elif what == "coordinator killed*":
            self._waiting = Wait(now, diary, disturbed=busy)
        return True

    def strike(self, what: str) -> bool:
        """False where the victim is not there just now."""
        place, store = self.place, self.chance.choice(self.place.names)
        match what:
            case "coordinator killed*":
                return self._signal(place.workers("Coordinator", place.raylet()), signal.SIGKILL)
            case "coordinator frozen":
                return self._freeze(place.workers("Coordinator", place.raylet()), self.chance.uniform(1, 4))
            case "store killed*":
                return self._signal(place.workers("SiteActor", place.raylet(store)), signal.SIGKILL)
            case "store frozen*":  # for good: it is found and ended
                return self._signal(place.workers("SiteActor", place.raylet(store)), signal.SIGSTOP)
            case "raylet killed*":
                return self._signal([place.raylet(store)], signal.SIGKILL)
            case "raylet frozen":
                return self._freeze([place.raylet(store)], self.chance.uniform(3, 8))
            case "command killed*":
                assert place.command is not None
                return self._signal([_process(place.command.pid)], signal.SIGKILL)
            case "MLflow follower killed*":
                return self._signal(place.workers("Following", place.raylet()), signal.SIGKILL)
            case "MLflow server killed*":
                own = _process(place.server.pid) if place.server is not None else None
                return self._signal([*(own.children(recursive=True) if own else []), own], signal.SIGKILL)
            case "head killed*" | "everything killed*":
                return self._head(everything=what.startswith("everything"))
            case "disk full":
                return self._fill(self.chance.uniform(2, 5))
            case "clock jumps":
                (place.folder / "jump").write_text(str(self.chance.choice([-86400, -3600, 3600, 86400 * 30])))
                return True
        raise ValueError(what)

    def newest(self) -> int:
        """The newest version, by the record; -1 before there is one."""
        for file in sorted((self.place.home / "runs").glob(f"{self.config.stem}-*/journal.sqlite"))[-1:]:
            try:
                with sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=5) as db:
                    query = "select body from record where kind = 'version_published' order by seq desc limit 1"
                    rows = db.execute(query).fetchall()
                return int(json.loads(rows[0][0])["version"]) if rows else -1
            except sqlite3.Error:
                return -1
        return -1

    # -- blows ------------------------------------------------------------------------------------------------------

    def _signal(self, victims: Sequence[psutil.Process | None], number: int) -> bool:
        hit = False
        for victim in victims:
            try:
                if victim is not None:
                    victim.send_signal(number)
                    hit = True
            except psutil.Error:
                continue
        return hit

    def _freeze(self, victims: Sequence[psutil.Process | None], seconds: float) -> bool:
        self.later.append((time.monotonic() + seconds, lambda: self._thaw(victims)))
        return self._signal(victims, signal.SIGSTOP)

    def _thaw(self, victims: Sequence[psutil.Process | None]) -> None:
        self._signal(victims, signal.SIGCONT)

    def _head(self, *, everything: bool) -> bool:
        """The head's machine goes down, and the command with it; then all of the cluster is started anew."""
        place = self.place
        if place.command is not None:
            self._signal([_process(place.command.pid)], signal.SIGKILL)
        if everything and place.server is not None and (own := _process(place.server.pid)) is not None:
            end([*own.children(recursive=True), own])
        place.stop_cluster()
        place.start_cluster()
        return True

    def _fill(self, seconds: float) -> bool:
        file = self.place.home / "rubbish"
        try:
            with file.open("wb", buffering=0) as rubbish:
                while rubbish.write(bytes(1 << 16)):
                    pass
        except OSError:
            pass
        self.later.append((time.monotonic() + seconds, lambda: file.unlink(missing_ok=True)))
        return True

    def _due(self, now: float) -> None:
        for item in [item for item in self.later if item[0] <= now]:
            self.later.remove(item)
            item[1]()

    # -- how long it takes --------------------------------------------------------------------------------------------

    def _diary(self) -> int:
        """The number of its newest file; old ones are removed."""
        files = (self.place.home / "runs").glob(f"{self.config.stem}-*/diary/*.jsonl")
        return max((int(file.stem) for file in files), default=0)

    def _watch_diary(self, now: float) -> None:
        """A coordinator that is back begins a file of its diary; its first ticket is a line in it."""
        if self._waiting is None or self._diary() <= self._waiting.diary:
            return
        newest = max((self.place.home / "runs").glob(f"{self.config.stem}-*/diary/*.jsonl"))
        if b'"do":"Train"' in newest.read_bytes():
            self.waited(now)

    def waited(self, now: float) -> None:
        """The next ticket is there, or the end is."""
        if self._waiting is not None:
            (self.disturbed if self._waiting.disturbed else self.waits).append(now - self._waiting.since)
            self._waiting = None


def _process(number: int) -> psutil.Process | None:
    try:
        return psutil.Process(number)
    except psutil.Error:
        return None


def report(seed: int, *, kills: int, quick: bool) -> bool:
    """The whole of it; whether all is well."""
    began = time.monotonic()
    place = Place(3 if quick else 5, seed)
    plan = schedule(seed, kills, quick=quick, fills=place.quota)
    if not place.quota:
        print("skipped: disk full (a small file system can be made by root only)")
    faults: list[str] = []
    try:
        faults = _play(seed, plan, place, kills=QUICK_KILLS if quick else kills, quick=quick)
    finally:
        place.close(keep=bool(faults))
        if faults:
            print(f"what it left behind is in {place.folder}")
    for fault in faults:
        print(f"VIOLATION {fault}")
    print(f"seed {seed}: {len(faults)} violations in {time.monotonic() - began:.0f} s")
    return not faults


def _play(seed: int, plan: list[str], place: Place, *, kills: int, quick: bool) -> list[str]:
    place.make_data()
    place.start_server()
    place.start_cluster()
    pace = "paced" if quick or seed % 2 == 0 else "fedbuff"
    config = place.write_config("chaos", pace=pace, versions=100_000)
    chaos = Chaos(seed, place, config)
    trouble = chaos.go(plan, time.monotonic() + (150 if quick else 2600))
    chaos.waited(time.monotonic())
    for _, undo in chaos.later:
        undo()
    faults = [trouble] if trouble else _end(place)
    faults += figures(chaos.done, chaos.waits, kills=kills, wait_s=QUICK_WAIT_S if quick else WAIT_S)
    _say(chaos, place)
    folder = place.home / "runs" / place.run
    if not trouble:
        place.dead_since.pop("command", None)  # it has ended as it should
        until = time.monotonic() + STUCK_S
        while not place.mend(None) and time.monotonic() < until:  # what the last blow struck
            time.sleep(0.1)
        calm = place.write_config("calm", pace=pace, versions=min(CALM, max(4, chaos.newest() // 2)))
        code, said = place.raypipe("train", str(calm), "--insecure", "--address", place.cluster.address)
        calms = sorted((place.home / "runs").glob("calm-*"))
        faults += [] if code == 0 else [f"the calm run failed: {said.splitlines()[-1:]}"]
        code, said = place.raypipe("track", place.run)
        faults += [] if code == 0 else [f"MLflow could not follow: {said.splitlines()[-1:]}"]
        faults += read_run(folder, stores_home=place.stores, tracked=place.tracked, calm=calms[-1] if calms else None)
    wrong = place.folder / "violations"
    return faults + (wrong.read_text().splitlines() if wrong.is_file() else [])


def _end(place: Place) -> list[str]:
    """Ask for the end, by command; it may have to be asked for again."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        code, _ = place.raypipe("stop", place.run, "--address", place.cluster.address)
        assert place.command is not None
        waited = time.monotonic()
        while code == 0 and place.command.poll() is None and time.monotonic() < waited + 90:
            time.sleep(0.2)
        if place.command.poll() == 0:
            return []
        place.mend(place.folder / "chaos.yaml")
        time.sleep(1)
    return ["it could not be ended"]


def _say(chaos: Chaos, place: Place) -> None:
    kills = kills_of(chaos.done)
    print(f"{sum(chaos.done.values())} blows, {kills} kills, {chaos.newest()} versions, {place.started} commands:")
    for what, count in sorted(chaos.done.items()):
        print(f"  {count:4} {what}")
    if chaos.missed:
        print(f"  no victim just then: {dict(chaos.missed)}")
    noise: Counter[str] = Counter()
    for file in place.folder.glob("noise-*"):
        for line in file.read_text().splitlines():
            count_, _, what = line.partition(" ")
            noise[what] += int(count_)
    print(f"  messages: {dict(noise)}")
    if chaos.waits:
        longest = max(chaos.waits)
        print(f"  coordinator killed to next ticket: median {median(chaos.waits):.1f} s, longest {longest:.1f} s")
    if chaos.disturbed:
        times, longest = len(chaos.disturbed), max(chaos.disturbed)
        print(f"  the same where more struck meanwhile, {times} times: longest {longest:.1f} s")

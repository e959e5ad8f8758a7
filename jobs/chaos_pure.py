"""Random histories of the machine, the diary, the journal and the way back, with a death at every write position.

Two halves of each block of histories. A *sweep* takes one federation, runs it calmly, and then once for each of its
writes, dying there: after the write, in it, or with the machine's power. *Others* each have a federation of their
own and die at up to six writes, some not at all. Seeds are all there is: the same seed gives the same history.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from chaos_disk import DEATHS, Death, Disk
from chaos_pairs import Seen, table
from chaos_reader import read_journal
from chaos_world import CENTRAL, World

from raypipe.coordinator.policy import Policy
from raypipe.coordinator.staleness import constant, hinge, polynomial

LIMIT = 30_000  # events of one history
JOIN_S = 50.0  # longer than any store of a random history stays away
BLOCK = 100  # histories of one task of the pool, about


@dataclass(frozen=True)
class History:
    """What is to happen: all of it follows from this."""

    seed: int
    deaths: dict[int, Death] = field(default_factory=dict)


@dataclass
class Outcome:
    """Of some histories; adds up."""

    histories: int = 0
    writes: int = 0
    swept: int = 0  # federations that died at each of their writes
    deaths: Counter[tuple[str, Death]] = field(default_factory=Counter)
    seen: Seen = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        self.histories += other.histories
        self.writes += other.writes
        self.swept += other.swept
        self.deaths += other.deaths
        self.seen += other.seen
        self.violations += other.violations


def random_policy(chance: random.Random) -> Policy:
    """Any settings that the machine accepts; every pace is among them, and much else."""

    def maybe(value: Any) -> Any:
        return value if chance.random() < 0.5 else None

    said: dict[str, Any] = {
        "refill": chance.choice(["on_publish", "on_arrival"]),
        "cohort": maybe(chance.randint(1, 6)),
        "buffer_size": maybe(chance.randint(1, 7)),
        "tick": chance.random() < 0.4,
        "concurrency": maybe(chance.randint(1, 6)),
        "max_active_stores": chance.randint(1, 4) if chance.random() < 0.3 else None,
        "turn": chance.randint(1, 3),
        "cool_down_s": chance.choice([0.0, 3.0, 30.0]),
        "budget_s": maybe(chance.uniform(0.2, 5)),
        "deadline_s": maybe(chance.uniform(0.5, 8)),
        "hung_s": chance.uniform(1, 20),
        "quorum": chance.randint(1, 2),
        "join_s": chance.uniform(1, 100),
        "weigh": chance.choice(["examples", "steps", "equal"]),
        "normalise": chance.choice(["sum", "k"]),
        "in_order": chance.random() < 0.4,
        "settle_first": chance.random() < 0.2,
        "stale_limit": chance.uniform(0.5, 10),
        "stale_action": chance.choice(["floor", "drop"]),
        "floor_weight": chance.uniform(0.01, 1),
        "max_failures": chance.randint(1, 4),
        "backoff_s": chance.uniform(0.1, 5),
        "max_versions": chance.randint(1, 10) if chance.random() < 0.9 else None,
        "max_seconds": maybe(chance.uniform(5, 500)),
        "target": maybe(chance.uniform(0.9, 1.0)),
        "lower_is_better": chance.random() < 0.4,
        "patience": maybe(chance.randint(2, 8)),
        "evaluate_every": chance.randint(1, 3),
        "central": CENTRAL if chance.random() < 0.15 else None,
        "weigh_staleness": chance.choice([constant(), polynomial(exponent=0.5), hinge(a=2.0, b=1)]),
    }
    if said["refill"] == "on_arrival":
        said |= {"buffer_size": said["buffer_size"] or 1, "in_order": False, "tick": False}
    if said["max_active_stores"] is not None:
        said["quorum"] = min(said["quorum"], said["max_active_stores"])
    if said["budget_s"] is not None and said["deadline_s"] is not None:
        said["deadline_s"] += said["budget_s"]
    if said["max_versions"] is None:  # it has to end; and each of its writes is a place to die at
        said["max_seconds"] = chance.uniform(2, 10)
    if said["lower_is_better"] and said["target"] is not None:
        said["target"] = 1 - said["target"]
    return Policy(**said)


def play(history: History, folder: Path) -> Outcome:
    """One history in a folder of its own; a violation is said with what it takes to see it again."""
    chance = random.Random(f"chaos/{history.seed}")
    policy, stores = random_policy(chance), chance.randint(2, 7)
    healthy = chance.randint(1, 3)
    if policy.in_order and chance.random() < 0.9:  # many come before their turn
        policy, stores = replace(policy, cohort=None, buffer_size=None, concurrency=None), chance.randint(7, 9)
    reaches = chance.random() < 0.6 and policy.max_versions is not None
    if reaches:  # nothing but its versions ends it: then it must reach them; all who come do so within JOIN_S
        join_s = max(JOIN_S, policy.join_s)
        policy = replace(policy, quorum=1, join_s=join_s, max_seconds=None, target=None, patience=None)
    stop_at = chance.uniform(0, 40) if not reaches and chance.random() < 0.3 else math.inf
    seen: Seen = Counter()
    disk = Disk(folder, history.deaths, random.Random(f"deaths/{history.seed}"))
    outcome = Outcome(histories=1, seen=seen)
    try:
        world = World(policy, stores, history.seed, max(policy.quorum, healthy), disk, seen, stop_at)
        end = world.run(LIMIT)
        assert not reaches or end.version == policy.max_versions, f"it ended: {end.ending}"
        assert not (faults := read_journal(folder)), faults[0]
    except Exception as error:  # noqa: BLE001  whatever it is, it is a violation
        line = traceback.extract_tb(error.__traceback__)[-1]
        what = f"{type(error).__name__} in {line.name}: {str(error).splitlines()[0] if str(error) else ''}"
        outcome.violations.append(f"seed {history.seed}, deaths {history.deaths}: {what}")
    finally:
        disk.close()
    outcome.writes, outcome.deaths = disk.writes, disk.died
    return outcome


def block(seed: int, size: int, stop: bool) -> Outcome:
    """About `size` histories: a sweep of one federation, and as many others. In a process of the pool."""
    total, room = Outcome(), Path("/dev/shm")
    top = Path(tempfile.mkdtemp(prefix="rpc", dir=room if room.is_dir() else None))
    try:
        calm = _played(History(seed), top, total)
        for position in range(1, calm.writes + 1):
            _played(History(seed, {position: DEATHS[(position + seed) % len(DEATHS)]}), top, total)
            if stop and total.violations:
                return total
        total.swept += 1
        chance = random.Random(f"others/{seed}")
        number = seed * 1_000_003
        while total.histories < size:
            number += 1
            deaths = {chance.randint(1, 120): chance.choice(DEATHS) for _ in range(chance.randint(0, 6))}
            _played(History(number, deaths), top, total)
            if stop and total.violations:
                return total
    finally:
        shutil.rmtree(top, ignore_errors=True)
    return total


def _played(history: History, top: Path, total: Outcome) -> Outcome:
    folder = top / "run"
    folder.mkdir()
    outcome = play(history, folder)
    shutil.rmtree(folder)
    total.add(outcome)
    return outcome


def blocks(seed: int, histories: int, workers: int, *, stop: bool = False) -> tuple[Outcome, int]:
    """At least so many histories, from this seed on; with the number of blocks. `stop`: at the first violation."""
    total, size, done = Outcome(), 2 * BLOCK, 0
    if workers == 1:
        while total.histories < histories and not (stop and total.violations):
            total.add(block(seed + done, min(size, histories), stop))
            done += 1
        return total, done
    with ProcessPoolExecutor(workers) as pool:
        waiting = {pool.submit(block, seed + n, size, stop) for n in range(2 * workers)}
        submitted = len(waiting)
        while waiting:
            future = next(as_completed(waiting))
            waiting.remove(future)
            total.add(future.result())
            done += 1
            if total.histories < histories and not (stop and total.violations):
                waiting.add(pool.submit(block, seed + submitted, size, stop))
                submitted += 1
    return total, done


def report(seed: int, histories: int, workers: int) -> bool:
    """Run and print; whether all is well."""
    began = time.monotonic()
    total, done = blocks(seed, histories, workers)
    seconds = time.monotonic() - began
    print(f"{total.histories} histories of seeds {seed} to {seed + done - 1} on {workers} cores in {seconds:.0f} s:")
    print(f"  {total.writes} writes; {total.swept} federations died at every one of their writes")
    for (what, death), count in sorted(total.deaths.items()):
        print(f"  {count:6} deaths at: {what}, {death}")
    complete = table(total.seen)
    for violation in total.violations[:20]:
        print(f"VIOLATION {violation}")
    print(f"{len(total.violations)} violations in {total.histories} histories")
    return not total.violations and complete

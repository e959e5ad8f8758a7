"""What the machine remembers of stores and tickets. Facts only; whatever can be derived is derived."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum

from raypipe.coordinator.actions import Contribution, Publish, Train
from raypipe.tasks.class_list import Change
from raypipe.tasks.metrics import derived

KEPT = 16  # versions for which each store's own word is remembered


class Phase(IntEnum):
    """A ticket's way; it leaves the machine when it is settled or failed."""

    WAITING = 0  # the coordinator was away: its store is awaited, and asked for it again
    TRAINING = 1
    TRAINED = 2  # its update waits at the store for its turn
    COLLECTING = 3
    ARRIVED = 4  # can be folded
    FOLDING = 5
    FOLDED = 6  # in the open sum
    PUBLISHED = 7  # in a version whose weights are not on the disk yet


@dataclass(slots=True)
class Ticket:
    """One request to train. Times are seconds of the shell's clock."""

    id: str
    store: str
    base: int
    asked: Train
    issued_at: float
    due_at: float  # after this it holds no slot and nobody waits for it; its work still counts
    hung_at: float  # after this its store is restarted
    phase: Phase = Phase.TRAINING
    steps: int = 0
    examples: int = 0
    num_train: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    after: str = ""
    data_hash: str = ""
    num_bytes: int = 0
    worth: float = 0.0  # its weight were it not stale
    weight: float = 0.0
    staleness: int = 0
    place: int = 0  # in the order of folding
    digest: str | None = None
    signature: str | None = None
    arrived: bool = False
    trained_at: float = 0.0
    idle_s: float = 0.0  # of its time its store was paused, or waited for the turn of its update
    again: bool = False  # asked for a second time, of a store that may have had it ready: its time tells nothing


@dataclass(slots=True)
class Member:
    """A store as the coordinator knows it."""

    id: str
    num_train: int = 0
    present: bool = False
    aside: str = ""  # why it is set aside; empty when it is not
    failures: int = 0  # in a row
    retry_at: float = -math.inf
    warm: bool = False  # it has handed over since it joined
    restarting: bool = False  # we ended its process ourselves
    stuck: bool = False  # its ticket was past its due time when the end began
    returning: float = -math.inf  # until then it is expected back: it was there when the coordinator died
    issued: int = 0
    skipped: int = 0  # images that it cannot read and leaves out, as was said last
    handed_over: tuple[int, int] = (-1, 0)  # base version, the next number of its updates
    last_issued_at: float = -1.0
    speed: float | None = None  # steps a second, the newest ticket's
    overhead_s: float = 0.0  # from issue to arrival, less training: the link and the queue
    last_s: float | None = None  # the newest ticket, from issue to arrival
    closed_until: float = -math.inf  # by its own policy; nobody's fault
    paused_at: float | None = None  # since when its training stands still, for its owner
    max_upload_bytes_s: float | None = None
    asked: bool = True  # it has an actor, or one is being made; this and the next five: see rotation.py
    asked_at: float = -math.inf  # or left
    coming_until: float = -math.inf  # till then a version waits for it, as it was just asked for
    released_at: float = -math.inf
    turns: int = 0  # updates handed over since it was asked for
    missed: bool = False  # it was asked for and did not come

    def available(self, at: float) -> bool:
        """May be given work now, if it holds no ticket in training."""
        return self.present and not self.aside and max(self.retry_at, self.closed_until) <= at

    def counts(self, at: float) -> bool:
        """Is there, or is expected back, and not closed."""
        coming = max(self.returning, self.coming_until) > at
        return (self.present or coming) and not self.aside and self.closed_until <= at


@dataclass(slots=True)
class Scores:
    """How versions are judged: each store judges the bases that it trains on, and its newest word stands.

    A version's score is that of all validation images together, from each store's newest judgement at that version
    or before: judgements are means, which add up, and metrics are derived last. So a slow store that skips versions
    still counts, and scores of neighbouring versions are comparable although not every store judged each.
    """

    metric: str
    lower_is_better: bool = False
    central: str | None = None  # where there is a central validation set, its word alone counts
    judged: dict[int, dict[str, tuple[dict[str, float], int]]] = field(default_factory=dict)
    earlier: dict[str, tuple[int, dict[str, float], int]] = field(default_factory=dict)  # newest words before those
    best: tuple[int, float] | None = None
    scored: dict[int, float] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    since_best: int = 0  # versions scored that are newer than the best
    since: int = 0  # versions before it had other classes: their scores are no match for the newer ones
    lists: list[int] = field(default_factory=list)  # what it was before, in turn

    def add(self, version: int, store: str, metrics: dict[str, float], num_examples: int) -> None:
        """A store's word on a version."""
        self.judged.setdefault(version, {})[store] = (metrics, num_examples)

    def close(self, version: int) -> dict[str, float] | None:
        """The version's metrics over all stores' images, once; None when no store has judged anything yet."""
        first = self.since if version >= self.since else 0
        rows = {s: (m, n) for s, (v, m, n) in self.earlier.items() if first <= v <= version}
        for at in sorted(v for v in self.judged if first <= v <= version):
            rows |= self.judged[at]
        if self.central is not None:
            rows = {s: row for s, row in rows.items() if s == self.central}
        total = sum(n for _, n in rows.values())
        if not total or version in self.closed:
            return None
        self.closed.add(version)
        names = sorted({name for metrics, _ in rows.values() for name in metrics})
        mean = derived({name: sum(m.get(name, 0.0) * n for m, n in rows.values()) / total for name in names})
        if self.metric in mean:
            self.scored[version] = mean[self.metric]
            over = self.best is not None and self.best[0] < self.since <= version
            late = self.best is not None and version < self.since <= self.best[0]
            if self.best is None or over or (not late and self._better(mean[self.metric], self.best[1])):
                self.best = (version, mean[self.metric])
                self.since_best = sum(v > version for v in self.scored)
            elif version > self.best[0]:
                self.since_best += 1
        for old in sorted(v for v in self.judged if v in self.closed and v < version - KEPT):
            words = {s: (old, m, n) for s, (m, n) in self.judged.pop(old).items()}
            self.earlier |= {s: word for s, word in words.items() if s not in self.earlier or self.earlier[s][0] < old}
        return mean

    def begin_anew(self, version: int) -> None:
        """From this version on there are other classes."""
        self.lists.append(self.since)
        self.since = version

    def withdraw(self, version: int) -> None:
        """Forget what was said of a version that is no more."""
        self.judged.pop(version, None)
        self.scored.pop(version, None)
        self.closed.discard(version)
        if version == self.since and self.lists:
            self.since = self.lists.pop()
        if self.best is not None and self.best[0] == version:
            pick = min if self.lower_is_better else max
            there = [v for v in self.scored if v >= self.since] or list(self.scored)
            at = pick(there, key=self.scored.__getitem__) if there else None
            self.best = None if at is None else (at, self.scored[at])

    def _better(self, one: float, other: float) -> bool:
        return one < other if self.lower_is_better else one > other

    def reached(self, target: float) -> bool:
        """Whether any version's score, of the newest class list, is at least as good as the target."""
        return self.best is not None and self.best[0] >= self.since and not self._better(target, self.best[1])

    def stale_for(self, patience: int) -> bool:
        """Whether the newest `patience` scored versions brought no better one."""
        return self.best is not None and self.since_best >= patience


@dataclass(slots=True)
class Memory:
    """All that the machine remembers: what a checkpoint holds."""

    members: dict[str, Member]
    tickets: dict[str, Ticket]
    scores: Scores
    version: int
    epoch: int
    publishing: Publish | None
    unkept: dict[int, tuple[Contribution, ...]]
    picked: int | None
    cohort: list[str]
    created_at: float
    started_at: float | None
    ending: tuple[str, float] | None
    awaited: set[str] | None
    finished: bool
    issued: int
    places: int
    central_busy: bool
    closing_s: float
    empty_since: float | None
    now: float
    told: int = 0  # records so far
    changes: dict[int, Change] = field(default_factory=dict)  # of the class list, planned or made, by version

"""What a person wants to see of a run, derived from the record alone: a row a store, and the newest version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

LINES = 500  # more is in the record


@dataclass(slots=True)
class Row:
    """One store so far."""

    store: str
    state: str = "waiting"  # waiting | training | paused | ready | closed | gone | released | set aside
    images: int = 0
    data_bytes: int = 0
    updates: int = 0
    steps: int = 0
    seconds: float = 0.0
    weight: float = 0.0  # of its updates, each as a share of its version
    staleness: int = 0  # summed
    accuracy: float | None = None
    base: int = 0
    skipped: int = 0  # images that cannot be read, when it was said last: a line once they are twice as many
    reason: str = ""

    @property
    def speed(self) -> float:
        """Steps a second while training."""
        return self.steps / self.seconds if self.seconds else 0.0

    @property
    def mean_staleness(self) -> float:
        return self.staleness / self.updates if self.updates else 0.0


@dataclass(slots=True)
class Board:
    """Follows records as they are written."""

    metric: str
    rows: dict[str, Row] = field(default_factory=dict)
    version: int = 0
    score: float | None = None
    best: tuple[int, float] | None = None
    elapsed_s: float = 0.0
    bytes_total: int = 0
    bytes_up: int = 0
    updates: int = 0
    lines: list[str] = field(default_factory=list)  # what happened, one line each

    def add(self, kind: str, body: Mapping[str, Any]) -> None:
        """Take one record in."""
        row = self.rows.setdefault(body["store"], Row(body["store"])) if "store" in body else None
        if row is not None:
            self._store(kind, body, row)
            del self.lines[LINES:]
        elif kind == "version_published":
            self._version(body)
        elif kind == "evaluated":
            self._evaluated(body)
        elif kind == "classes_planned":
            self.lines.append(f"classes from version {body['version']} on: {body['change']}")
        elif kind == "classes_refused":
            self.lines.append(f"the classes stay as they are: {body['reason']}")
        elif kind == "version_withdrawn":
            self.lines.append(f"version {body['version']} is withdrawn and will be made again: {body['reason']}")

    def training(self, store: str, version: int) -> None:
        """A ticket was given out."""
        row = self.rows[store]
        row.state, row.base = "training", version

    def ready(self, store: str) -> None:
        """A ticket ended."""
        if store in self.rows and self.rows[store].state in ("training", "paused"):
            self.rows[store].state = "ready"

    def _store(self, kind: str, body: Mapping[str, Any], row: Row) -> None:
        reason = str(body.get("reason", ""))
        match kind:
            case "store_joined":
                row.state, row.images, row.reason = "ready", int(body["counts"].get("train", 0)), ""
                row.data_bytes = int(body.get("data_bytes", 0))
            case "store_left":
                row.state, row.reason = "gone", reason
                self.lines.append(f"{row.store} left: {reason}")
            case "store_asked":
                row.state, row.reason = "waiting", ""
            case "store_released":
                if row.state != "closed":  # then its reason says more
                    row.state, row.reason = "released", reason
            case "store_missing":
                row.state, row.reason = "waiting", reason
                self.lines.append(reason)
            case "store_set_aside":
                row.state, row.reason = "set aside", reason
                self.lines.append(f"{row.store} is set aside: {reason}")
            case "store_closed" | "store_paused":
                row.state, row.reason = kind.removeprefix("store_"), reason
                self.lines.append(f"{row.store} {'is closed' if kind == 'store_closed' else 'pauses'}: {reason}")
            case "store_went_on":
                if row.state == "paused":
                    row.state = "training"
                row.reason = ""
                self.lines.append(f"{row.store} goes on after {body['seconds']:.0f} s")
            case "ticket_failed" | "update_rejected":
                row.reason = reason
                what = "failed" if kind == "ticket_failed" else "has an update that is not used"
                self.lines.append(f"{row.store} {what}: {reason}")
            case "images_skipped":
                if body["skipped"] >= 2 * row.skipped:
                    row.skipped = body["skipped"]
                    self.lines.append(f"{row.store}: {row.skipped} of {body['of']} images cannot be read, left out")
            case _:
                pass

    def _version(self, body: Mapping[str, Any]) -> None:
        self.version, self.elapsed_s = body["version"], body["elapsed_s"]
        self.bytes_total = body["bytes_total"]
        self.bytes_up += body["bytes_up"]
        if body.get("classes"):
            names, gone = body["classes"]["task"]["classes"], body["classes"]["task"]["gone"]
            self.lines.append(f"version {self.version} has another class list: {len(names) - len(gone)} classes")
        if measured := body.get("recalibrated"):
            what = "the running average" if measured["of"] is None else f"version {measured['of']}"
            anew = f" with its statistics measured anew by {len(measured['stores'])} stores together"
            self.lines.append(f"version {self.version} is {what}{anew if measured['stores'] else ''}")
        for part in body["contributions"]:
            row = self.rows[part["store"]]
            row.updates += 1
            row.steps += part["steps"]
            row.seconds += part["seconds"]
            row.weight += part["share"]
            row.staleness += part["staleness"]
            self.updates += 1

    def _evaluated(self, body: Mapping[str, Any]) -> None:
        self.score = body["metrics"].get(self.metric)
        for store, scores in body["stores"].items():
            if store in self.rows:
                self.rows[store].accuracy = scores.get(self.metric)
        if body["best"] and self.score is not None:
            self.best = (body["version"], self.score)

    def share(self, store: str) -> float:
        """The store's part of all that was folded, in [0, 1]."""
        total = sum(row.weight for row in list(self.rows.values()))
        return self.rows[store].weight / total if total else 0.0

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain data, for another process to show."""
        rows = [
            {**asdict(row), "speed": row.speed, "mean_staleness": row.mean_staleness, "share": self.share(row.store)}
            for row in sorted(self.rows.values(), key=lambda r: r.store)
        ]
        return {
            "version": self.version,
            "metric": self.metric,
            "score": self.score,
            "best": self.best,
            "elapsed_s": self.elapsed_s,
            "bytes_total": self.bytes_total,
            "bytes_up": self.bytes_up,
            "updates": self.updates,
            "rows": rows,
            "lines": list(self.lines),
        }

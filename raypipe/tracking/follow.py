"""Bring a run's journal into MLflow, and never stand in the run's way.

The follower reads records after its cursor, does what each stands for, then moves the cursor. Whatever fails, it
starts again from the cursor, so each step is safe to repeat (mlflow_sink.py). The cursor is valid only for the
MLflow run it was written with: with another server, or after the run was deleted there, all is told again.
"""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import IO

from raypipe.errors import ConfigError, RunError
from raypipe.tasks.class_list import ClassList
from raypipe.tracking.journal import FILE, Journal, Record
from raypipe.tracking.lineage import (
    COLUMNS,
    History,
    evaluation_metrics,
    flat_params,
    lineage_params,
    lineage_rows,
    version_metrics,
)
from raypipe.tracking.mlflow_sink import TROUBLE, Kept, Point, RunPlace, Sink, one_line, points
from raypipe.tracking.records import RunStarted
from raypipe.tracking.versions import FOLDER, VersionStore

CURSOR, LOCK = "mlflow.json", "mlflow.lock"
BATCH = 200  # records taken at once
POLL_S, LONGEST_WAIT_S = 0.5, 15.0
CHUNK, TABLE_EVERY = 500, 50  # versions a lineage table holds; how often the open one is written


class Follower:
    """Follows one run. One at a time: a file lock in the run's folder says so."""

    def __init__(self, run_dir: Path, uri: str | None = None, home: Path | None = None) -> None:
        """Raises RunError where there is no journal. MLflow is first spoken to by `step`."""
        self.run_dir = run_dir
        self.journal = Journal(run_dir / FILE)
        self.versions = VersionStore(run_dir / FOLDER)
        self.history = History()
        self.place: RunPlace | None = None
        self.done = 0  # the cursor: the last record that is in MLflow
        self.trouble = ""  # why nothing moves, in one line
        self._uri, self._home = uri, home
        self._sink: Sink | None = None
        self._lock: IO[str] | None = None

    def run(
        self,
        stop: threading.Event,
        *,
        until_done: bool,
        patience_s: float | None = None,
        rest: Callable[[], object] = lambda: None,
    ) -> None:
        """Step until stopped, or until the run is finished, or (not `until_done`) until MLflow has what there is.

        Trouble is waited out for ever, or for `patience_s`; then RunError. `rest` follows each step that moved
        something: what is written meanwhile is brought over at once, which costs MLflow little more than one record.
        """
        wait, since = POLL_S, time.monotonic()
        while not stop.is_set():
            try:
                moved = self.step()
                wait, since, self.trouble = POLL_S, time.monotonic(), ""
            except TROUBLE as error:
                moved, self.place, self.trouble = 0, None, one_line(error)
                wait = min(2 * wait, LONGEST_WAIT_S)
                if patience_s is not None and time.monotonic() - since > patience_s:
                    raise RunError(f"MLflow could not be reached for {patience_s:g} s: {self.trouble}") from None
            if not moved and not self.trouble and (self.finished() or not until_done):
                return
            if moved:
                rest()
            else:
                stop.wait(wait)

    def step(self) -> int:
        """Bring some records over; how many. Raises one of TROUBLE, after which it can be called again."""
        sink, place = self._connected()
        if place is None:
            return 0
        records = list(islice(self.journal.read(after=self.done), BATCH))
        values: list[Point] = []
        for record in records:
            self.history.add(record)
            values += _points(record)
        sink.metrics(place.run_id, values)
        for record in records:
            self._perform(sink, place, record)
        if records:
            self._advance(place, records[-1].seq)
        return len(records)

    def behind(self) -> int:
        """Records that are not in MLflow yet."""
        return self.journal.last() - self.done

    def finished(self) -> bool:
        """The run is over and all of it is in MLflow."""
        return self.history.finished is not None and self.behind() == 0

    def where(self) -> str:
        """The run's page, or the embedded store's address."""
        return (self._sink or Sink(self._uri, self._home)).where(self.place)

    def close(self) -> None:
        """Idempotent; another process may follow then."""
        self.journal.close()
        if self._lock:
            self._lock.close()

    def _connected(self) -> tuple[Sink, RunPlace | None]:
        """The sink and the run in it. Raises BlockingIOError while another process follows this run."""
        if self._lock is None:
            handle = (self.run_dir / LOCK).open("w")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.close()
                raise BlockingIOError("another process is following this run") from None
            self._lock = handle
        self._sink = self._sink or Sink(self._uri, self._home)
        if self.place is None:
            first = next(self.journal.read(kinds=["run_started"]), None)
            if first is not None:
                self._connect(self._sink, first.body)  # type: ignore[arg-type]  # JSON of that kind
        return self._sink, self.place

    def _connect(self, sink: Sink, started: RunStarted) -> None:
        experiment = sink.experiment(started["experiment"])
        place = sink.run(experiment, started["name"], started["at"], {"fed.run_key": started["run"]})
        saved = _read_cursor(self.run_dir / CURSOR)
        self.done = saved[1] if saved[0] == place.run_id else 0
        self.history = History.of(takewhile(lambda record: record.seq <= self.done, self.journal.read()))
        self.place = place

    def _advance(self, place: RunPlace, seq: int) -> None:
        part = self.run_dir / f"{CURSOR}.part"
        part.write_text(json.dumps({"run_id": place.run_id, "seq": seq}))
        part.rename(self.run_dir / CURSOR)
        self.done = seq

    def _perform(self, sink: Sink, place: RunPlace, record: Record) -> None:
        """What a record asks for beside its metrics."""
        match record.kind:
            case "run_started":
                self._start(sink, place, record.body)  # type: ignore[arg-type]  # JSON of that kind
            case "weights_kept":
                if self._is_kept(version := record.body["version"]):
                    self._keep(sink, place, version)
            case "version_published":
                version = record.body["version"]
                if record.body.get("classes"):
                    self._write_classes(sink, place, version)
                if (version + 1) % TABLE_EVERY == 0:  # a full chunk too
                    self._write_table(sink, place, version)
            case "evaluated":
                version = record.body["version"]
                found = sink.find_model(place, self._name(version)) if self._is_kept(version) else None
                if found:
                    sink.metrics(place.run_id, _points(record), found.model_id)
            case "final":
                rows = record.body["table"]
                columns = list(dict.fromkeys(key for row in rows for key in row))
                sink.table(place.run_id, "stores.json", columns, [[row.get(c) for c in columns] for row in rows])
            case "run_finished":
                self._finish(sink, place, record)
            case _:
                pass

    def _start(self, sink: Sink, place: RunPlace, body: RunStarted) -> None:
        epoch = body["epoch"]
        sink.params(place.run_id, flat_params(body["config"]), f"epoch-{epoch}")
        tags = {"epoch": str(epoch), "code_hash": body["code_hash"], "stores": ", ".join(body["stores"])}
        tags |= {"licence": body["licence"]} if "licence" in body else {}
        sink.tags(place.run_id, {f"fed.{key}": value for key, value in tags.items()})
        sink.resume(place.run_id)

    def _finish(self, sink: Sink, place: RunPlace, record: Record) -> None:
        body, versions = record.body, self.history.versions
        for version in sorted({body["best_version"], max(versions, default=None)} & set(versions)):
            self._keep(sink, place, version)
        if versions:
            self._write_table(sink, place, max(versions))
        sink.tags(place.run_id, {"fed.reason": body["reason"], "fed.best_version": str(body["best_version"])})
        sink.end(place.run_id, body.get("status", "finished"), body["at"])

    def _keep(self, sink: Sink, place: RunPlace, version: int) -> None:
        """A LoggedModel; of a version whose weights are gone, its lineage only."""
        files: dict[str, Path | str] = {"raypipe.json": json.dumps(self.history.card(version))}
        params = lineage_params(self.history.versions[version])
        files["lineage.json"] = json.dumps(self.history.versions[version])
        try:
            files["state.safetensors"] = self.versions.path(version)
        except ConfigError:
            params["weights"] = "not kept"
        model_id = sink.model(place, Kept(self._name(version), version, params, files))
        for at, metrics in self.history.moments(version):
            sink.metrics(place.run_id, points(metrics, at, version), model_id)

    def _write_table(self, sink: Sink, place: RunPlace, version: int) -> None:
        first = version - version % CHUNK
        there = [v for v in range(first, first + CHUNK) if v in self.history.versions]
        rows = [row for v in there for row in lineage_rows(self.history.versions[v])]
        sink.table(place.run_id, f"lineage/v{first:05d}.json", COLUMNS, rows)

    def _write_classes(self, sink: Sink, place: RunPlace, version: int) -> None:
        """The list that holds from this version on, as a table; the first one too, with the first change."""
        changed = [v for v, body in self.history.versions.items() if body.get("classes")]
        for at in ([0] if version == min(changed) else []) + [version]:
            classes = ClassList.of(self.history.task(at))
            rows = [[place_, name, classes.state(name)] for place_, name in enumerate(classes.names)]
            sink.table(place.run_id, f"classes/v{at:05d}.json", ("output", "name", "state"), rows)

    def _is_kept(self, version: int) -> bool:
        track: Mapping[str, int] = self.history.run()["config"].get("track", {})
        return version > 0 and version % int(track.get("log_model_every", 10)) == 0

    def _name(self, version: int) -> str:
        return version_name(self.history, version)


def version_name(history: History, version: int) -> str:
    """`v00042-<run>`: MLflow's lists cut a name's end off."""
    return f"v{version:05d}-{history.run()['run']}"


def follow(
    run_dir: Path,
    *,
    until_done: bool = False,
    uri: str | None = None,
    home: Path | None = None,
    patience_s: float | None = None,
) -> str:
    """Bring MLflow up to date with a run, without Ray; with `until_done`, go on until the run is finished.

    Returns where it is (`Sink.where`). Raises RunError when MLflow stays out of reach for `patience_s`.
    """
    follower = Follower(run_dir, uri, home)
    try:
        follower.run(threading.Event(), until_done=until_done, patience_s=patience_s)
        return follower.where()
    finally:
        follower.close()


def _points(record: Record) -> list[Point]:
    """A record's metrics; their time is the record's own, so that a repeat changes nothing."""
    body = record.body
    match record.kind:
        case "version_published":
            return points(version_metrics(body), body["at"], body["version"])  # type: ignore[arg-type]
        case "evaluated":
            return points(evaluation_metrics(body), record.at, body["version"])  # type: ignore[arg-type]
        case "final":
            test = {f"test/{name}": value for name, value in body["test"].items()}
            return points(test, record.at, body["best_version"])
        case _:
            return []


def _read_cursor(file: Path) -> tuple[str, int]:
    """The MLflow run's id and the last record told to it. An unreadable cursor is none: repeats are harmless."""
    try:
        saved = json.loads(file.read_text())
        return str(saved["run_id"]), int(saved["seq"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0

"""The run's own record on the coordinator's disk: a folder with the journal and the version store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from raypipe.aggregation.variates import Variates
from raypipe.errors import ConfigError, RunError
from raypipe.ledger.keys import digest
from raypipe.models.tensors import vector_from
from raypipe.placement.homes import raypipe_home
from raypipe.tracking.journal import Journal
from raypipe.tracking.lineage import model_card
from raypipe.tracking.records import Kind, RunStarted
from raypipe.tracking.variates import VariateStore
from raypipe.tracking.versions import Retention, Tensors, VersionStore, force_state, read_state, save_state
from raypipe.types import Layout

REMEMBERED = 10_000  # tickets of which the version is known without a look into the journal


def run_folder(run: str, home: Path | None = None) -> Path:
    """The folder of a run, by its id or `last`. Raises ConfigError naming the newest runs when there is none."""
    runs = (home or raypipe_home()) / "runs"
    there = sorted((p for p in runs.glob("*/journal.sqlite")), key=lambda p: p.stat().st_mtime, reverse=True)
    if run == "last" and there:
        return there[0].parent
    if (runs / run / "journal.sqlite").is_file():
        return runs / run
    names = ", ".join(p.parent.name for p in there[:3])
    raise ConfigError(f"no run named {run!r} in {runs}" + (f"; the newest are {names}" if names else "; none ran yet"))


class RunBook:
    """Writes facts and weights; see coordinator/publisher.py for who calls what when."""

    def __init__(self, folder: Path, keep_last: int, keep_every: tuple[int, ...], wall: Callable[[], float]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"the run's folder {folder} cannot be made: {error.strerror}") from None
        self.folder = folder
        self.versions = VersionStore(folder / "versions")
        self.variates = VariateStore(folder)
        self._journal = Journal(folder / "journal.sqlite", write=True)
        self.damage = self._journal.damage  # what of the record is left out; empty: nothing
        self._last, self._every, self._wall = keep_last, keep_every, wall
        self._started: RunStarted | None = None
        self._read: int | None = None  # the newest record by `past`: who begins must know all that is there
        self._kept: dict[int, Mapping[str, Any]] = {}  # version -> its newest `weights_kept`
        self._folded: dict[str, int] = {}

    def record(self, kind: str, body: Mapping[str, Any]) -> None:
        """Durable when it returns. Raises RunError, StoreSuperseded: a later coordinator has begun."""
        self._journal.append(cast(Kind, kind), body, self._wall(), self._read if kind == "run_started" else None)
        self._remember(kind, body)

    def _remember(self, kind: str, body: Mapping[str, Any]) -> None:
        if kind == "run_started":
            self._started = cast(RunStarted, body)
            self.versions.life = int(body.get("epoch", 0))
        elif kind == "weights_kept":
            self._kept[body["version"]] = body
            if len(self._kept) > REMEMBERED:
                del self._kept[min(self._kept)]
        elif kind == "version_published":
            self._folded |= {c["ticket"]: body["version"] for c in body["contributions"]}
            for ticket in list(self._folded)[:-REMEMBERED]:
                del self._folded[ticket]
        elif kind == "run_finished":
            self.versions.tidy()
        elif kind == "version_withdrawn":
            self._folded = {t: v for t, v in self._folded.items() if v != body["version"]}
            self._kept.pop(body["version"], None)

    def hash(self, vector: np.ndarray) -> str:
        """A version's content hash: `b3:` and 64 hex digits, of the float32 values in the order of the layout."""
        return digest(vector)

    def write(
        self,
        version: int,
        vector: np.ndarray,
        layout: Layout,
        state: Mapping[str, np.ndarray],
        task: Mapping[str, Any] | None = None,
    ) -> None:
        """A version's weights with what they belong to, and the server transform's state, so that they outlive this
        process. `task`: its part, where it is not the configuration's. Raises RunError, StoreSuperseded."""
        self._journal.refuse_superseded()
        card = model_card(self._started, version, task) if self._started else {}
        self.versions.write(version, vector, layout, card)
        if state:
            save_state(self.folder, version, state)

    def force(self, version: int) -> None:
        """Have all that it takes to go on from a version on the disk. Raises RunError."""
        self._forced(version)

    def _forced(self, version: int) -> dict[str, Any]:
        """The same; with the body of `weights_kept`."""
        self._journal.refuse_superseded()
        beside = {"state": force_state(self.folder, version), "variates": self.variates.force(version)}
        body = {"version": version, **asdict(self.versions.keep(version))}
        return body | {name: found for name, found in beside.items() if found is not None}

    def keep(self, version: int) -> None:
        """Have what was written on the disk, then write down that it is there. Raises RunError."""
        body = self._forced(version)
        if self._kept.get(version, {}).get("file") != body["file"]:
            self.record("weights_kept", body)

    def state(self, version: int) -> Tensors | None:
        """The server transform's state after a version; None where it is lost, damaged or another than was kept."""
        return read_state(self.folder, version, self._kept.get(version, {}).get("state"))

    def table(self, version: int) -> Variates | None:
        """The stores' control variates after a version; None as above."""
        return self.variates.read(version, self._kept.get(version, {}).get("variates"))

    def read(self, version: int, layout: Layout) -> np.ndarray:
        """A version's vector. Raises ConfigError where its weights are gone, RunError where they are damaged."""
        return vector_from(layout, self.versions.read(version))

    def folded_into(self, ticket: str) -> int | None:
        """The version that a ticket's update became part of."""
        return self._folded.get(ticket)

    def past(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What was recorded so far."""
        for record in self._journal.read():
            self._read = record.seq
            yield record.kind, record.body
            self._remember(record.kind, record.body)

    def prune(self, in_use: frozenset[int], best: int | None) -> None:
        """Remove the weights that the rule does not keep and nobody needs."""
        self.versions.prune(Retention(self._last, self._every, best, in_use))

    def room(self) -> int:
        """Free bytes on the run's disk."""
        return shutil.disk_usage(self.folder).free

    def close(self) -> None:
        """Idempotent."""
        self._journal.close()

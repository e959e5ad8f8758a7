"""Reads what a run has left behind and says what does not fit together. It imports nothing of raypipe.

    journal.sqlite     the record: epochs, versions, contributions
    diary/             what the coordinator was told and decided, in order
    versions/          weights, safetensors; read by hand, hashed again
    STORE/state/RUN/   what each store was told of its tickets, and the epoch that it has heard of
    mlflow.db          the embedded tracking store, or a server's
    ledger.jsonl       the same versions of the same tickets, one chain (chaos_ledger.py); signatures: as a command
    STORE/heads/       the heads that each store was shown: all on this chain

python jobs/chaos_reader.py RUN_FOLDER [--stores FOLDER] [--mlflow FILE] [--calm RUN_FOLDER]: a line a fault, then the
verdict; exit code 1 if there is a fault.
"""

from __future__ import annotations

import argparse
import json
import math
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from blake3 import blake3
from chaos_ledger import FILE, check

Body: TypeAlias = dict[str, Any]


@dataclass
class Run:
    """What the journal says, and what is wrong with it."""

    name: str = ""
    versions: dict[int, Body] = field(default_factory=dict)  # those that stand
    kept: dict[int, Body] = field(default_factory=dict)
    withdrawn: list[Body] = field(default_factory=list)
    evaluated: dict[int, Body] = field(default_factory=dict)
    layout: Body = field(default_factory=dict)
    finished: Body | None = None
    epoch: int = 0
    has_ledger: bool = False
    skipped: dict[str, int] = field(default_factory=dict)  # store -> images that it cannot read, as was said last
    publications: set[tuple[int, tuple[str, ...]]] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def tickets(self) -> dict[str, int]:
        """Of updates in versions that stand."""
        return {c["ticket"]: number for number, body in self.versions.items() for c in body["contributions"]}


def read_journal(folder: Path) -> list[str]:
    """What is wrong with a run's journal by itself."""
    return journal(folder).faults


def journal(folder: Path) -> Run:
    """The record, each row checked against those before it."""
    run, last = Run(), 0
    for seq, kind, text in _rows(folder / "journal.sqlite", "select seq, kind, body from record order by seq"):
        body = json.loads(text)
        if seq != last + 1:
            run.faults.append(f"journal: record {seq} follows record {last}")
        last = seq
        match kind:
            case "run_started":
                if body["epoch"] <= run.epoch:
                    run.faults.append(f"journal: epoch {body['epoch']} began after epoch {run.epoch}")
                run.epoch, run.layout, run.finished = body["epoch"], body.get("layout", {}), None
                run.name = body.get("run", run.name)
                run.has_ledger = bool(body.get("config", {}).get("ledger", {}).get("keep"))
            case "version_published":
                run.faults += _published(run, body)
                run.versions[body["version"]] = body
                if "recalibrated" not in body:  # that was decided by no machine
                    run.publications.add((body["version"], tuple(c["ticket"] for c in body["contributions"])))
            case "weights_kept":
                run.kept[body["version"]] = body
            case "version_withdrawn":
                if not run.versions or body["version"] != max(run.versions):
                    run.faults.append(f"journal: version {body['version']} is withdrawn and is not the newest")
                run.withdrawn.append(run.versions.pop(body["version"], body))
                run.kept.pop(body["version"], None)
                run.evaluated.pop(body["version"], None)
            case "evaluated":
                if body["version"] not in run.versions:
                    run.faults.append(f"journal: version {body['version']} is judged and is not there")
                run.evaluated[body["version"]] = body
            case "images_skipped":
                run.skipped[body["store"]] = body["skipped"]
                if not 0 < body["skipped"] <= body["of"]:
                    run.faults.append(f"journal: {body['store']} leaves out {body['skipped']} of {body['of']} images")
            case "run_finished":
                run.finished = body
    return run


def _published(run: Run, body: Body) -> Iterator[str]:
    number, newest, made = body["version"], max(run.versions, default=-1), body["contributions"]
    if number != newest + 1:
        yield f"journal: version {number} follows version {newest}"
    if body["parent"] != (number - 1 if number else None):
        yield f"journal: version {number} has parent {body['parent']}"
    if number and not made and "recalibrated" not in body:
        yield f"journal: version {number} holds no update"
    before: float = run.versions[newest].get("elapsed_s", 0.0) if run.versions else 0.0
    if body.get("elapsed_s", before) < before:
        yield f"journal: version {number} was made {body['elapsed_s']:.1f} s after the start, {newest} {before:.1f} s"
    names, total, known = Counter(c["ticket"] for c in made), math.fsum(c["weight"] for c in made), run.tickets()
    for name, count in names.items():
        if count > 1:
            yield f"journal: ticket {name} is in version {number} {count} times"
        if name in known:
            yield f"journal: ticket {name} is in version {known[name]} and in version {number}"
    for c in made:
        base, _, rest = c["ticket"].partition(".")
        if base != str(c["base"]) or not rest.endswith(f".{c['store']}"):
            yield f"journal: ticket {c['ticket']} in version {number} is said to be {c['store']}'s from {c['base']}"
        if c["staleness"] != number - 1 - c["base"] or c["staleness"] < 0:
            yield f"journal: ticket {c['ticket']} in version {number} has staleness {c['staleness']}"
        if not (c["weight"] > 0 and math.isclose(c["share"], c["weight"] / total, rel_tol=1e-6)):
            yield f"journal: ticket {c['ticket']} in version {number}: share {c['share']} of {c['weight']}/{total}"


def diary(folder: Path, run: Run) -> Iterator[str]:
    """What was decided: a fact in the record was decided before; a ticket is settled in one way."""
    decided: set[tuple[int, tuple[str, ...]]] = set()
    settled: dict[str, int | None] = {}
    asked: set[str] = set()
    files = sorted((folder / "diary").glob("*.jsonl"))
    for file in files:
        lines = file.read_bytes().split(b"\n")[1:-1]  # the checkpoint; what was cut
        for number, line in enumerate(lines, 2):
            try:
                actions = json.loads(line)["decided"]
            except (ValueError, KeyError):
                yield f"diary: line {number} of {file.name} is damaged"
                continue
            for action in actions:
                if action["do"] == "Publish":
                    decided.add((action["version"], tuple(c["ticket"] for c in action["contributions"])))
                elif action["do"] == "Train":
                    asked.add(action["ticket"])
                elif action["do"] == "Settle" and action["version"] is not None:
                    before = settled.setdefault(action["ticket"], action["version"])
                    if before != action["version"] and action["ticket"] not in _lost(run):
                        yield f"diary: ticket {action['ticket']} is settled in {before} and in {action['version']}"
    if files and files[0].stem != "000001":
        return  # older ones were removed: what they held is not known
    for number, names in sorted(run.publications - decided):
        if number:
            yield f"version {number} of {', '.join(names)} is in the journal, and was never decided"
    there, lost = run.tickets(), _lost(run)
    for ticket in sorted(there):
        if ticket not in asked:
            yield f"diary: ticket {ticket} is in version {there[ticket]} and was never asked for"
    for ticket, version in settled.items():
        if there.get(ticket) != version and version not in lost.get(ticket, []):
            yield f"diary: ticket {ticket} is settled as part of version {version}; by the journal: {there.get(ticket)}"


def versions(folder: Path, run: Run) -> Iterator[str]:
    """Files that are whole and hold what the record says; the newest version is there."""
    files = sorted((folder / "versions").glob("v*-*.safetensors"))
    numbers = Counter(int(file.name[1:].partition("-")[0]) for file in files)
    for file in files:
        number, raw = int(file.name[1:].partition("-")[0]), file.read_bytes()
        if number not in run.versions:
            yield f"versions: {file.name} is of a version that the journal does not have"
            continue
        found = blake3(raw).hexdigest()
        if found[:12] != file.stem.partition("-")[2] or run.kept.get(number, {}).get("hash", found) != found:
            yield f"versions: {file.name} has hash {found[:12]}: it is not what was kept"
        elif run.layout and _content(raw, _layout(run, number)) != run.versions[number]["hash"]:
            yield f"versions: {file.name} holds other weights than version {number} by the journal"
    for number, count in numbers.items():
        if count > 1:
            yield f"versions: version {number} has {count} files"
    newest = max(run.versions, default=None)
    if newest is not None and newest not in numbers and not list((folder / "versions").glob(f"v{newest:05d}.*part")):
        yield f"versions: the newest version {newest} has no file"


def _layout(run: Run, number: int) -> Body:
    """A version's: another one since its class list changed."""
    changed = [v for v, body in run.versions.items() if v <= number and body.get("classes")]
    return run.versions[max(changed)]["classes"]["layout"] if changed else run.layout


def _content(raw: bytes, layout: Body) -> str:
    """The hash of a file's tensors as one vector of float32, in the layout's order and with its gaps."""
    try:
        size = int.from_bytes(raw[:8], "little")
        header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        kinds = {"F32": "<f4", "I64": "<i8", "F16": "<f2", "F64": "<f8", "I32": "<i4", "BOOL": "?", "U8": "u1"}
        vector = np.zeros(layout["size"], "<f4")
        for entry in layout["entries"]:
            said = header[entry["name"]]
            start, stop = said["data_offsets"]
            values = np.frombuffer(data[start:stop], kinds[said["dtype"]])
            vector[entry["offset"] : entry["offset"] + values.size] = values
        return "b3:" + blake3(vector.tobytes()).hexdigest()
    except (ValueError, KeyError, TypeError) as error:
        return f"unreadable ({type(error).__name__})"


def stores(home: Path, run: Run) -> Iterator[str]:
    """What each store was told, by its own disk: never two things, and never what the record denies."""
    there, lost = run.tickets(), _lost(run)
    known = {c["store"] for body in run.versions.values() for c in body["contributions"]}
    folders = sorted(home.glob(f"*/state/{run.name}"))
    for missing in sorted(known - {folder.parent.parent.name for folder in folders}):
        yield f"stores: {missing} has updates in versions, and keeps no note of this run"
    for folder in folders:
        store = folder.parent.parent.name
        told: dict[str, set[str]] = {}
        if (folder / "told").is_file():
            for line in (folder / "told").read_text().splitlines():
                ticket, _, version = line.partition(" ")
                told.setdefault(ticket, set()).add(version)
        for ticket, said in told.items():
            if len(said) > 1:
                yield f"stores: {store} was told of ticket {ticket}: {' and '.join(sorted(said))}"
            right = {str(v) for v in lost.get(ticket, [])} | {str(there.get(ticket, "-"))}
            if wrong := sorted(said - right):
                really = there.get(ticket, "no version")
                yield f"stores: {store} was told that ticket {ticket} is in {wrong[0]}; by the journal: {really}"
        epoch = int((folder / "epoch").read_text() or 0) if (folder / "epoch").is_file() else 0
        if epoch > run.epoch:
            yield f"stores: {store} has heard of epoch {epoch}; the journal knows {run.epoch}"


def _lost(run: Run) -> dict[str, list[int]]:
    """Tickets of versions that were withdrawn, and of which."""
    found: dict[str, list[int]] = {}
    for body in run.withdrawn:
        for c in body.get("contributions", []):
            found.setdefault(c["ticket"], []).append(body["version"])
    return found


def mlflow(file: Path, run: Run) -> Iterator[str]:
    """Each version is a step, no other is, and its numbers are the journal's."""
    ids = _rows(file, "select run_uuid from tags where key = 'fed.run_key' and value = ?", run.name)
    if len(ids) != 1:
        yield f"mlflow: {len(ids)} runs bear the name {run.name}; there should be one"
        return
    query = "select step, value, timestamp from metrics where key = ? and run_uuid = ? order by timestamp"
    steps: dict[int, float] = {int(s): v for s, v, _ in _rows(file, query, "fed/steps", ids[0][0])}
    if missing := sorted(set(run.versions) - set(steps)):
        yield f"mlflow: versions {missing} are no steps"
    if extra := sorted(set(steps) - set(run.versions) - {v["version"] for v in run.withdrawn}):
        yield f"mlflow: steps {extra} are no versions"
    for number, body in run.versions.items():
        right = sum(c["steps"] for c in body["contributions"])
        if number in steps and steps[number] != right:
            yield f"mlflow: version {number} took {steps[number]:g} steps; by the journal {right}"


def accuracy(run: Run, calm: Run) -> Iterator[str]:
    """The best version is as good as the calm run's, within noise: of the judging, and of another history."""
    scores = []
    for one in (run, calm):
        judged = [(b["metrics"]["accuracy"], b["num_examples"]) for b in one.evaluated.values()]
        if not judged:
            yield "accuracy: a run was never judged"
            return
        scores.append(max(judged))
    (ours, count), (theirs, _) = scores
    noise = 0.05 + 3 * math.sqrt(2 * max(0.02, theirs * (1 - theirs)) / max(1, count))
    if ours < theirs - noise:
        yield f"accuracy: {ours:.3f} at best; the calm run came to {theirs:.3f}, and noise is {noise:.3f}"


def ledger(folder: Path, run: Run, stores_home: Path | None) -> Iterator[str]:
    """By hand, and asked as a command, which also looks at the signatures."""
    if not (folder / FILE).is_file():
        if run.has_ledger:
            yield "ledger: there is none, and the run keeps one"
        return
    yield from check(folder, run.name, run.versions, stores_home)
    command = [sys.executable, "-m", "raypipe", "ledger", "verify", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        yield f"ledger: {((done.stdout + done.stderr).strip().splitlines() or ['it does not hold'])[-1]}"


def read_run(
    folder: Path, *, stores_home: Path | None = None, tracked: Path | None = None, calm: Path | None = None
) -> list[str]:
    """Every fault of a run, a line each."""
    run = journal(folder)
    faults = [*run.faults, *diary(folder, run), *versions(folder, run), *ledger(folder, run, stores_home)]
    faults += stores(stores_home, run) if stores_home is not None else ()
    faults += mlflow(tracked, run) if tracked is not None else ()
    return faults + list(accuracy(run, journal(calm)) if calm is not None else ())


def _rows(file: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    with sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=20) as db:
        return db.execute(query, values).fetchall()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stores", type=Path)
    parser.add_argument("--mlflow", type=Path)
    parser.add_argument("--calm", type=Path)
    options = parser.parse_args()
    faults = read_run(options.folder, stores_home=options.stores, tracked=options.mlflow, calm=options.calm)
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults" if faults else "the record holds")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

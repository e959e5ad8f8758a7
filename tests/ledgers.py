"""A coordinator and two stores that keep a ledger as they should, for the tests of what they keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from conftest import ROOT

from raypipe.ledger import entries
from raypipe.ledger.chain import Ledger
from raypipe.ledger.entries import Body, Entry
from raypipe.ledger.follow import record
from raypipe.ledger.keys import digest, load_or_make_key
from raypipe.ledger.lines import FILE
from raypipe.ledger.offline import canonical, check, update_statement
from raypipe.ledger.verify import Findings, Saved, verify
from raypipe.ledger.witness import Witness
from raypipe.tracking.journal import Journal
from raypipe.tracking.records import Kind

RUN = "shelf-1"
STORES = ["north", "south"]


def weights(version: int) -> np.ndarray:
    return np.full(64, version, np.float32)


class Federation:
    """A coordinator and two stores that keep a ledger as they should; no training in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_folder = folder, folder / "run"
        self.key = load_or_make_key(folder / "keys" / "coordinator.pem")
        self.keys = {store: load_or_make_key(folder / store / "key.pem") for store in STORES}
        self.witnesses = {store: Witness(folder / store / "ledger", self.keys[store], store) for store in STORES}
        self.ledger = Ledger(self.run_folder, self.key, RUN)
        self.at = 1000.0

    def begin(self) -> None:
        config = {"train": {"lr": 0.05}}
        hashed = sha256(canonical(config)).hexdigest()
        self.say(entries.Run(RUN, 1, self.key.public, hashed, "c0de", config))
        for store in STORES:
            key, counts = self.keys[store].public, {"shelf": {"train": 70, "val": 10}}
            self.say(entries.Store(store, key, {"max_examples": 1000.0}, {"shelf": "da7a"}, counts))
        self.publish(0)

    def say(self, body: Body) -> Entry:
        self.at += 1
        return self.ledger.append(body, at=self.at)

    def update(self, store: str, version: int, **changes: Any) -> entries.Update:
        """One store's update from the version before, signed."""
        update = entries.Update(
            version=version,
            store=store,
            ticket=f"{store}-{version}",
            base=version - 1,
            base_digest=digest(weights(version - 1)),
            staleness=0,
            steps=10,
            examples=320,
            weight=0.5,
            digest=digest(store.encode() + bytes([version])),
            signature="",
        )
        return self.signed(replace(update, **changes))

    def signed(self, update: entries.Update) -> entries.Update:
        assert update.digest is not None
        said = update_statement(
            run=RUN,
            store=update.store,
            ticket=update.ticket,
            base_version=update.base,
            base_digest=update.base_digest,
            update_digest=update.digest,
            steps=update.steps,
            examples=update.examples,
        )
        return replace(update, signature=self.keys[update.store].sign("update", said))

    def version(self, number: int, updates: int, **changes: Any) -> entries.Version:
        parent = number - 1 if number else None
        before = digest(weights(number - 1)) if number else None
        return replace(entries.Version(number, parent, before, digest(weights(number)), updates), **changes)

    def keep(self, number: int) -> entries.Kept:
        folder = self.run_folder / "versions"
        folder.mkdir(exist_ok=True)
        content = weights(number).tobytes()
        name = f"v{number:05d}.safetensors"
        (folder / name).write_bytes(content)
        return entries.Kept(number, name, blake3(content).hexdigest(), len(content))

    def publish(self, number: int) -> None:
        """The stores look at the base, co-sign, and have their updates folded."""
        if number:
            for store in STORES:
                self.witness(store, number - 1)
                self.say(self.update(store, number))
        self.say(self.version(number, len(STORES) if number else 0))
        self.ledger.seal(at=self.at)
        self.say(self.keep(number))  # under the next head

    def witness(self, store: str, base: int) -> None:
        proof = self.ledger.base_proof(base, self.witnesses[store].size(RUN))
        said = self.witnesses[store].check(proof, run=RUN, version=base, digest=digest(weights(base)))
        self.ledger.witness(said, self.keys[store].public)

    def heads_of(self, store: str) -> Path:
        return self.folder / store / "ledger" / f"{RUN}.heads.jsonl"

    def verify(self, *against: Saved) -> Findings:
        return verify(self.run_folder, against)

    def read(self) -> list[bytes]:
        return (self.run_folder / FILE).read_bytes().splitlines(keepends=True)

    def index_of(self, words: bytes) -> int:
        """Of the first entry that has these words in its line."""
        return int(json.loads(next(line for line in self.read() if words in line))["entry"]["index"])

    def size(self) -> int:
        return int(json.loads(self.read()[-1])["head"]["size"])

    def write(self, lines: list[bytes]) -> None:
        (self.run_folder / FILE).write_bytes(b"".join(lines))


def federation(folder: Path, versions: int = 4) -> Federation:
    made = Federation(folder)
    made.begin()
    for number in range(1, versions):
        made.publish(number)
    made.ledger.seal(at=made.at)
    made.ledger.close()
    return made


def rewritten(made: Federation, change: Callable[[Entry], Body | None], folder: Path) -> Federation:
    """The holder of the coordinator's key writes another ledger: every entry that `change` names has another body."""
    forged = Ledger(folder, made.key, RUN)
    for line in made.read():
        said = json.loads(line)
        if "head" in said:
            forged.seal(at=said["head"]["at"])
        else:
            entry = Entry(**said["entry"])
            if entry.kind != "witnessed":  # stores did not co-sign the forged heads
                forged.append(change(entry) or entry.typed(), at=entry.at)
    forged.close()
    other = object.__new__(Federation)
    other.__dict__ = {**made.__dict__, "run_folder": folder}
    return other


def named(findings: Findings) -> int | None:
    """The entry of the first problem, or of the first note where there is no problem."""
    return (*findings.problems, *findings.notes)[0].entry


def lines_of(findings: Findings) -> str:
    return " | ".join(map(str, findings.problems))


def goes_on(made: Federation) -> Federation:
    """One version more, its ledger not sealed."""
    made.ledger = Ledger(made.run_folder, made.key, RUN)
    made.publish(4)
    return made


def heavier(entry: Entry) -> Body | None:
    """North's update in version 2 weighs more than it did."""
    body = entry.typed()
    is_it = isinstance(body, entries.Update) and body.ticket == "north-2"
    return replace(body, weight=0.9) if is_it and isinstance(body, entries.Update) else None


def ask(made: Federation, store: str, base: int, **changes: Any) -> dict[str, Any]:
    """What the store answers to this base, with parts of the proof exchanged."""
    since = changes.pop("since_shown", made.witnesses[store].size(RUN))
    vector = changes.pop("vector", weights(base))
    proof = {**made.ledger.base_proof(base, since), **changes}
    return made.witnesses[store].check(proof, run=RUN, version=base, digest=digest(vector))


class Told:
    """A journal of a run with two stores, and the ledger that follows it."""

    def __init__(self, folder: Path, *, signed: bool = True) -> None:
        self.folder, self.signed = folder, signed
        folder.mkdir(parents=True, exist_ok=True)
        self.key = load_or_make_key(folder / "coordinator.pem")
        self.keys = {store: load_or_make_key(folder / f"{store}.pem") for store in STORES}
        self.journal = Journal(folder / "journal.sqlite", write=True)
        self.at = 1000.0

    def tell(self, kind: Kind, **body: Any) -> None:
        self.at += 1.5
        self.journal.append(kind, body, self.at)

    def start(self, epoch: int = 1) -> None:
        self.tell("run_started", run=RUN, epoch=epoch, code_hash="c0de", config={"data": "shelf", "lr": 0.05})

    def join(self, store: str, train: int = 70, **more: Any) -> None:
        if self.signed:
            more = {"key": self.keys[store].public, **more}
        self.tell("store_joined", store=store, counts={"train": train}, hash="da7a", cpus=1.0, gpu=None, **more)

    def contribution(self, store: str, version: int, ticket: str) -> dict[str, Any]:
        base = version - 1
        made = {"store": store, "ticket": ticket, "base": base, "staleness": 0, "steps": 10, "examples": 320}
        if self.signed:
            sent = digest(ticket.encode())
            said = update_statement(
                run=RUN,
                store=store,
                ticket=ticket,
                base_version=base,
                base_digest=digest(weights(base)),
                update_digest=sent,
                steps=10,
                examples=320,
            )
            made |= {"digest": sent, "signature": self.keys[store].sign("update", said)}
        return {**made, "weight": 0.5, "share": 0.5, "seconds": 1.0, "loss": 0.1, "bytes_up": 256}

    def publish(self, version: int) -> None:
        made = [self.contribution(store, version, f"{store}-{version}") for store in STORES] if version else []
        facts = {"version": version, "parent": version - 1 if version else None, "hash": digest(weights(version))}
        self.tell("version_published", **facts, contributions=made)
        self.tell("evaluated", version=version, split="validation")

    def keep(self, version: int) -> None:
        folder = self.folder / "versions"
        folder.mkdir(exist_ok=True)
        content = weights(version).tobytes()
        (folder / f"v{version}").write_bytes(content)
        hashed = blake3(content).hexdigest()
        self.tell("weights_kept", version=version, file=f"v{version}", hash=hashed, num_bytes=len(content))

    def run(self) -> None:
        """A run in which a coordinator dies, a version is lost, and a store comes back as it was."""
        self.start()
        self.publish(0)
        self.keep(0)
        for store in STORES:
            self.join(store)
        self.publish(1)
        self.tell("update_rejected", store="north", ticket="t", reason="not finite")
        self.keep(1)
        self.publish(2)
        self.start(epoch=2)
        self.tell("version_withdrawn", version=2, reason="its weights were lost")
        self.join("south")
        self.join("north", train=80)
        self.publish(2)
        self.keep(2)
        self.publish(3)
        self.keep(3)
        self.tell("run_finished", reason="enough", status="finished", versions=4, best_version=3, at=self.at)

    def ledger(self) -> Ledger:
        return Ledger(self.folder, self.key, RUN)

    def follow(self, until: int | None = None) -> None:
        """What the journal has up to a record; then the process is gone."""
        ledger = self.ledger()
        record(ledger, islice(self.journal.read(), until))
        ledger.close()

    def lines(self) -> list[bytes]:
        return (self.folder / FILE).read_bytes().splitlines(keepends=True)

    def kinds(self) -> list[str]:
        said = [json.loads(line) for line in self.lines()]
        return [one["entry"]["kind"] if "entry" in one else "head" for one in said]


def offline(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Without raypipe: another working folder, no path of ours, and a check that none was found."""
    script = ROOT / "raypipe" / "ledger" / "offline.py"
    return subprocess.run([sys.executable, "-I", script, *map(str, arguments)], capture_output=True, text=True, cwd="/")


def is_proven(proof: dict[str, Any], key: str) -> bool:
    try:
        return check(proof, key).startswith("proven: ")
    except (ValueError, KeyError, TypeError):
        return False

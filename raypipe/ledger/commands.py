"""`raypipe ledger ...` and `raypipe evidence`: thin verbs over this room, for whoever audits a run or its stores.

A run is named by its id, by `last`, or by a folder with a copy of its ledger: an auditor needs no more than that.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from raypipe.errors import ConfigError, RunError

if TYPE_CHECKING:
    from raypipe.ledger.roster import Roster

# The third argument is the verbs' parser's own type, which argparse keeps to itself.
Handler: TypeAlias = Callable[[argparse.Namespace], int]
Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_parsers(subparsers: Parsers) -> None:
    """The verbs `ledger` and `evidence`. Each sets `run`, called with the options and whatever else, for an exit code:
    0, or 1 where a ledger does not hold. Handlers raise ConfigError and RunError."""
    ledger = _parser(subparsers, "ledger", "check a run's ledger, prove a contribution, say whose key is right")
    verbs = ledger.add_subparsers(required=True, metavar="VERB")
    checked = _verb(verbs, "verify", ledger_verify, "check all that a run's ledger says", run=True)
    proof = _verb(verbs, "prove", ledger_prove, "write a proof that a store's update is in a version", run=True)
    proof.add_argument("version", metavar="VERSION", type=int)
    proof.add_argument("store", metavar="STORE")
    proof.add_argument("--out", type=Path, help="default: proof-RUN-VERSION-STORE.json here")
    enrolled = _verb(verbs, "enroll", ledger_enroll, "say which key a store signs with")
    enrolled.add_argument("store", metavar="STORE")
    enrolled.add_argument("key", metavar="KEY", help="its Ed25519 public key, 64 hex digits")
    gone = _verb(verbs, "revoke", ledger_revoke, "say that a store's key counts no more")
    gone.add_argument("store", metavar="STORE")
    told = _verb(verbs, "receipts", ledger_receipts, "say what left a store, by its own receipts; on its machine")
    told.add_argument("store", metavar="STORE", help="its id, or its folder")
    for sub in (enrolled, gone):
        sub.add_argument("--roster", type=Path, metavar="FILE", help="default: that of the coordinator's machine")
    page = _verb(subparsers, "evidence", evidence, "write one page about a run for an auditor", run=True)
    page.add_argument("--out", type=Path, help="default: evidence-RUN.html here")
    for sub in (checked, page):
        help = "heads that a store or you kept, or a copy of the ledger; may be given several times"
        sub.add_argument("--against", type=Path, action="append", default=[], metavar="HEAD", help=help)
        sub.add_argument("--coordinator-key", metavar="KEY", help="the key that the run must be signed with")


def _parser(subparsers: Parsers, name: str, help: str) -> argparse.ArgumentParser:
    return subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)


def _verb(subparsers: Parsers, name: str, handler: Handler, help: str, *, run: bool = False) -> argparse.ArgumentParser:
    sub = _parser(subparsers, name, help)
    sub.set_defaults(run=lambda options, *_: handler(options))
    if run:
        sub.add_argument("which", metavar="RUN", help="a run's id, 'last', or a folder that holds its ledger")
    return sub


def ledger_verify(options: argparse.Namespace) -> int:
    """A line for each finding, then the verdict; 1 where the ledger does not hold."""
    findings = _verified(options, _folder(options.which))
    for kind, found in (("WRONG", findings.problems), ("note", findings.notes)):
        for one in found:
            _say(f"{kind}: {one}")
    _say(findings.summary())
    if not options.coordinator_key:
        _say(f"signed by {_key(findings.coordinator)}: is that the coordinator's key? (--coordinator-key)")
    if not options.against:
        _say("compared with nothing that others kept: --against a store's file of heads would show a rewritten ledger")
    return 0 if findings.ok else 1


def ledger_prove(options: argparse.Namespace) -> int:
    """Write the proof, checked as its reader will check it."""
    from raypipe.ledger import offline
    from raypipe.ledger.prove import prove

    proof = prove(_folder(options.which), options.version, options.store)
    head = proof["head"]
    try:
        said = offline.check(proof, head["coordinator"])
    except ValueError as error:
        raise RunError(f"this proves nothing: {error}; see `raypipe ledger verify {options.which}`") from None
    name = re.sub(r"[^A-Za-z0-9._-]", "_", f"proof-{head['run']}-{options.version}-{options.store}.json")
    path = options.out or Path(name)
    _write(path, json.dumps(proof, indent=1) + "\n")
    _say(said)
    _say(f"written: {path}")
    _say(f"to check it: python {Path(offline.__file__).name} {path} --coordinator-key {head['coordinator']}")
    return 0


def ledger_receipts(options: argparse.Namespace) -> int:
    """A line a run; 1 where a receipt was changed or taken out."""
    from raypipe.ledger.receipts import APART, read_receipts
    from raypipe.placement.homes import stores_home

    folder = Path(options.store) / "egress"
    folder = folder if folder.is_dir() else stores_home() / options.store / "egress"
    runs = sorted({file.parent for file in folder.glob("*/egress-*.jsonl")})
    if not runs:
        raise ConfigError(f"store {options.store} has no receipts in {folder}")
    wrong = 0
    for run in runs:
        found = read_receipts(run)
        kinds = ", ".join(f"{one.messages} {kind}, {one.num_bytes:,} bytes" for kind, one in found.kinds.items())
        _say(f"{'of no run' if run.name == APART else run.name}: {kinds or 'none'}")
        for problem in found.problems:
            _say(f"WRONG: {run.name}/{problem}")
        wrong += len(found.problems)
    return 1 if wrong else 0


def ledger_enroll(options: argparse.Namespace) -> int:
    """From now on this key is the store's."""
    from raypipe.ledger.roster import enroll

    before: list[str | None] = []

    def change(roster: Roster) -> Roster:
        before.append(roster.key_of(options.store))
        return enroll(roster, options.store, options.key, time.time())

    path = _roster(options, change)
    if before == [options.key]:
        _say(f"store {options.store} is enrolled with {_key(options.key)} already")
    else:
        was = f"; revoked: {_key(before[0])}" if before[0] else ""
        _say(f"store {options.store} is enrolled with {_key(options.key)}{was}")
    _say(f"roster: {path}")
    return 0


def ledger_revoke(options: argparse.Namespace) -> int:
    """The store's key counts no more."""
    from raypipe.ledger.roster import revoke

    path = _roster(options, lambda roster: revoke(roster, options.store, time.time()))
    _say(f"the key of store {options.store} is revoked; roster: {path}")
    return 0


def evidence(options: argparse.Namespace) -> int:
    """Write the page; 1 where the ledger does not hold, which the page says too."""
    from raypipe.ledger.evidence import page

    folder = _folder(options.which)
    findings = _verified(options, folder)
    path = options.out or Path(f"evidence-{folder.resolve().name}.html")
    _write(path, page(folder, findings, at=time.time()))
    _say(findings.summary())
    _say(f"written: {path}")
    return 0 if findings.ok else 1


def _verified(options: argparse.Namespace, folder: Path) -> Any:
    from raypipe.ledger.keys import fingerprint
    from raypipe.ledger.verify import read_saved, verify

    if options.coordinator_key:
        try:
            fingerprint(options.coordinator_key)
        except ValueError as error:
            raise ConfigError(f"--coordinator-key: {error}") from None
    return verify(folder, [read_saved(path) for path in options.against], coordinator=options.coordinator_key)


def _folder(which: str) -> Path:
    from raypipe.ledger.lines import FILE
    from raypipe.tracking.book import run_folder

    if (Path(which) / FILE).is_file():
        return Path(which)
    folder = run_folder(which)
    if not (folder / FILE).is_file():
        raise RunError(f"run {folder.name} kept no ledger: {folder / FILE} is missing")
    return folder


def _roster(options: argparse.Namespace, change: Callable[[Roster], Roster]) -> Path:
    """Where it lies."""
    from raypipe.ledger.roster import FILE, change_roster
    from raypipe.placement.homes import raypipe_home

    path: Path = options.roster or raypipe_home() / FILE
    change_roster(path, change)
    return path


def _key(key: str | None) -> str:
    from raypipe.ledger.keys import fingerprint

    try:
        return f"{key} (fingerprint {fingerprint(key or '')})"
    except ValueError:
        return "no key"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror}") from None


def _say(line: str) -> None:
    """A ledger may hold anything, and may not drive the terminal."""
    print("".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line))

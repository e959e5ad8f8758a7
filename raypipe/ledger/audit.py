"""One way through a ledger file, line by line, with what must be known to judge the next; see verify.py."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from raypipe.ledger import entries
from raypipe.ledger.entries import FIRST, Entry
from raypipe.ledger.heads import Head, is_cosigned, is_genuine
from raypipe.ledger.keys import fingerprint, verify
from raypipe.ledger.lines import Line
from raypipe.ledger.offline import canonical, update_statement
from raypipe.ledger.tree import Tree


@dataclass(frozen=True, slots=True)
class Finding:
    """`entry` is the first one touched, None where it is about the whole."""

    entry: int | None
    line: str

    def __str__(self) -> str:
        return self.line if self.entry is None else f"entry {self.entry}: {self.line}"


@dataclass
class Audit:
    """What is known so far on the way through the file."""

    tree: Tree = field(default_factory=Tree)
    expected: int = 0  # the index of the next entry
    prev: str | None = FIRST  # None: the entry before cannot be read
    broken: int | None = None  # the first entry that is not as it was; roots are not compared from there
    unsealed: int = 0
    run: str = ""
    key: str | None = None
    newest: entries.Version | None = None
    hashes: dict[int, str] = field(default_factory=dict)
    stores: dict[str, str | None] = field(default_factory=dict)  # store -> the key that stands, None: it signs nothing
    keys: dict[str, set[str]] = field(default_factory=dict)  # store -> all it ever had
    versions: dict[int, tuple[int, entries.Version]] = field(default_factory=dict)
    kept: dict[int, tuple[int, entries.Kept]] = field(default_factory=dict)
    tickets: dict[str, tuple[int, int]] = field(default_factory=dict)  # ticket -> its entry and version
    unsigned: list[int] = field(default_factory=list)  # updates of stores without a key
    updates: dict[int, list[int]] = field(default_factory=dict)  # version to come -> its entries
    heads: dict[int, Head] = field(default_factory=dict)
    last: Head | None = None
    good: int = 0  # the size of the last head whose root was right
    doubt: Head | None = None  # its root was wrong; the entry that follows may tell which one was rewritten
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def say(self, entry: int | None, line: str) -> None:
        self.problems.append(Finding(entry, line))

    def break_at(self, entry: int, line: str) -> None:
        self.broken = entry if self.broken is None else min(entry, self.broken)
        self.say(entry, line)


def take(audit: Audit, line: Line) -> None:
    """The next line of the file."""
    if line.cut:
        what, index = ("the head after it", max(0, audit.expected - 1)) if line.of_head else ("it", audit.expected)
        audit.notes.append(Finding(index, f"the file ends inside {what}, which was never sealed: ignored"))
    elif isinstance(line.item, Entry):
        _entry(audit, line.item, line)
    elif line.item is not None:
        _head(audit, line.item)
    elif line.of_head:
        audit.say(max(0, audit.expected - 1), f"the head after it was altered: {line.problem}")
    else:
        audit.break_at(audit.expected, line.problem)
        audit.expected, audit.prev = audit.expected + 1, None


def _entry(audit: Audit, entry: Entry, line: Line) -> None:
    _settle(audit, entry)
    if audit.broken is None:
        _order(audit, entry)
    audit.expected, audit.prev = entry.index + 1, line.hash.hex()
    audit.hashes.setdefault(entry.index, line.hash.hex())
    audit.tree.append(line.hash)
    audit.unsealed += 1
    audit.counts[entry.kind] += 1
    _body(audit, entry.index, line.body)
    if entry.actor != str(entry.body.get("store", "coordinator")):
        audit.say(entry.index, "its actor is not the one its body names")


def _body(audit: Audit, index: int, found: entries.Body | None) -> None:
    match found:
        case entries.Run() as body:
            _run(audit, index, body)
        case entries.Store() as body:
            _store(audit, index, body)
        case entries.Revoked() as body:
            _revoked(audit, index, body)
        case entries.Update() as body:
            _update(audit, index, body)
        case entries.Version() as body:
            _version(audit, index, body)
        case entries.Kept() as body:
            _kept(audit, index, body)
        case entries.Withdrawn() as body:
            _withdrawn(audit, index, body)
        case entries.Witnessed() as body:
            _witnessed(audit, index, body)
        case _:
            pass


def _order(audit: Audit, entry: Entry) -> None:
    """Only the first break is told: what follows from it says nothing more."""
    if entry.index > audit.expected:
        audit.break_at(audit.expected, f"it is missing or was moved: entry {entry.index} stands in its place")
    elif entry.index < audit.expected:
        audit.break_at(entry.index, f"it stands again in the place of entry {audit.expected}")
    elif entry.prev != audit.prev:
        audit.break_at(max(0, entry.index - 1), f"it is not the one that entry {entry.index} follows")
    elif entry.index == 0 and entry.kind != "run":
        audit.break_at(0, "a ledger begins with an entry of kind run")


def _run(audit: Audit, index: int, body: entries.Run) -> None:
    audit.run = audit.run or body.run
    audit.key = audit.key or body.coordinator
    if body.run != audit.run:
        audit.say(index, f"it is of run {body.run}, the ledger of {audit.run}")
    if body.coordinator != audit.key:
        audit.say(index, f"the coordinator's key is {_short(body.coordinator)}, expected {_short(audit.key)}")
    if body.config is not None and hashlib.sha256(canonical(body.config)).hexdigest() != body.config_hash:
        audit.say(index, "the configuration does not have its hash")


def _store(audit: Audit, index: int, body: entries.Store) -> None:
    standing = audit.stores.get(body.store)
    if standing not in (None, body.key):
        other = "another" if body.key else "no"
        audit.say(index, f"store {body.store} comes with {other} key while {_short(standing)} stands")
    audit.stores[body.store] = body.key
    known = audit.keys.setdefault(body.store, set())
    if body.key is not None:
        known.add(body.key)


def _revoked(audit: Audit, index: int, body: entries.Revoked) -> None:
    if audit.stores.get(body.store) != body.key:
        audit.say(index, f"store {body.store} has no such key to revoke")
    else:
        del audit.stores[body.store]


def _update(audit: Audit, index: int, body: entries.Update) -> None:
    audit.updates.setdefault(body.version, []).append(index)
    if body.ticket in audit.tickets:
        audit.say(index, f"ticket {body.ticket} is folded twice, first in entry {audit.tickets[body.ticket][0]}")
    audit.tickets.setdefault(body.ticket, (index, body.version))
    if body.version in audit.versions:
        audit.say(index, f"an update of version {body.version}, which was made before it")
    base = audit.versions.get(body.base)
    if base is None:
        audit.say(index, f"its base version {body.base} is not in the ledger")
    elif base[1].digest != body.base_digest:
        audit.say(
            index,
            f"store {body.store} trained from {body.base_digest[:15]}, version {body.base} is {base[1].digest[:15]}",
        )
    if body.store not in audit.stores:
        known = body.store in audit.keys
        audit.say(
            index, f"the key of store {body.store} was revoked" if known else f"no store {body.store} is enrolled"
        )
    elif (key := audit.stores[body.store]) is None and body.signature is None:
        audit.unsigned.append(index)
    elif not key or not is_signed_update(audit.run, body, key):
        audit.say(index, f"the update of ticket {body.ticket} is not signed by store {body.store}")


def is_signed_update(run: str, body: entries.Update, key: str) -> bool:
    """Whether the holder of this key signed what the entry says."""
    if body.digest is None or body.signature is None:
        return False
    said = update_statement(
        run=run,
        store=body.store,
        ticket=body.ticket,
        base_version=body.base,
        base_digest=body.base_digest,
        update_digest=body.digest,
        steps=body.steps,
        examples=body.examples,
    )
    return verify(key, "update", said, body.signature)


def _version(audit: Audit, index: int, body: entries.Version) -> None:
    before = audit.newest
    if body.version in audit.versions:
        audit.say(index, f"version {body.version} was made before, in entry {audit.versions[body.version][0]}")
    elif (body.parent, body.parent_digest) != ((before.version, before.digest) if before else (None, None)):
        parent = f"version {before.version} ({before.digest[:15]})" if before else "none"
        audit.say(index, f"version {body.version} does not name the parent that it has: {parent}")
    if len(own := audit.updates.pop(body.version, [])) != body.updates:
        audit.say(index, f"version {body.version} has {body.updates} updates; {len(own)} stand before it")
    audit.versions.setdefault(body.version, (index, body))
    audit.newest = body


def _kept(audit: Audit, index: int, body: entries.Kept) -> None:
    if body.version not in audit.versions:
        audit.say(index, f"weights of version {body.version}, which is not in the ledger")
    audit.kept[body.version] = index, body


def _withdrawn(audit: Audit, index: int, body: entries.Withdrawn) -> None:
    if audit.newest is None or audit.newest.version != body.version:
        newest = audit.newest.version if audit.newest else "none"
        audit.say(index, f"version {body.version} is withdrawn; the newest, which alone can be, is {newest}")
        return
    gone = audit.versions.pop(body.version)[1]
    audit.kept.pop(body.version, None)
    audit.tickets = {ticket: place for ticket, place in audit.tickets.items() if place[1] != body.version}
    audit.newest = audit.versions[gone.parent][1] if gone.parent in audit.versions else None


def _witnessed(audit: Audit, index: int, body: entries.Witnessed) -> None:
    head = audit.heads.get(body.size)
    if head is None:
        audit.say(index, f"stores co-signed a head of size {body.size}, which is not here")
        return
    audit.counts["cosignatures"] += len(body.cosignatures)
    for store, signature in body.cosignatures.items():
        if not any(is_cosigned(head, store, key, signature) for key in audit.keys.get(store, ())):
            audit.say(index, f"store {store} did not co-sign the head of size {body.size} that is here")


def _head(audit: Audit, head: Head) -> None:
    index = max(0, audit.expected - 1)
    _settle(audit, None)
    audit.counts["heads"] += 1
    audit.last = head
    if head.coordinator != audit.key or not is_genuine(head):
        audit.say(index, f"the head after it ({head.short}) is not signed by the coordinator's key")
    if head.run != audit.run:
        audit.say(index, f"the head after it is of run {head.run}")
    if audit.broken is None:
        _root(audit, head, index)
    if not audit.unsealed:
        audit.say(index, "a second head follows it")
    audit.heads[head.size], audit.unsealed = head, 0


def _root(audit: Audit, head: Head, index: int) -> None:
    new = audit.newest
    if head.size > audit.expected:
        audit.break_at(audit.expected, f"it is missing: the head here was signed over {head.size} entries")
    elif head.size < audit.expected:
        audit.break_at(head.size, f"it was put in: the head after it was signed over {head.size} entries")
    elif head.root != audit.tree.root().hex():
        audit.doubt = head
    elif (head.version, head.digest) != ((new.version, new.digest) if new else (None, None)):
        audit.say(index, "the head after it names another version than the newest")
    else:
        audit.good = head.size


def _settle(audit: Audit, following: Entry | None) -> None:
    """Which entry a wrong root is about, as near as can be told."""
    head, audit.doubt = audit.doubt, None
    if head is None:
        return
    last = head.size - 1
    if following is not None and following.index == head.size and following.prev != audit.prev:
        audit.break_at(last, f"it is not the one that its head was signed over and entry {head.size} follows")
    else:
        until = f" or one up to {last}" if last > audit.good else ""
        audit.break_at(audit.good, f"it{until} is not what the head after {last} was signed over")


def end(audit: Audit) -> None:
    """There are no more lines."""
    _settle(audit, None)
    if audit.last is None:
        audit.say(None, "no head is signed: nothing here is the coordinator's word")
    elif audit.unsealed:
        audit.notes.append(
            Finding(audit.expected - audit.unsealed, "it and what follows was never sealed by a signed head")
        )
    if audit.unsigned:
        number = len(audit.unsigned)
        said = f"{number} updates from here on are unsigned: whose they are is the coordinator's word alone"
        audit.notes.append(Finding(audit.unsigned[0], said))
    for version, places in audit.updates.items():
        if places[0] < audit.expected - audit.unsealed:
            audit.say(places[0], f"an update of version {version}, which was never made")


def _short(key: str | None) -> str:
    try:
        return fingerprint(key or "")
    except ValueError:
        return "no key"

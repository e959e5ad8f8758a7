"""Everything that a reader of a run's folder can check; each finding names the first entry that it touches.

    by itself   every line canonical and of its hash; entries in order, each naming the one before; every head signed by
                the run's key, of these entries; every update signed by its store's key, once, from the base that it
                names; every version on its parent; every co-signature; weights that are kept, by their hash
    against     heads that somebody kept, or a copy of the ledger: a chain that was rewritten, forked or cut off and
                signed anew by the holder of the coordinator's key is found only so. The first entry that differs is
                named where the other side's entries are there, or the leaves that a store keeps with its heads; by
                heads alone it is one of those between the last head that agrees and the first that does not

It cannot show that an update did what its store says it did, nor that stores are who the roster says they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from raypipe.errors import ConfigError, RunError
from raypipe.ledger.audit import Audit, Finding, end, take
from raypipe.ledger.entries import Entry
from raypipe.ledger.heads import Head, is_genuine, read_kept
from raypipe.ledger.lines import FILE, read_lines
from raypipe.ledger.offline import leaf_hash
from raypipe.ledger.tree import WIDTH, Tree

WEIGHTS = "versions"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Findings:
    """`problems` is empty when all that can be checked holds; `notes` are no faults, but should be said."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    counts: dict[str, int]  # entries by kind; heads, cosignatures, weights
    head: Head | None  # the last one
    coordinator: str | None  # the key that all was checked with

    @property
    def ok(self) -> bool:
        return not self.problems

    def summary(self) -> str:
        """What was checked, in one line."""
        kinds = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        last = f"; last head: {self.head.short}" if self.head else ""
        verdict = "holds" if self.ok else f"does NOT hold: {len(self.problems)} findings"
        return f"the ledger {verdict} ({kinds or 'empty'}){last}"


@dataclass(frozen=True, slots=True)
class Saved:
    """What somebody kept: heads; from a copy of a ledger the hash of each entry too, from a store the tree's leaves."""

    heads: tuple[Head, ...]
    hashes: dict[int, str] = field(default_factory=dict)
    tree: Tree = field(default_factory=Tree)


def read_saved(path: Path) -> Saved:
    """A file of heads as a store keeps it, or a copy of a ledger. Raises ConfigError naming the line that is wrong."""
    heads, hashes = [], {}
    if (kept := _read_kept(path)) is not None:
        return kept
    try:
        for number, line in enumerate(read_lines(path), 1):
            if isinstance(line.item, Entry):
                hashes[line.item.index] = line.hash.hex()
            elif line.item is not None:
                heads.append(line.item)
            elif not line.cut:
                raise ConfigError(f"{path}:{number}: {line.problem}; it holds neither heads nor a ledger")
    except RunError as error:
        raise ConfigError(error.message) from None
    if not heads:
        raise ConfigError(f"{path} holds no signed head")
    return Saved(tuple(heads), hashes)


def _read_kept(path: Path) -> Saved | None:
    """Of a store's own file; None for what is none. Raises ConfigError naming the line that is wrong."""
    try:
        content = path.read_bytes()
        if not content.startswith((b'{"head":', b'{"leaves":')):
            return None
        found, tree, _ = read_kept(content)
    except OSError:
        return None  # it is said by who reads it next
    except ValueError as error:
        raise ConfigError(f"{path}:{error}") from None
    return Saved(tuple(found), {}, tree) if found else None


def verify(
    folder: Path, against: Sequence[Saved] = (), *, coordinator: str | None = None, weights: bool = True
) -> Findings:
    """All findings on the ledger of a run's folder. `coordinator` is the public key that the reader knows; without
    it, the key is the one that the ledger itself names, and `coordinator` of the findings is for the reader to know.

    Raises RunError when there is no ledger.
    """
    audit = Audit(key=coordinator)
    for line in read_lines(folder / FILE):
        take(audit, line)
    end(audit)
    for saved in against:
        _compare(audit, saved)
    if weights:
        _weights(audit, folder / WEIGHTS)
    return Findings(tuple(audit.problems), tuple(audit.notes), dict(audit.counts), audit.last, audit.key)


def _compare(audit: Audit, saved: Saved) -> None:
    """The first entry that differs from what was kept, as near as that tells."""
    for index in sorted(saved.hashes):
        if index not in audit.hashes and index >= audit.expected:
            audit.say(audit.expected, "it is gone: the copy goes on from here")
            return
        if audit.hashes.get(index) != saved.hashes[index]:
            audit.say(index, "it is another one than in the copy")
            return
    same = 0
    for head in sorted(saved.heads, key=lambda h: h.size):
        if head.coordinator != audit.key or not is_genuine(head):
            audit.say(None, f"the kept head ({head.short}) is not signed by this ledger's coordinator")
        elif head.run != audit.run:
            audit.say(None, f"the kept head is of run {head.run}, the ledger of {audit.run}")
        elif _comparable(audit, head) and audit.tree.root(head.size).hex() == head.root:
            same = head.size
        else:
            _differs(audit, head, same, _other(audit, head, same, saved.tree))
            return


def _comparable(audit: Audit, head: Head) -> bool:
    """So many entries are here, and in their places."""
    return head.size <= audit.tree.size and (audit.broken is None or audit.broken >= head.size)


def _other(audit: Audit, head: Head, same: int, kept: Tree) -> int | None:
    """The first entry of which the kept leaf is another, where there are leaves under the head's root: signed."""
    if kept.size < head.size or kept.root(head.size).hex() != head.root:
        return None
    leaves = kept.leaves(0, head.size)
    for index in range(same, min(head.size, audit.expected)):
        mine = audit.hashes.get(index)  # of a line that is none it was said already
        if mine is not None and leaf_hash(bytes.fromhex(mine)) != leaves[index * WIDTH : (index + 1) * WIDTH]:
            return index
    return None


def _differs(audit: Audit, head: Head, same: int, other: int | None) -> None:
    """The kept head is of no ledger that begins as this one does; both begin with the same entries, so many."""
    over = f"the kept head ({head.short}) was signed over"
    if other is not None:
        audit.say(other, f"forked: it is not what {over}{_about(audit, head)}")
    elif head.size > audit.tree.size:
        audit.say(audit.tree.size, f"it is gone: a head was signed over {head.size} entries")
    elif not _comparable(audit, head):
        audit.notes.append(Finding(audit.broken, "heads kept from here on could not be compared"))
    else:
        until = f" or one up to {head.size - 1}, as near as heads alone tell," if head.size - same > 1 else ""
        audit.say(same, f"forked: it{until} is not what {over}{_about(audit, head)}")


def _about(audit: Audit, head: Head) -> str:
    """What else a head says that is not as it is here."""
    said = f"; the coordinator signed both roots of size {head.size}" if head.size in audit.heads else ""
    mine = None if head.version is None else audit.versions.get(head.version)
    if mine is not None and head.digest is not None and mine[1].digest != head.digest:
        said += f"; version {head.version} is {mine[1].digest[:15]} here, {head.digest[:15]} there"
    return said


def _weights(audit: Audit, folder: Path) -> None:
    for number, (index, body) in audit.kept.items():
        if not PLAIN_NAME.fullmatch(body.file):
            audit.say(index, f"version {number} names a file outside its folder")
            continue
        try:
            found = blake3().update_mmap(folder / body.file).hexdigest()
        except FileNotFoundError:
            continue
        except OSError as error:
            audit.notes.append(Finding(index, f"the weights of version {number} cannot be read: {error.strerror}"))
            continue
        audit.counts["weights"] += 1
        if found != body.hash:
            audit.say(index, f"the weights of version {number} are not those of the ledger: {body.file} was altered")

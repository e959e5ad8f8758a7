"""The store's side of the ledger: nothing is trained from a base that the coordinator did not commit itself to.

The store keeps every head that it was shown, one file a run, and accepts a new one only with a proof that the chain
before it is the chain it saw. So a coordinator that rewrites history, or shows this store another one later, is
found here at once; one that shows two stores two histories from the start is found when their heads are compared
(`raypipe ledger verify RUN --against HEADS`), and then convicted by its own signatures.

Beside a head it keeps the hashes of the tree's leaves since the one before, where the proof brings them and the head's
root is theirs: with these the very entry is named at which two histories part. They are 32 bytes an entry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raypipe.errors import StoreError, StoreRefused, unwritten
from raypipe.ledger import heads
from raypipe.ledger.entries import Entry, Version, exact
from raypipe.ledger.heads import Head, cosign, head_from, is_genuine
from raypipe.ledger.keys import Key
from raypipe.ledger.tree import WIDTH, Tree, verify_consistency, verify_inclusion
from raypipe.security.files import sync_folder

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Witness:
    """One a store. Not for several threads at once.

    `coordinators` are the public keys that the store's policy allows; with none, the key of a run's first head is
    the one of that run from then on.
    """

    def __init__(self, folder: Path, key: Key, store: str, coordinators: Sequence[str] = ()) -> None:
        self.folder, self.store = folder, store
        self._key, self._allowed = key, frozenset(coordinators)
        self._kept: dict[str, dict[int, Head]] = {}  # run -> size -> head
        self._trees: dict[str, Tree] = {}  # run -> the leaves that were told, from the first on

    def size(self, run: str) -> int:
        """Of the last head this store co-signed; a base proof starts there. 0 for none."""
        return max(self._heads(run), default=0)

    def check(self, proof: Mapping[str, Any], *, run: str, version: int, digest: str) -> dict[str, Any]:
        """A co-signature of the proof's head (`Ledger.witness`), once the head is on this store's disk.

        `digest` is of the weights that this store was given as `version`. Raises StoreRefused saying what is wrong.
        """
        head, entry, inclusion, consistency, since, leaves = _read(proof)
        if head.run != run:
            raise StoreRefused(f"the base's proof is of run {head.run}, not of {run}")
        known = self._heads(run)
        self._check_key(head, known)
        self._check_history(head, known, since, consistency)
        self._check_base(head, entry, inclusion, version, digest)
        if head.size not in known:
            self._keep(head, since, self._told(head, since, leaves))
        return cosign(self._key, self.store, head)

    def _check_key(self, head: Head, known: Mapping[int, Head]) -> None:
        pinned = known[max(known)].coordinator if known else head.coordinator
        if self._allowed and head.coordinator not in self._allowed:
            raise StoreRefused(f"the store's policy does not name the coordinator key {head.coordinator[:16]}...")
        if head.coordinator != pinned:
            raise StoreRefused(
                f"the head is of coordinator key {head.coordinator[:16]}..., this run began with {pinned[:16]}..."
            )
        if not is_genuine(head):
            raise StoreRefused(f"the head ({head.short}) is not signed by the coordinator's key")

    def _check_history(self, head: Head, known: Mapping[int, Head], since: int, path: Sequence[bytes]) -> None:
        if not known:
            return
        seen = known.get(head.size)
        if seen is not None:
            if seen != head:
                raise StoreRefused(f"the history is forked: this store co-signed {seen.short}, now {head.short}")
            return
        last = known[max(known)]
        if head.size < last.size:
            raise StoreRefused(f"the history is rolled back: this store co-signed {last.short}, now {head.short}")
        if since != last.size:
            raise StoreRefused(f"the base's proof starts at size {since}; this store's last head is of {last.size}")
        old, new = bytes.fromhex(last.root), bytes.fromhex(head.root)
        if not verify_consistency(last.size, head.size, path, old, new):
            raise StoreRefused(f"the history is forked: {head.short} does not continue {last.short}, co-signed here")

    def _check_base(self, head: Head, entry: Entry, path: Sequence[bytes], version: int, digest: str) -> None:
        body = entry.typed()
        if not isinstance(body, Version) or body.version != version:
            raise StoreRefused(f"the base's proof is not of version {version}")
        if not verify_inclusion(entry.index, head.size, entry.hash, path, bytes.fromhex(head.root)):
            raise StoreRefused(f"version {version} is not on the chain of the head ({head.short})")
        if body.digest != digest:
            raise StoreRefused(
                f"other weights than the chain says: version {version} is {body.digest[:15]}, given {digest[:15]}"
            )

    def _told(self, head: Head, since: int, leaves: bytes) -> bytes:
        """The leaves, taken into the tree; nothing where they do not go on from what is known."""
        tree = self._trees[head.run]
        if not leaves or since != tree.size:
            return b""
        for place in range(0, len(leaves), WIDTH):
            tree.add(leaves[place : place + WIDTH])
        if tree.root().hex() != head.root:
            del self._kept[head.run], self._trees[head.run]  # read them again
            raise StoreRefused(f"the leaves that the base's proof brings are not those of its head ({head.short})")
        return leaves

    def _path(self, run: str) -> Path:
        if not NAME.fullmatch(run):
            raise StoreRefused("a run id holds letters, digits, '.', '_' and '-', at most 128")
        return self.folder / f"{run}.heads.jsonl"

    def _heads(self, run: str) -> dict[int, Head]:
        if run not in self._kept:
            path = self._path(run)
            try:
                self._kept[run], self._trees[run] = _load(path) if path.exists() else ({}, Tree())
            except OSError as error:
                raise StoreError(f"the store cannot read its heads: {error.strerror}") from None
        return self._kept[run]

    def _keep(self, head: Head, since: int, leaves: bytes) -> None:
        """On the disk before it is co-signed."""
        path = self._path(head.run)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write((heads.leaves_line(since, leaves) if leaves else b"") + heads.line_of(head))
                file.flush()
                os.fsync(file.fileno())
            if not self._kept[head.run]:
                sync_folder(self.folder)
        except OSError as error:
            del self._kept[head.run], self._trees[head.run]  # a line may be half there: read it again
            raise unwritten("the store cannot keep the head", error) from None
        self._kept[head.run][head.size] = head


def _load(path: Path) -> tuple[dict[int, Head], Tree]:
    """The heads kept, and the leaves; a last line that a crash cut was never co-signed, and is removed."""
    content = path.read_bytes()
    try:
        found, tree, whole = heads.read_kept(content)
    except ValueError:
        raise StoreRefused("the store's file of co-signed heads is damaged; see it on the store's machine") from None
    if whole != len(content):
        os.truncate(path, whole)
    return {head.size: head for head in found}, tree


def _read(proof: Mapping[str, Any]) -> tuple[Head, Entry, list[bytes], list[bytes], int, bytes]:
    """A message of the coordinator, which may hold anything."""
    try:
        inclusion, consistency = ([bytes.fromhex(step) for step in proof[k]] for k in ("inclusion", "consistency"))
        head, entry = head_from(proof["head"]), exact(Entry, proof["entry"])
        entry.typed()
        since, leaves = int(proof["since"]), bytes.fromhex(proof.get("leaves", ""))  # an older coordinator tells none
        if len(bytes.fromhex(head.root)) != WIDTH or head.size < 1:
            raise ValueError("a head has a root of 32 bytes")
        if leaves and len(leaves) != WIDTH * (head.size - since):
            raise ValueError("a leaf has a hash of 32 bytes")
        return head, entry, inclusion, consistency, since, leaves
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreRefused(f"no proof that the base is on the chain ({type(error).__name__})") from None

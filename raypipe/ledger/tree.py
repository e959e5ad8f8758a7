"""The Merkle tree of RFC 6962, 2.1 over entry hashes: what makes "nothing was rewritten" short to prove.

Kept in memory (64 bytes a leaf) and built anew at open: a file of hashes would be a second truth beside the ledger.
The root of all leaves so far takes one hash for each full subtree on the tree's right edge, at most log2 of them.
Our own, as the library for it (pymerkle) is GPL-3.0-or-later; tested against the RFC's definition and the vectors of
certificate transparency.
"""

from __future__ import annotations

from collections.abc import Sequence

from raypipe.ledger.offline import leaf_hash, node_hash, root_from

EMPTY = bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")  # sha256 of nothing
WIDTH = 32  # bytes a hash


class Tree:
    """Leaves are data of any length (here: 32-byte entry hashes); indices count from 0."""

    def __init__(self) -> None:
        self.size = 0
        self._levels = [bytearray()]  # level h: the hashes of the full subtrees of 2**h leaves, left to right

    def append(self, data: bytes) -> None:
        """One more leaf, and every subtree that it fills."""
        self.add(leaf_hash(data))

    def add(self, node: bytes) -> None:
        """The same, of a leaf whose hash is known."""
        height, place = 0, self.size
        self._levels[0] += node
        while place & 1:
            level, height, place = self._levels[height], height + 1, place >> 1
            node = node_hash(bytes(level[-2 * WIDTH : -WIDTH]), node)
            if height == len(self._levels):
                self._levels.append(bytearray())
            self._levels[height] += node
        self.size += 1

    def leaves(self, start: int, stop: int) -> bytes:
        """The hashes of these leaves, WIDTH bytes each."""
        return bytes(self._levels[0][start * WIDTH : stop * WIDTH])

    def root(self, size: int | None = None) -> bytes:
        """32 bytes: of the first `size` leaves, or of all. Raises ValueError when there are fewer."""
        size = self.size if size is None else size
        if not 0 <= size <= self.size:
            raise ValueError(f"no root of {size} leaves in a tree of {self.size}")
        return self._hash(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The audit path PATH(index, D[size]), from the leaf up. RFC 6962, 2.1.1."""
        if not 0 <= index < size <= self.size:
            raise ValueError(f"no leaf {index} in a tree of {size} of {self.size} leaves")
        path, start, stop = list[bytes](), 0, size
        while stop - start > 1:
            middle = _middle(start, stop)
            if index < middle:
                path.append(self._hash(middle, stop))
                stop = middle
            else:
                path.append(self._hash(start, middle))
                start = middle
        return path[::-1]

    def consistency(self, first: int, size: int) -> list[bytes]:
        """PROOF(first, D[size]): that the tree of `size` leaves begins with that of `first`. RFC 6962, 2.1.2."""
        if not 0 < first <= size <= self.size:
            raise ValueError(f"no proof from {first} to {size} leaves in a tree of {self.size}")
        path, start, stop = list[bytes](), 0, size
        while first != stop:
            middle = _middle(start, stop)
            if first <= middle:
                path.append(self._hash(middle, stop))
                stop = middle
            else:
                path.append(self._hash(start, middle))
                start = middle
        return [self._hash(start, stop), *path[::-1]] if start else path[::-1]

    def _hash(self, start: int, stop: int) -> bytes:
        """Of a subtree of the RFC's: its left part is full, and so on down its right edge."""
        parts = []
        while start < stop:
            height = (stop - start).bit_length() - 1
            place = (start >> height) * WIDTH
            parts.append(bytes(self._levels[height][place : place + WIDTH]))
            start += 1 << height
        found = parts.pop()
        while parts:
            found = node_hash(parts.pop(), found)
        return found


def verify_inclusion(index: int, size: int, data: bytes, path: Sequence[bytes], root: bytes) -> bool:
    """Whether `data` is leaf `index` of the tree of `size` leaves with this root. RFC 9162, 2.1.3.2."""
    return root_from(index, size, leaf_hash(data), path) == root


def verify_consistency(first: int, size: int, path: Sequence[bytes], old: bytes, new: bytes) -> bool:
    """Whether the tree of `size` leaves with root `new` begins with the one of `first` leaves and root `old`.

    RFC 9162, 2.1.4.2.
    """
    if first == size:
        return old == new and not path
    if not 0 < first < size or not path:
        return False
    steps = [old, *path] if first & (first - 1) == 0 else list(path)
    place, last = first - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    before = after = steps[0]
    for step in steps[1:]:
        if last == 0:
            return False
        if place & 1 or place == last:
            before, after = node_hash(step, before), node_hash(step, after)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            after = node_hash(after, step)
        place, last = place >> 1, last >> 1
    return last == 0 and before == old and after == new


def _middle(start: int, stop: int) -> int:
    """Where the RFC splits these leaves: the left part has the largest power of two that is less than all."""
    return start + (1 << (stop - start - 1).bit_length() - 1)

"""The ledger's tree, against RFC 6962's own words (2.1) and its reference data."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.ledger.offline import leaf_hash, node_hash
from raypipe.ledger.tree import Tree, verify_consistency, verify_inclusion


def rfc_root(data: list[bytes]) -> bytes:
    if not data:
        return sha256(b"").digest()
    if len(data) == 1:
        return leaf_hash(data[0])
    k = 1 << (len(data) - 1).bit_length() - 1
    return node_hash(rfc_root(data[:k]), rfc_root(data[k:]))


def rfc_path(m: int, data: list[bytes]) -> list[bytes]:
    if len(data) == 1:
        return []
    k = 1 << (len(data) - 1).bit_length() - 1
    if m < k:
        return [*rfc_path(m, data[:k]), rfc_root(data[k:])]
    return [*rfc_path(m - k, data[k:]), rfc_root(data[:k])]


def rfc_subproof(m: int, data: list[bytes], whole: bool) -> list[bytes]:
    if m == len(data):
        return [] if whole else [rfc_root(data)]
    k = 1 << (len(data) - 1).bit_length() - 1
    if m <= k:
        return [*rfc_subproof(m, data[:k], whole), rfc_root(data[k:])]
    return [*rfc_subproof(m - k, data[k:], False), rfc_root(data[:k])]


def test_roots_and_proofs_are_those_of_the_rfc() -> None:
    tree, data = Tree(), []
    assert tree.root() == rfc_root([])
    for size in range(1, 35):
        data.append(bytes([size]) * 3)
        tree.append(data[-1])
        root = tree.root()
        assert root == rfc_root(data)
        for other in range(size):
            path = tree.inclusion(other, size)
            assert path == rfc_path(other, data)
            assert verify_inclusion(other, size, data[other], path, root)
            assert not verify_inclusion(other, size, b"else", path, root)
            assert not verify_inclusion(other, size, data[other], [*path, root], root)
            assert not verify_inclusion(other, size, data[other], path[:-1], root) or not path
            assert not verify_inclusion(other, 2 * size, data[other], path, root)
            old, steps = tree.root(other + 1), tree.consistency(other + 1, size)
            assert steps == rfc_subproof(other + 1, data, True)
            assert verify_consistency(other + 1, size, steps, old, root)
            assert not verify_consistency(other + 1, size, steps, leaf_hash(b"else"), root)
            assert not verify_consistency(other + 1, size, steps, old, leaf_hash(b"else"))
            assert not verify_consistency(other + 1, size, [*steps, root], old, root)
            assert not verify_consistency(other + 1, 2 * size, steps, old, root)
            if steps:
                assert not verify_consistency(other + 1, size, steps[:-1], old, root)
                assert not verify_consistency(other + 1, size, [leaf_hash(b"else"), *steps[1:]], old, root)


# The reference data of Certificate Transparency's own Merkle tree tests.
CT_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
CT_INCLUSION = {  # leaf, size -> from the leaf up, by their first 8 digits
    (0, 1): "",
    (0, 8): "96a296d2 5f083f0a 6b47aaf2",
    (5, 8): "bc1a0643 ca854ea1 d37ee418",
    (2, 3): "fac54203",
    (1, 5): "6e340b9c 5f083f0a bc1a0643",
}
CT_CONSISTENCY = {  # of which size, in which size
    (1, 1): "",
    (1, 8): "96a296d2 5f083f0a 6b47aaf2",
    (6, 8): "0ebc5d34 ca854ea1 d37ee418",
    (2, 5): "5f083f0a bc1a0643",
}


def test_the_published_vectors_come_out() -> None:
    tree = Tree()
    for size, root in enumerate(CT_ROOTS):
        assert tree.root().hex() == root
        if size < len(CT_LEAVES):
            tree.append(bytes.fromhex(CT_LEAVES[size]))
    assert [tree.root(size).hex() for size in range(9)] == CT_ROOTS
    for (leaf, size), path in CT_INCLUSION.items():
        assert " ".join(step.hex()[:8] for step in tree.inclusion(leaf, size)) == path
    for (first, size), path in CT_CONSISTENCY.items():
        assert " ".join(step.hex()[:8] for step in tree.consistency(first, size)) == path


def test_the_rfcs_own_example_comes_out() -> None:
    """RFC 6962, 2.1.3: seven leaves, its letters."""
    data = [bytes([number]) for number in range(7)]
    tree = Tree()
    for one in data:
        tree.append(one)
    a, b, c, d, e, f, j = map(leaf_hash, data)
    g, h, i = node_hash(a, b), node_hash(c, d), node_hash(e, f)
    k, l = node_hash(g, h), node_hash(i, j)  # noqa: E741  # the RFC's letter
    assert tree.root() == node_hash(k, l)
    assert [tree.inclusion(leaf, 7) for leaf in (0, 3, 4, 6)] == [[b, h, l], [c, g, l], [f, j, k], [i, k]]
    assert [tree.consistency(first, 7) for first in (3, 4, 6)] == [[c, d, g, l], [l], [i, j, k]]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 1200), data=st.data())
def test_big_trees_are_those_of_the_rfc_at_every_earlier_size(size: int, data: st.DataObject) -> None:
    leaves = [number.to_bytes(2, "big") for number in range(size)]
    tree = Tree()
    for leaf in leaves:
        tree.append(leaf)
    then = data.draw(st.integers(1, size))
    index = data.draw(st.integers(0, then - 1))
    assert tree.root(then) == rfc_root(leaves[:then])
    assert tree.inclusion(index, then) == rfc_path(index, leaves[:then])
    assert tree.consistency(index + 1, then) == rfc_subproof(index + 1, leaves[:then], True)


def test_what_a_tree_does_not_have_is_refused() -> None:
    tree = Tree()
    tree.append(b"")
    for asked in (lambda: tree.root(2), lambda: tree.inclusion(0, 2), lambda: tree.consistency(0, 1)):
        with pytest.raises(ValueError, match=r"in a tree of .*1"):
            asked()


def test_a_tree_that_began_otherwise_has_no_proof() -> None:
    tree, other = Tree(), Tree()
    for number in range(20):
        tree.append(bytes([number]))
        other.append(bytes([number if number != 3 else 99]))
    assert not verify_consistency(8, 20, other.consistency(8, 20), tree.root(8), other.root())
    assert verify_consistency(3, 20, other.consistency(3, 20), tree.root(3), other.root())
    assert not verify_consistency(0, 20, [], tree.root(0), tree.root())

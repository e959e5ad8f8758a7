"""The ledger: what a run did, so that nobody can change the account of it unseen.

offline.py    what an auditor reads and runs alone: the hashing, the proofs, the statements that are signed
keys.py       Ed25519 key files, digests of big vectors
roster.py     which store may contribute, with which key
entries.py    the kinds of entries
heads.py      signed tree heads, and stores' signatures on them
tree.py       the Merkle tree of RFC 6962
lines.py      the file's lines, read
chain.py      the file: append, seal, prove a base version
follow.py     from the journal's records to entries
witness.py    at the store: is this base on the chain, and is it the chain seen before?
receipts.py   at the store: what left it
audit.py      one way through the file, every line judged
verify.py     everything a reader can check
prove.py      one store's update in one version, as one file
evidence.py   the run for an auditor, as one page
commands.py   `raypipe ledger ...` and `raypipe evidence`
"""

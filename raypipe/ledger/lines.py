"""The lines of a ledger file: entries and heads, each checked by itself.

What anyone may have written is held to its one canonical form. Whoever holds the hashes against a signed root
afterwards need not: the root is over the very bytes that were hashed (`quick`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from raypipe.errors import RunError
from raypipe.ledger import heads
from raypipe.ledger.entries import Body, Entry, line_of, plain, typed
from raypipe.ledger.heads import Head
from raypipe.ledger.offline import canonical, entry_hash

FILE = "ledger.jsonl"
Parsed: TypeAlias = tuple[Entry, Body, bytes] | Head  # an entry, its body and its hash; or a head
_ENTRY = re.compile(rb'\{"entry":(.*),"hash":"([0-9a-f]{64})"\}\n', re.DOTALL)
# A head, even with any one byte of it changed; where that byte became a line feed, its second half.
_HEAD = re.compile(rb'\{"head":|(?!\{"entry":).*"root":"[0-9a-f]{64}","run":')
_HALF = re.compile(rb'(?!\{"entry":|\{"head":).*"root":"[0-9a-f]{64}","run":')


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a ledger file: an entry, a head, or (`item` None) what is wrong with it."""

    start: int  # bytes
    end: int
    item: Entry | Head | None
    body: Body | None = None  # of an entry
    hash: bytes = b""  # of an entry
    problem: str = ""
    cut: bool = False  # the file ends inside it
    of_head: bool = False  # it was a head, as far as can be seen


def read_lines(path: Path, *, quick: bool = False) -> Iterator[Line]:
    """Every line, checked by itself: canonical JSON, the fields of its kind, an entry's hash.

    `quick` leaves out whether it is canonical JSON, which the root of a signed head answers.
    Raises RunError when there is no such file.
    """
    parse = _quick if quick else _parse
    try:
        with path.open("rb") as file:
            start, raw = 0, file.readline()
            while raw:
                following = file.readline()
                yield _line(start, raw, following, parse)
                start, raw = start + len(raw), following
    except OSError as error:
        raise RunError(f"the ledger {path} cannot be read: {error.strerror}") from None


def _line(start: int, raw: bytes, following: bytes, parse: Callable[[bytes], Parsed]) -> Line:
    end = start + len(raw)
    of_head = bool(_HEAD.match(raw) or (len(raw) <= len(b'{"head":') and _HALF.match(following)))
    if not raw.endswith(b"\n"):
        return Line(start, end, None, problem="the file ends inside its line", cut=True, of_head=of_head)
    try:
        found = parse(raw)
    except (ValueError, RecursionError) as error:
        return Line(start, end, None, problem=str(error).splitlines()[0], of_head=of_head)
    return Line(start, end, found) if isinstance(found, Head) else Line(start, end, *found)


def _parse(raw: bytes) -> Parsed:
    """Raises ValueError."""
    try:
        given = json.loads(raw)
    except ValueError:
        raise ValueError("its line is not JSON") from None
    if isinstance(given, dict) and given.keys() == {"head"}:
        head = typed(Head, given["head"])
        return head if heads.line_of(head) == raw else _differs(raw, given)
    if not isinstance(given, dict) or given.keys() != {"entry", "hash"}:
        raise ValueError("its line is neither an entry nor a head")
    entry = typed(Entry, given["entry"])
    body = entry.typed()
    written, found = line_of(replace(entry, body=plain(body)))
    return (entry, body, found) if written == raw else _differs(raw, given)


def _quick(raw: bytes) -> Parsed:
    """The same, but any JSON of an entry that has its hash will do; the rest goes the long way."""
    if (match := _ENTRY.fullmatch(raw)) is None:
        return _parse(raw)
    found = sha256(match[1]).digest()
    if found.hex().encode() != match[2]:
        return _parse(raw)
    entry = typed(Entry, json.loads(match[1]))
    return entry, entry.typed(), found


def _differs(raw: bytes, given: dict[str, Any]) -> Any:
    """Why a line is not as it would be written. Raises ValueError, always."""
    if canonical(given) + b"\n" != raw:
        raise ValueError("its line is not canonical JSON")
    if "hash" in given and entry_hash(given["entry"]).hex() != given["hash"]:
        raise ValueError("its content does not have its hash")
    raise ValueError("the fields are not exactly those of its kind")

"""One page for an auditor: who, what, when, by which policy, which versions; and what it takes to check it.

Plain HTML that prints, with no script and nothing to load. All of it is computed from the ledger alone, whose entries
are embedded in full (`<script type="application/json">`, which no browser runs).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from raypipe.ledger.entries import Entry, plain
from raypipe.ledger.heads import Head
from raypipe.ledger.keys import fingerprint
from raypipe.ledger.lines import FILE, read_lines
from raypipe.ledger.verify import Findings, Saved, verify

STYLE = """
body { font: 15px/1.45 Georgia, serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #111; }
h1, h2 { font-weight: normal; } h2 { margin-top: 2em; border-bottom: 1px solid #999; break-after: avoid; }
table { border-collapse: collapse; width: 100%; } tr { break-inside: avoid; }
th, td { text-align: left; vertical-align: top; padding: .2em .8em .2em 0; border-bottom: 1px solid #ddd; }
code, pre { font: 12px/1.4 monospace; overflow-wrap: anywhere; white-space: pre-wrap; }
.holds { border-left: 6px solid #2a7; padding-left: 1em; } .fails { border-left: 6px solid #c22; padding-left: 1em; }
@media print { body { margin: 0; max-width: none; } }
"""
LIMITS = (
    "The holder of the coordinator's key can write another ledger from the start; heads that stores or others kept show"
    " it, the ledger alone does not.",
    "A signature says which store sent which bytes, not that it trained honestly, nor on which images.",
    "That a key belongs to a store is the roster's word, or the first contact's.",
)


def evidence(folder: Path, *, at: float, against: Sequence[Saved] = ()) -> str:
    """The page, for a run's folder; `at` is when it is made (seconds since the epoch). Raises RunError: no ledger."""
    return page(folder, verify(folder, against), at=at)


def page(folder: Path, findings: Findings, *, at: float) -> str:
    """The same, of a ledger that was verified already."""
    lines = list(read_lines(folder / FILE))
    chain = [line.item for line in lines if isinstance(line.item, Entry)]
    heads = [line.item for line in lines if isinstance(line.item, Head)]
    runs = _bodies(chain, "run")
    run = str(runs[0][1]["run"]) if runs else "unknown"
    parts = [
        f"<h1>Evidence of run <code>{escape(run)}</code></h1>",
        f"<p>Made {_time(at)} from the run's ledger: {len(chain)} entries, {len(heads)} signed heads"
        f"{_span(chain)}.</p>",
        _verdict(findings),
        _who(chain),
        _what(chain),
        _policy(runs),
        _versions(chain),
        _refusals(chain),
        _last_head(chain, findings.head),
        _how(run, findings),
        _embedded(chain, heads),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Evidence of run {escape(run)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _verdict(findings: Findings) -> str:
    rows = [f"<li>{escape(str(one))}</li>" for one in (*findings.problems, *findings.notes)]
    listed = f"<ul>{''.join(rows)}</ul>" if rows else ""
    kind = "holds" if findings.ok else "fails"
    return f'<h2>Verdict</h2><div class="{kind}"><p>{escape(findings.summary())}.</p>{listed}</div>'


def _who(chain: Sequence[Entry]) -> str:
    rows: list[list[object]] = [
        [_time(e.at), "coordinator", e.body["coordinator"], f"epoch {e.body['epoch']}"]
        for e in chain
        if e.kind == "run"
    ]
    rows += [[_time(e.at), e.body["store"], e.body["key"], "enrolled"] for e in chain if e.kind == "store"]
    rows += [
        [_time(e.at), e.body["store"], e.body["key"], f"revoked: {e.body['reason']}"]
        for e in chain
        if e.kind == "revoked"
    ]
    table = [[when, who, _key(str(key)) if key else "none: unsigned", said] for when, who, key, said in rows]
    return "<h2>Who</h2>" + _table(("when", "who", "public key (Ed25519) and fingerprint", ""), table, code=(2,))


def _what(chain: Sequence[Entry]) -> str:
    rows: list[list[object]] = []
    for _, body in _bodies(chain, "store"):
        limits = ", ".join(f"{name} {value:g}" for name, value in sorted(body["limits"].items())) or "none"
        for name in sorted(body["data_hashes"].keys() | body["counts"].keys()) or [""]:
            counts = ", ".join(f"{number} {split}" for split, number in body["counts"].get(name, {}).items())
            rows.append([body["store"], name, counts, body["data_hashes"].get(name, ""), limits])
    heading = "<h2>What was trained on</h2><p>As each store's card said when it was enrolled.</p>"
    return heading + _table(("store", "data set", "images", "content hash", "store's limits"), rows, code=(3,))


def _policy(runs: Sequence[tuple[Entry, dict[str, Any]]]) -> str:
    parts = ["<h2>By which policy</h2>"]
    for entry, body in runs:
        parts.append(
            f"<p>{_time(entry.at)}, epoch {body['epoch']}: configuration <code>{escape(body['config_hash'])}</code>,"
            f" code <code>{escape(body['code_hash'])}</code></p>"
        )
        if body["config"] is not None:
            parts.append(f"<pre>{escape(json.dumps(body['config'], indent=1, sort_keys=True))}</pre>")
    return "".join(parts)


def _versions(chain: Sequence[Entry]) -> str:
    files = {body["version"]: f"{body['file']} {body['hash']}" for _, body in _bodies(chain, "kept")}
    rows: dict[int, list[object]] = {}  # by the version's entry
    standing: dict[int, int] = {}
    updates: list[dict[str, Any]] = []
    for entry in chain:
        body = entry.body
        if entry.kind == "update":
            updates.append(body)
        elif entry.kind == "version":
            number = standing[body["version"]] = entry.index
            rows[number] = [body["version"], _time(entry.at), _shares(updates) or "none", body["digest"]]
            updates = []
        elif entry.kind == "withdrawn" and body["version"] in standing:
            rows[standing.pop(body["version"])].append(f"withdrawn: {body['reason']}")
    for version, index in standing.items():
        rows[index].append(files.get(version, ""))
    names = ("version", "when", "contributors and shares", "digest of the weights", "file and its blake3")
    return "<h2>Versions</h2>" + _table(names, rows.values(), code=(3, 4))


def _shares(updates: Sequence[dict[str, Any]]) -> str:
    total = sum(u["weight"] for u in updates) or 1.0
    return "; ".join(
        f"{u['store']} {u['weight'] / total:.1%} (base {u['base']}, {u['steps']} steps, {u['examples']} images"
        + (")" if u["signature"] else ", unsigned)")
        for u in updates
    )


def _refusals(chain: Sequence[Entry]) -> str:
    rows: list[list[object]] = [
        [_time(e.at), b["store"], b["ticket"], b["reason"]] for e, b in _bodies(chain, "refused")
    ]
    ends = [
        f"<p>{_time(e.at)}: the run ended ({escape(b['reason'])}), {b['versions']} versions.</p>"
        for e, b in _bodies(chain, "finished")
    ]
    table = _table(("when", "store", "ticket", "why"), rows) if rows else "<p>None.</p>"
    return f"<h2>Updates that were refused</h2>{table}{''.join(ends)}"


def _last_head(chain: Sequence[Entry], head: Head | None) -> str:
    if head is None:
        return "<h2>The last signed head</h2><p>None.</p>"
    seen = [body for _, body in _bodies(chain, "witnessed")]
    last = max((body["size"] for body in seen), default=None)
    rows: list[list[object]] = [
        [body["size"], store, signature]
        for body in seen
        if body["size"] == last
        for store, signature in sorted(body["cosignatures"].items())
    ]
    table = _table(("of size", "store", "co-signature"), rows, code=(2,)) if rows else "<p>No store co-signed yet.</p>"
    return (
        f"<h2>The last signed head</h2><p>Root of {head.size} entries, {_time(head.at)}.</p>"
        f"<pre>{escape(json.dumps(plain(head), indent=1, sort_keys=True))}</pre>"
        f"<p>The newest head that stores co-signed:</p>{table}"
    )


def _how(run: str, findings: Findings) -> str:
    listed = "".join(f"<li>{escape(line)}</li>" for line in LIMITS)
    key = f" Its coordinator's key: {_key(findings.coordinator)}." if findings.coordinator else ""
    return (
        f"<h2>How to check it</h2><p>With the run's folder: <code>raypipe ledger verify {escape(run)}</code>; with"
        " heads that a store or you kept, <code>--against FILE</code>. One store's part, without raypipe:"
        f" <code>raypipe ledger prove {escape(run)} VERSION STORE</code>, then <code>offline.py</code> with the"
        f" coordinator's key from another source than this page.{escape(key)}</p>"
        f"<p>What this cannot prove:</p><ul>{listed}</ul>"
    )


def _embedded(chain: Sequence[Entry], heads: Sequence[Head]) -> str:
    whole = {"entries": [plain(e) for e in chain], "heads": [plain(h) for h in heads]}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="ledger">{text}</script>'


def _table(names: Sequence[str], rows: Iterable[Sequence[object]], code: Sequence[int] = ()) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><code>{escape(str(cell))}</code></td>" if place in code else f"<td>{escape(str(cell))}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bodies(chain: Sequence[Entry], kind: str) -> list[tuple[Entry, dict[str, Any]]]:
    return [(entry, entry.body) for entry in chain if entry.kind == kind]


def _span(chain: Sequence[Entry]) -> str:
    return f", {_time(chain[0].at)} to {_time(chain[-1].at)}" if chain else ""


def _key(key: str) -> str:
    try:
        return f"{key} ({fingerprint(key)})"
    except ValueError:
        return f"{key} (no key)"


def _time(at: float) -> str:
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{at} s"

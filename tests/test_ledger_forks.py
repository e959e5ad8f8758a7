"""A coordinator that tells two stories is found by what stores and others have kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledgers import RUN, Federation, ask, federation, goes_on, heavier, lines_of, named, rewritten, weights

from raypipe.coordinator.notary import MOST as MOST_HEADS
from raypipe.errors import ConfigError, RunError, StoreRefused
from raypipe.ledger import entries, heads
from raypipe.ledger.audit import Finding
from raypipe.ledger.chain import JOIN_LEAVES, MOST_LEAVES, Ledger
from raypipe.ledger.entries import Body, Entry
from raypipe.ledger.heads import signed_head
from raypipe.ledger.lines import FILE
from raypipe.ledger.tree import Tree
from raypipe.ledger.verify import Saved, read_saved, verify
from raypipe.ledger.witness import Witness
from raypipe.store.messages import Ticket, encode
from raypipe.vault.frames import MAX_FRAME


@pytest.fixture
def made(tmp_path: Path) -> Federation:
    return federation(tmp_path)


@pytest.fixture
def going_on(tmp_path: Path) -> Federation:
    return goes_on(federation(tmp_path))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, list[bytes]]:
    """One ledger, and its lines as they were."""
    found = federation(tmp_path_factory.mktemp("many"), versions=5)
    return found, found.read()


def test_a_fork_under_the_coordinators_own_key_is_found_by_heads_that_stores_kept(
    made: Federation, tmp_path: Path
) -> None:
    forged = rewritten(made, heavier, tmp_path / "forged")
    assert forged.verify().ok  # by itself it holds: nobody else's word is in it
    kept = read_saved(made.heads_of("south"))
    findings = forged.verify(kept)
    assert "forked: it is not what the kept head" in lines_of(findings)
    ours, theirs = ([json.loads(line)["entry"] for line in it.read() if b'{"entry"' in line] for it in (made, forged))
    differs = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other)
    assert named(findings) == differs
    findings = forged.verify(replace(kept, tree=Tree()))
    assert "forked: it or one up to" in lines_of(findings)
    assert named(findings) == max(head.size for head in kept.heads if head.size <= differs)


Tale = list[tuple[Body, float]]  # a ledger's entries: what is said, and when
FORKS: dict[str, Callable[[Tale, int], Tale]] = {
    "changed": lambda tale, i: [*tale[:i], (tale[i][0], tale[i][1] + 0.5), *tale[i + 1 :]],
    "left out": lambda tale, i: [*tale[:i], *tale[i + 1 :]],
    "moved": lambda tale, i: [*tale[:i], *tale[i + 1 : i + 2], tale[i], *tale[i + 2 :]],
    "put in": lambda tale, i: [*tale[:i], (entries.Refused("north", "never", "late"), 7.0), *tale[i:]],
    "cut off": lambda tale, i: tale[:i],
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_fork_at_any_entry_is_found_and_its_entry_named(
    many: tuple[Federation, list[bytes]], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Signed anew with the coordinator's own key: by itself it may hold, against what others kept it never does."""
    made, lines = many
    made.write(lines)
    said = [Entry(**one["entry"]) for one in map(json.loads, lines) if "entry" in one]
    kept, copy = read_saved(made.heads_of("south")), read_saved(made.run_folder / FILE)
    seen = max(head.size for head in kept.heads)
    kind, first = data.draw(st.sampled_from(sorted(FORKS))), data.draw(st.integers(1, seen - 2))
    forged = Ledger(tmp_path_factory.mktemp("fork"), made.key, RUN)
    for body, at in FORKS[kind]([(entry.typed(), entry.at) for entry in said], first):
        forged.append(body, at=at)
    forged.seal(at=9000.0)
    forged.close()
    folder = forged.path.parent
    for witness in (kept, copy):
        assert shown(folder, witness)[0].entry == first, kind
    (one,) = shown(folder, replace(kept, tree=Tree()))
    assert one.entry is not None
    assert one.entry <= first
    if "up to" in one.line:
        assert first <= int(one.line.partition("up to ")[2].partition(",")[0])
    else:
        assert one.entry == first


def shown(folder: Path, witness: Saved) -> list[Finding]:
    """What is found by what was kept, and not by the ledger itself."""
    alone = verify(folder).problems
    return [one for one in verify(folder, [witness]).problems if one not in alone]


def test_leaves_that_are_not_those_of_the_head_are_refused_and_no_liar_frames_the_coordinator(
    going_on: Federation, tmp_path: Path
) -> None:
    proof = going_on.ledger.base_proof(4, going_on.witnesses["north"].size(RUN))
    for wrong in (proof["leaves"][64:] + proof["leaves"][:64], "00" * 32 * (len(proof["leaves"]) // 64)):
        with pytest.raises(StoreRefused, match="the leaves that the base's proof brings are not those of its head"):
            ask(going_on, "north", 4, leaves=wrong)
    with pytest.raises(StoreRefused, match="no proof"):
        ask(going_on, "north", 4, leaves=proof["leaves"][64:])
    before = going_on.heads_of("north").read_bytes()
    ask(going_on, "north", 4)
    assert going_on.heads_of("north").read_bytes().startswith(before), "what was refused left nothing"
    path = tmp_path / "liar"
    lines = going_on.heads_of("north").read_bytes().splitlines(keepends=True)
    told = json.loads(lines[0])
    path.write_bytes(heads.leaves_line(0, bytes(len(told["leaves"]) // 2)) + b"".join(lines[1:]))
    assert going_on.verify(read_saved(path)).ok, "leaves that no signed root is of say nothing"
    going_on.ledger.close()
    forged = rewritten(going_on, heavier, tmp_path / "forged")
    assert "forked: it or one up to" in lines_of(forged.verify(read_saved(path)))
    assert "forked: it is not what" in lines_of(forged.verify(read_saved(going_on.heads_of("north"))))


def test_the_leaves_of_all_proofs_fit_into_a_vaults_frame(tmp_path: Path) -> None:
    made = Federation(tmp_path)
    made.begin()
    for number in range(1000, 1000 + 3 * JOIN_LEAVES):
        made.say(entries.Refused("north", str(number), "late"))
    size = made.ledger.seal(at=made.at).size
    assert made.ledger.base_proof(0)["leaves"] == made.ledger.base_proof(0, size - MOST_LEAVES - 1)["leaves"] == ""
    proofs = [made.ledger.base_proof(0, size - MOST_LEAVES)] * MOST_HEADS
    first = {**made.ledger.base_proof(0), "leaves": "0" * 64 * JOIN_LEAVES}
    ticket = Ticket("t", "north", 1, 0, 0, (0.0, 0.0), base=(first, *proofs))
    assert len(encode(ticket)) + 250_000 < MAX_FRAME


def test_a_store_that_was_told_no_leaves_keeps_heads_alone(going_on: Federation) -> None:
    """An older coordinator; or one that had more to tell than goes into a ticket."""
    ask(going_on, "north", 4, leaves="")
    going_on.ledger.seal(at=1.0)
    going_on.publish(5)
    kept = read_saved(going_on.heads_of("north"))
    assert kept.tree.size < kept.heads[-2].size
    again = Witness(going_on.heads_of("north").parent, going_on.keys["north"], "north")
    assert again.size(RUN) == kept.heads[-1].size
    assert going_on.verify(kept).ok
    path = going_on.heads_of("north")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]) + b"{}\n")
    with pytest.raises(ConfigError, match=r"heads.jsonl:4: neither a head nor leaves"):
        read_saved(path)


def test_a_copy_of_the_ledger_names_the_forked_entry(made: Federation, tmp_path: Path) -> None:
    same = rewritten(made, lambda entry: None, tmp_path / "same")
    forged = rewritten(made, heavier, tmp_path / "forged")
    copy = read_saved(same.run_folder / FILE)
    assert same.verify(copy).ok
    findings = forged.verify(copy)
    assert named(findings) == forged.index_of(b'"ticket":"north-2"')
    assert "it is another one than in the copy" in lines_of(findings)
    longer = read_saved(same.run_folder / FILE)
    same.write(same.read()[:5])
    assert named(same.verify(longer)) == 4


def test_a_ledger_cut_off_after_a_head_is_found_by_a_kept_head(made: Federation) -> None:
    lines = made.read()
    first = next(i for i, line in enumerate(lines) if line.startswith(b'{"head"'))
    made.write(lines[: first + 1])
    assert made.verify().ok
    findings = made.verify(read_saved(made.heads_of("north")))
    assert named(findings) == json.loads(lines[first])["head"]["size"]
    assert "it is gone: a head was signed over" in lines_of(findings)


def test_two_heads_of_one_size_convict_the_coordinator(made: Federation, tmp_path: Path) -> None:
    same = rewritten(made, lambda entry: None, tmp_path / "same")
    head = rewritten(made, heavier, tmp_path / "forged").verify().head
    assert head is not None
    assert "the coordinator signed both roots of size" in lines_of(same.verify(Saved((head,))))
    stranger = signed_head(made.keys["north"], replace(head, coordinator=made.keys["north"].public))
    assert "is not signed by this ledger's coordinator" in lines_of(same.verify(Saved((stranger,))))


def test_weights_that_were_altered_are_named_and_those_not_kept_are_not(made: Federation) -> None:
    folder = made.run_folder / "versions"
    (folder / "v00001.safetensors").unlink()
    (folder / "v00002.safetensors").write_bytes(weights(7).tobytes())
    findings = made.verify()
    assert named(findings) == made.index_of(b'"file":"v00002.safetensors"')
    assert "the weights of version 2 are not those of the ledger" in lines_of(findings)
    assert findings.counts["weights"] == 3
    assert verify(made.run_folder, weights=False).ok


def test_a_file_that_holds_no_heads_is_no_witness(tmp_path: Path, made: Federation) -> None:
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(ConfigError, match="other:1: its line is not JSON"):
        read_saved(tmp_path / "other")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="holds no signed head"):
        read_saved(tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_saved(tmp_path / "nowhere")
    with pytest.raises(RunError, match="cannot be read"):
        verify(tmp_path)

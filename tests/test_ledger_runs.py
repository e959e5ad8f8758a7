"""Real runs that keep a ledger: what they write holds, and whoever lies in one is found. No Ray, real sites."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_shell import NAMES, SitePort, config, records, run

from raypipe.cli import main
from raypipe.coordinator.composition import Composition
from raypipe.data.sample import load_sample
from raypipe.data.stores import make_stores
from raypipe.errors import ConfigError, StoreRefused, StoreUnreachable
from raypipe.ledger import entries
from raypipe.ledger.chain import Ledger
from raypipe.ledger.evidence import LIMITS
from raypipe.ledger.keys import digest, load_key, load_or_make_key
from raypipe.ledger.lines import FILE
from raypipe.ledger.receipts import Sum, read_receipts
from raypipe.ledger.roster import change_roster, enroll, load_roster, revoke
from raypipe.ledger.verify import verify
from raypipe.store import messages as msg
from raypipe.store.site import Site

SHORT = {"local_steps": 1, "batch_size": 8}
VERSIONS = 3


def make(folder: Path) -> Path:
    split = {"name": "iid"}
    make_stores(folder, NAMES, source=load_sample(), split=split, size_ratio=2.0, camera_shift=0.0, max_images=60)
    return folder


def said(**changes: Any) -> dict[str, Any]:
    small = {"name": "small_cnn", "width": 8, "hidden": 8}
    asked = {"train": SHORT, "model": small, "stop": {"max_versions": VERSIONS}, "track": {"mlflow": False}}
    return config(**{**asked, **changes})


def roster_file(home: Path) -> Path:
    return home / "demo" / "shell" / "roster.json"


def folder(home: Path) -> Path:
    return home / "runs" / "run"


def heads(stores: Path, name: str) -> Path:
    return stores / name / "heads" / "run.heads.jsonl"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calm run: its home, with the stores in it."""
    home = tmp_path_factory.mktemp("ran")
    make(home / "stores")
    run(said(), home, {name: SitePort(home / "stores" / name) for name in NAMES})
    return home


@pytest.fixture
def stores(tmp_path: Path) -> Path:
    return make(tmp_path / "stores")


class Printed:
    """The command line on a home: the exit code, and the lines that were printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, home: Path, *arguments: str) -> tuple[int, str]:
        self._monkeypatch.setenv("RAYPIPE_HOME", str(home))
        code = main(arguments)
        captured = self._capsys.readouterr()
        return code, captured.out + captured.err


@pytest.fixture
def raypipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Printed:
    return Printed(capsys, monkeypatch)


# -- an honest run ------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_ledger_that_holds_with_every_update_signed(ran: Path, raypipe: Printed) -> None:
    public = load_key(ran / "keys" / "coordinator.pem").public
    kept = [part for name in NAMES for part in ("--against", str(heads(ran / "stores", name)))]
    code, printed = raypipe(ran, "ledger", "verify", "last", "--coordinator-key", public, *kept)
    assert code == 0, printed
    findings = verify(folder(ran))
    assert findings.ok
    assert findings.notes == (), "nothing unsigned, nothing unsealed"
    tickets = 3 * VERSIONS
    wanted = {"run": 1, "store": 3, "update": tickets, "version": VERSIONS + 1, "cosignatures": tickets}
    assert {kind: findings.counts[kind] for kind in wanted} == wanted
    assert findings.counts["weights"] >= VERSIONS, "the last version's follows the last head"
    assert findings.head is not None
    assert findings.head.digest == records(ran, "version_published")[-1]["hash"]


def test_a_contribution_is_proven_to_somebody_without_raypipe(ran: Path, tmp_path: Path, raypipe: Printed) -> None:
    path = tmp_path / "proof.json"
    code, printed = raypipe(ran, "ledger", "prove", "run", "2", "b", "--out", str(path))
    assert code == 0, printed
    keys = [load_key(place).public for place in (ran / "keys/coordinator.pem", ran / "stores/b/keys/store.pem")]
    command = [sys.executable, "-I", str(ROOT / "raypipe/ledger/offline.py"), str(path), "--coordinator-key", keys[0]]
    alone = subprocess.run([*command, "--store-key", keys[1]], cwd="/", capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stdout
    assert "an update signed by store b" in alone.stdout
    assert "co-signed by" in alone.stdout
    proof = json.loads(path.read_text())
    (update,) = [part["entry"]["body"] for part in proof["entries"] if part["entry"]["kind"] == "update"]
    update["examples"] += 1
    path.write_text(json.dumps(proof))
    assert subprocess.run(command, cwd="/", capture_output=True, check=False).returncode == 1


def test_evidence_is_one_page_of_the_run(ran: Path, tmp_path: Path, raypipe: Printed) -> None:
    assert raypipe(ran, "evidence", "run", "--out", str(tmp_path / "page.html"))[0] == 0
    page = (tmp_path / "page.html").read_text()
    for name in NAMES:
        assert load_key(ran / "stores" / name / "keys" / "store.pem").public in page
    assert records(ran, "version_published")[-1]["hash"] in page


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_that_left_a_store_has_a_receipt(name: str, ran: Path) -> None:
    egress = read_receipts(ran / "stores" / name / "egress" / "run")
    assert egress.problems == ()
    mine = [c for v in records(ran, "version_published") for c in v["contributions"] if c["store"] == name]
    assert egress.kinds["update"] == Sum(VERSIONS, sum(c["bytes_up"] for c in mine))
    assert {kind: total.messages for kind, total in egress.kinds.items()} == {
        "card": 1, "report": VERSIONS, "update": VERSIONS, "evaluation": 1,
    }  # fmt: skip
    receipts = [json.loads(line)["receipt"] for file in sorted((ran / "stores" / name / "egress" / "run").iterdir())
                for line in file.read_text().splitlines()]  # fmt: skip
    left = {(r["ticket"], r["digest"]) for r in receipts if r["kind"] == "update"}
    assert left == {(c["ticket"], c["digest"]) for c in mine}


def test_keys_are_made_where_they_are_used_and_are_their_owners_alone(ran: Path) -> None:
    for key in (ran / "keys" / "coordinator.pem", *(ran / "stores" / name / "keys" / "store.pem" for name in NAMES)):
        assert key.stat().st_mode & 0o777 == 0o600
        assert key.parent.stat().st_mode & 0o777 == 0o700
    public = {name: load_key(ran / "stores" / name / "keys" / "store.pem").public for name in NAMES}
    assert {r["store"]: r["key"] for r in records(ran, "store_joined")} == public
    assert {e.store: e.key for e in load_roster(roster_file(ran)).enrolments} == public


def test_an_encoded_update_is_signed_as_it_leaves(stores: Path, tmp_path: Path) -> None:
    run(said(update=["bfloat16"]), tmp_path, {name: SitePort(stores / name) for name in NAMES})
    assert verify(folder(tmp_path)).ok
    assert len(records(tmp_path, "version_published")[-1]["contributions"]) == 3


def test_a_run_without_a_ledger_leaves_none(stores: Path, tmp_path: Path) -> None:
    run(said(ledger={"keep": False}), tmp_path, {name: SitePort(stores / name) for name in NAMES})
    assert not (folder(tmp_path) / FILE).exists()
    assert not (tmp_path / "keys").exists()
    assert {c["signature"] for v in records(tmp_path, "version_published") for c in v["contributions"]} == {None}


# -- a ledger that somebody changed -------------------------------------------------------------------------------


Change = Callable[[list[bytes]], tuple[list[bytes], int]]  # lines -> lines, and the first entry that was touched


def places(lines: list[bytes]) -> list[int]:
    """The lines that are entries; entry i is at places[i]."""
    return [number for number, line in enumerate(lines) if line.startswith(b'{"entry"')]


def flipped(lines: list[bytes]) -> tuple[list[bytes], int]:
    at = next(i for i, line in enumerate(lines) if b'"kind":"update"' in line)
    lines[at] = lines[at].replace(b'"examples":8', b'"examples":9')
    return lines, places(lines).index(at)


def dropped(lines: list[bytes]) -> tuple[list[bytes], int]:
    entry = len(places(lines)) // 2
    del lines[places(lines)[entry]]
    return lines, entry


def swapped(lines: list[bytes]) -> tuple[list[bytes], int]:
    """Two updates of one version, which lie side by side."""
    at = next(i for i, line in enumerate(lines) if b'"kind":"update"' in line)
    lines[at], lines[at + 1] = lines[at + 1], lines[at]
    return lines, places(lines).index(at)


@pytest.mark.parametrize("change", [flipped, dropped, swapped])
def test_a_changed_entry_of_a_run_is_found_and_named(
    change: Change, ran: Path, tmp_path: Path, raypipe: Printed
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    lines, entry = change((folder(ran) / FILE).read_bytes().splitlines(keepends=True))
    (copy / FILE).write_bytes(b"".join(lines))
    code, printed = raypipe(ran, "ledger", "verify", str(copy))
    assert code == 1
    assert printed.startswith(f"WRONG: entry {entry}: "), printed


def test_a_history_rewritten_with_the_coordinators_own_key_is_found_by_a_stores_heads(
    ran: Path, tmp_path: Path, raypipe: Printed
) -> None:
    """The holder of the key leaves one store's update out of version 1, and signs all of it anew."""
    key, copy = load_key(ran / "keys" / "coordinator.pem"), tmp_path / "copy"
    forged = Ledger(copy, key, "run")
    first = None
    for line in (folder(ran) / FILE).read_bytes().splitlines():
        if (entry := json.loads(line).get("entry")) is None:
            forged.seal(at=1.0)
            continue
        body = entries.typed(entries.KINDS[entry["kind"]], entry["body"])
        if isinstance(body, entries.Update) and body.version == 1 and body.store == "b":
            first = entry["index"]
            continue
        if isinstance(body, entries.Version) and body.version == 1:
            body = replace(body, updates=2)
        if not isinstance(body, entries.Witnessed):
            forged.append(body, at=entry["at"])
    forged.close()
    assert raypipe(ran, "ledger", "verify", str(copy))[0] == 0, "by itself it cannot be told from the true one"
    code, printed = raypipe(ran, "ledger", "verify", str(copy), "--against", str(heads(ran / "stores", "c")))
    assert code == 1
    assert "forked" in printed
    named = int(printed.partition("WRONG: entry ")[2].partition(":")[0])
    assert first is not None
    assert named <= first


# -- who lies in a run --------------------------------------------------------------------------------------------


class OtherWeights(SitePort):
    """A coordinator that hands this store another model than it published."""

    async def train(self, ticket: msg.Ticket, plan: bytes, weights: np.ndarray, *how: Any) -> msg.Report:
        other = weights.copy()
        other[3] += 1e-3
        return await super().train(ticket, plan, other, *how)


def test_a_store_that_is_handed_another_model_does_not_train_on_it(stores: Path, tmp_path: Path) -> None:
    ports = {name: (OtherWeights if name == "b" else SitePort)(stores / name) for name in NAMES}
    made = run(said(), tmp_path, ports)
    failed = records(tmp_path, "ticket_failed")
    assert {r["store"] for r in failed} == {"b"}
    assert "other weights than the chain says: version 0 is b3:" in failed[0]["reason"]
    assert {c["store"] for v in records(tmp_path, "version_published") for c in v["contributions"]} == {"a", "c"}
    assert "report" not in read_receipts(stores / "b" / "egress" / "run").kinds
    assert made.machine.version == VERSIONS
    assert verify(folder(tmp_path)).ok


class TwoFaced:
    """A coordinator, its key, and a ledger for each store that it wants to tell another story."""

    def __init__(self, home: Path, site: Site, weights: np.ndarray, plan: msg.Plan) -> None:
        self.ledger = Ledger(home, load_or_make_key(home.parent / "coordinator.pem"), "run")
        self.site, self.plan = site, plan
        self.ledger.append(entries.Run("run", 1, self.ledger.coordinator, "", "", None), at=0.0)
        self.publish(0, weights)

    def publish(self, version: int, weights: np.ndarray) -> None:
        before = self.ledger.version(version - 1)
        parent = None if before is None else version - 1
        named = None if before is None else before.digest
        self.ledger.append(entries.Version(version, parent, named, digest(weights), 0), at=float(version))
        self.ledger.seal(at=float(version))

    def train(self, version: int, weights: np.ndarray, **changes: Any) -> msg.Report:
        size = self.site.describe("run").head_size
        ticket = msg.Ticket(
            id=f"t{version}", store=self.site.store, epoch=1, version=version, seed=0, progress=(0.0, 0.1),
            max_steps=1, base=(self.ledger.base_proof(version, min(size, self.ledger.last.size)),),
        )  # fmt: skip
        return self.site.train(replace(ticket, **changes), self.plan, weights)


@pytest.fixture
def faces(stores: Path, tmp_path: Path) -> tuple[TwoFaced, TwoFaced, np.ndarray]:
    from raypipe.compose import compose

    made = compose(said(ledger={"keep": False}), "plan", home=str(tmp_path / "plan"), put=lambda vector: vector)
    weights, plan = made.shell.publisher.model.vector.copy(), replace(made.plan, run="run")
    one, other = (TwoFaced(tmp_path / f"told-{n}", Site(stores / n), weights, plan) for n in ("a", "b"))
    return one, other, weights


def test_different_models_for_different_stores_are_found_when_their_heads_meet(
    faces: tuple[TwoFaced, TwoFaced, np.ndarray], stores: Path, tmp_path: Path, raypipe: Printed
) -> None:
    one, other, weights = faces
    poisoned = weights + np.float32(1e-3)
    one.publish(1, weights * 2)
    other.publish(1, poisoned)
    one.train(1, weights * 2)  # each sees a chain that is whole
    other.train(1, poisoned)
    assert raypipe(tmp_path, "ledger", "verify", str(tmp_path / "told-a"))[0] == 0
    code, printed = raypipe(
        tmp_path, "ledger", "verify", str(tmp_path / "told-a"), "--against", str(heads(stores, "b"))
    )
    assert code == 1
    assert "the coordinator signed both roots" in printed


def test_a_store_finds_a_history_that_changes_under_it(faces: tuple[TwoFaced, TwoFaced, np.ndarray]) -> None:
    one, other, weights = faces
    one.publish(1, weights * 2)
    one.train(1, weights * 2)
    other.publish(1, weights * 3)
    other.publish(2, weights * 4)
    other.site = one.site  # now the first store is told the second story
    with pytest.raises(StoreRefused, match="forked"):
        other.train(2, weights * 4, store="a")


def test_a_run_that_began_with_a_ledger_goes_on_with_it(faces: tuple[TwoFaced, TwoFaced, np.ndarray]) -> None:
    one, _, weights = faces
    one.train(0, weights)
    with pytest.raises(StoreRefused, match="brings no proof"):
        one.train(0, weights, id="again", base=())


def test_a_store_whose_policy_names_coordinators_trains_for_no_other(
    faces: tuple[TwoFaced, TwoFaced, np.ndarray], stores: Path
) -> None:
    one, _, weights = faces
    one.site.close()
    policy = stores / "a" / "policy.yaml"
    policy.write_text(policy.read_text() + f"coordinators: ['{'ab' * 32}']\n")
    one.site = Site(stores / "a")
    with pytest.raises(StoreRefused, match="does not name the coordinator key"):
        one.train(0, weights)
    with pytest.raises(StoreRefused, match="needs a proof"):
        one.train(0, weights, base=())


def impostor(home: Path) -> SitePort:
    """It joins under the store's name with the store's card, and signs with another key."""
    port = SitePort(home)
    port.site._attestor._key = replace(load_or_make_key(home / "other.pem"), public=port.site._attestor.public)
    return port


def exchanged(home: Path) -> SitePort:
    """Somebody on the way to the coordinator changes the update."""
    return SitePort(home, lambda update: update * np.float32(2))


@pytest.mark.parametrize(
    ("lying", "reason"),
    [(impostor, "the signature is not of store b's enrolled key"), (exchanged, "the update is b3:")],
    ids=["another key", "another update"],
)
def test_an_update_that_its_store_did_not_sign_is_refused(
    lying: Callable[[Path], SitePort], reason: str, stores: Path, tmp_path: Path
) -> None:
    run(said(), tmp_path, {name: lying(stores / name) if name == "b" else SitePort(stores / name) for name in NAMES})
    rejected = records(tmp_path, "update_rejected")
    assert {r["store"] for r in rejected} == {"b"}
    assert reason in rejected[0]["reason"]
    assert rejected[0]["digest"].startswith("b3:")
    assert {c["store"] for v in records(tmp_path, "version_published") for c in v["contributions"]} == {"a", "c"}
    findings = verify(folder(tmp_path))
    assert findings.counts["refused"] == len(rejected)


def test_a_key_that_is_revoked_counts_no_more_in_a_run_that_is_going_on(stores: Path, tmp_path: Path) -> None:
    def after_a_version(made: Composition) -> None:
        while made.machine.version < 1:
            time.sleep(0.01)
        change_roster(roster_file(tmp_path), lambda roster: revoke(roster, "b", time.time()))

    ports = {name: SitePort(stores / name) for name in NAMES}
    run(said(stop={"max_versions": 20}), tmp_path, ports, beside=after_a_version)
    assert {r["reason"] for r in records(tmp_path, "update_rejected")} == {"store b's key was revoked"}
    assert [r["store"] for r in records(tmp_path, "store_set_aside")] == ["b"]
    assert {c["store"] for c in records(tmp_path, "version_published")[-1]["contributions"]} == {"a", "c"}
    assert verify(folder(tmp_path)).ok


def test_a_store_whose_key_changed_is_told_how_it_is_accepted(stores: Path, tmp_path: Path) -> None:
    known = load_or_make_key(tmp_path / "before" / "key.pem").public
    change_roster(roster_file(tmp_path), lambda roster: enroll(roster, "b", known, 0.0))
    run(said(pacing={"quorum": 2}), tmp_path, {name: SitePort(stores / name) for name in NAMES})
    (aside,) = records(tmp_path, "store_set_aside")
    now = load_key(stores / "b" / "keys" / "store.pem").public
    assert f"raypipe ledger enroll b {now} --roster {roster_file(tmp_path)}" in aside["reason"]


# -- trouble ------------------------------------------------------------------------------------------------------


def test_a_ledger_that_cannot_be_written_is_waited_for_and_said(stores: Path, tmp_path: Path) -> None:
    other = Ledger(folder(tmp_path), load_or_make_key(tmp_path / "keys" / "coordinator.pem"), "run")
    seen: list[int] = []

    def let_go(made: Composition) -> None:
        while not any("another process writes the ledger" in line for line in made.board.lines):
            time.sleep(0.01)
        time.sleep(0.5)
        seen.append(made.machine.version)
        other.close()

    made = run(said(), tmp_path, {name: SitePort(stores / name) for name in NAMES}, beside=let_go)
    assert seen == [0], "nobody trained on what was not on the chain"
    assert made.machine.version == VERSIONS
    assert verify(folder(tmp_path)).ok


class LostReport(SitePort):
    """Its first report is lost on the way, after its head was kept."""

    lost = False

    async def train(self, ticket: msg.Ticket, plan: bytes, weights: np.ndarray, *how: Any) -> msg.Report:
        report = await super().train(ticket, plan, weights, *how)
        if not self.lost:
            self.lost = True
            raise StoreUnreachable("store b: the link is gone")
        return report


def test_a_store_whose_report_was_lost_is_given_a_proof_from_the_head_that_it_kept(
    stores: Path, tmp_path: Path
) -> None:
    ports = {name: (LostReport if name == "b" else SitePort)(stores / name) for name in NAMES}
    pacing = {"buffer_size": 2, "backoff_s": 0.2, "max_failures": 2}
    run(said(pace="fedbuff", pacing=pacing, stop={"max_versions": 12}), tmp_path, ports)
    assert [r["reason"] for r in records(tmp_path, "ticket_failed")] == ["the link is gone"]
    assert "b" in {c["store"] for v in records(tmp_path, "version_published") for c in v["contributions"]}
    assert verify(folder(tmp_path)).ok


def test_key_files_that_others_can_read_are_refused_with_one_line(stores: Path, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "keys" / "coordinator.pem", stores / "b" / "keys" / "store.pem"
    for file in (mine, theirs):
        load_or_make_key(file)
        os.chmod(file, 0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {mine}"):
        run(said(), tmp_path, {name: SitePort(stores / name) for name in NAMES if name != "b"})
    with pytest.raises(ConfigError) as caught:
        Site(stores / "b")
    assert "chmod 600 keys/store.pem" in caught.value.message
    assert str(stores) not in caught.value.message, "where the store keeps it is the store's own"


def test_a_ledger_that_was_altered_while_nobody_ran_is_not_gone_on_with(ran: Path, tmp_path: Path) -> None:
    from raypipe.coordinator.notary import Notary
    from raypipe.errors import RunError

    shutil.copytree(ran, tmp_path / "copy")
    file = folder(tmp_path / "copy") / FILE
    file.write_bytes(b"".join(flipped(file.read_bytes().splitlines(keepends=True))[0]))
    notary = Notary(
        file.parent, tmp_path / "copy", "run", roster_file=roster_file(tmp_path / "copy"), rule="tofu", threads=1,
        wall=time.time, say=print,
    )  # fmt: skip
    with pytest.raises(RunError, match="was altered: entry"):
        notary.open()
    notary.close()


def test_the_readme_says_what_a_ledger_cannot_prove() -> None:
    said = " ".join((ROOT / "README.md").read_text().split())
    assert all(" ".join(line.split()) in said for line in LIMITS)

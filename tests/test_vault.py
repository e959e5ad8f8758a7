"""The vault: a store's site behind a socket. What passes, what is refused, what a cut costs, what an insider gets."""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT
from test_site import Case, write
from walls import ACTOR_USER, CAN, VAULT_USER, WHY, beside

from raypipe.cli import main
from raypipe.doctor.commands import screen
from raypipe.doctor.findings import Seen, findings
from raypipe.doctor.probe import Data, look_around
from raypipe.errors import ConfigError, StoreError, StoreRefused, StoreSuperseded, StoreUnreachable
from raypipe.ledger import entries
from raypipe.ledger.chain import Ledger
from raypipe.ledger.keys import Key, digest, load_key, load_or_make_key
from raypipe.store.budget import Budget
from raypipe.store.code import code_hash
from raypipe.store.messages import NEW, Card, Evaluation, Plan, Refusal, Report, Ticket, Verdict, encode
from raypipe.store.policy import read_policy
from raypipe.vault.client import VaultSite
from raypipe.vault.conversation import Vault
from raypipe.vault.frames import HEADER, MAGIC, Channel, Cut
from raypipe.vault.guard import Limits
from raypipe.vault.install import install
from raypipe.vault.jobs import Jobs
from raypipe.vault.memory import Outlet, mapped
from raypipe.vault.place import Place, Settings, changeable_by
from raypipe.vault.process import check
from raypipe.vault.server import Gate
from raypipe.vault.transfer import PIECE, Incoming, pieces

RECORDED = Path(__file__).parent / "recorded" / "protocol2.msgpack"


def frame(body: bytes) -> bytes:
    return HEADER.pack(MAGIC, len(body)) + body


def base_proof(folder: Path, key: Key, weights: np.ndarray) -> dict[str, Any]:
    """Of version 0 on a new ledger of run r."""
    ledger = Ledger(folder, key, "r")
    ledger.append(entries.Run("r", 1, key.public, "0" * 64, "c0de"), at=1.0)
    ledger.append(entries.Version(0, None, None, digest(weights), 0), at=2.0)
    ledger.seal(at=3.0)
    proof = ledger.base_proof(0)
    ledger.close()
    return proof


class Here:
    """A vault in a thread of this process: the protocol alone, without its walls."""

    def __init__(
        self,
        folder: Path,
        *,
        actor_user: int | None = None,
        abandon_s: float = 0.3,
        case: dict[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        self.case = Case(folder / "home", **(case or {}))
        self.path = folder / "v.sock"
        said = Limits(**limits)
        log = logging.getLogger("test.vault")
        budget = Budget(folder / "home" / "budget.json", said, time.time, "vault")
        self.vault = Vault(self.case.site, said, budget, "c0de", log, abandon_s)
        self.gate = Gate(self.vault, os.getuid() if actor_user is None else actor_user)
        self.thread = threading.Thread(target=self.gate.serve, args=(self.path,), daemon=True)
        self.thread.start()
        while not self.path.exists():
            time.sleep(0.01)

    def client(self, **options: Any) -> VaultSite:
        return VaultSite(self.path, "south", **{"patience_s": 1.0, **options})

    def close(self) -> None:
        self.gate.stop()
        self.thread.join()
        self.case.site.close()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    made = Here(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("pipe", [True, False])
def test_a_vault_gives_the_very_bits_of_a_site(here: Here, tmp_path: Path, pipe: bool) -> None:
    plain = Case(tmp_path / "plain")
    site, case = here.client(pipe=pipe), here.case
    card = site.describe("r", 1)
    own = {"process": 0, "data_hashes": {}, "key": "", "code": "c0de"}
    assert replace(card, **own) == replace(plain.site.describe("r", 1), **own)
    report = site.train(case.ticket, case.plan, case.weights)
    assert replace(report, seconds=0) == replace(plain.train(), seconds=0)
    for how in ([], [{"name": "bfloat16"}], []):
        expected = plain.site.collect("t1", how, "r", 1)
        update = site.collect("t1", how, "r", 1)
        assert (update.dtype, update.tobytes()) == (expected.dtype, expected.tobytes())
    given = replace(case.ticket, id="t2"), case.plan, case.weights, np.full(case.layout.shared.stop, 0.5, np.float32)
    assert replace(site.train(*given), seconds=0) == replace(plain.site.train(*given), seconds=0)
    assert site.collect("t2", [], "r", 1).tobytes() == plain.site.collect("t2", [], "r", 1).tobytes()
    judged, asked = site.evaluate(case.plan, case.weights, "validation", 1), plain.plan
    assert judged.sums == plain.site.evaluate(asked, plain.weights, "validation", 1).sums
    site.settle(Verdict("t1", 1, run="r", epoch=1))
    with pytest.raises(StoreRefused, match=r"^no update waits"):
        site.collect("t1", [], "r", 1)
    site.describe("r", 2)
    with pytest.raises(StoreSuperseded):
        site.describe("r", 1)
    assert site.ping()


class Relay:
    """Between a client and a vault; hangs up on both when so many bytes have gone a way. Counts what came to it."""

    def __init__(self, folder: Path, to: Path, cuts: Iterable[int], way: str) -> None:
        self.path, self._to, self._cuts, self._way = folder / "relay.sock", to, list(cuts), way
        self.bytes = {"up": 0, "down": 0}
        self.hang_up = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            far.connect(str(self._to))
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self._carry, args=(source, sink, way), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while data := source.recv(8192):
                self.bytes[way] += len(data)
                cut = way == self._way and self._cuts and self.bytes[way] > self._cuts[0]
                if cut or self.hang_up.is_set():
                    self._cuts[:1] = []
                    self.hang_up.clear()
                    break
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_a_transfer_that_is_cut_goes_on_where_it_was_left(tmp_path: Path) -> None:
    here = Here(tmp_path, case={"model": {"name": "small_cnn", "width": 64, "hidden": 1024}})
    case, megabyte = here.case, 1 << 20
    assert case.weights.nbytes > 4 * megabyte
    up = Relay(tmp_path, here.path, (megabyte, 3 * megabyte), "up")
    site = VaultSite(up.path, "south", pipe=False, patience_s=5)
    ticket = replace(case.ticket, max_steps=1)
    report = site.train(ticket, case.plan, case.weights)
    assert report.steps == 1
    assert up._cuts == [], "it was cut twice"
    assert case.weights.nbytes < site.bytes_sent < 1.1 * case.weights.nbytes
    up._cuts, up._way, up.bytes["down"] = [megabyte, 3 * megabyte], "down", 0
    update = site.collect("t1", [], "r", 1)
    assert up._cuts == []
    assert update.tobytes() == case.site.collect("t1", [], "r", 1).tobytes()
    assert update.nbytes < up.bytes["down"] < 1.1 * update.nbytes
    here.close()


def test_a_piece_that_is_damaged_or_out_of_turn_is_not_taken() -> None:
    raw = np.random.default_rng(0).integers(0, 256, 3 * PIECE, np.uint8)
    coming, parts = Incoming(digest(raw), raw.size), list(pieces(raw, 0))
    coming.take(parts[0])
    for wrong in (parts[0], parts[2], replace(parts[1], data=parts[2].data), replace(parts[1], check=b"")):
        with pytest.raises(StoreError):
            coming.take(wrong)
    other = np.zeros_like(raw)
    for part in list(pieces(other, 0))[1:]:
        coming.take(part)
    with pytest.raises(StoreError, match="not the one that was announced"):
        coming.whole()
    assert coming.have == 0


def test_a_ticket_asked_for_again_after_a_cut_joins_the_work_that_goes_on(tmp_path: Path) -> None:
    here = Here(tmp_path, abandon_s=10)
    relay = Relay(tmp_path, here.path, (), "up")
    site, found = VaultSite(relay.path, "south", pipe=False, patience_s=5), []
    long = replace(here.case.ticket, max_epochs=None, budget_s=2.0)
    thread = threading.Thread(target=lambda: found.append(site.train(long, here.case.plan, here.case.weights)))
    thread.start()
    until(lambda: here.case.site._controls.current is not None)
    site._work.channel.shut()  # type: ignore[union-attr]
    thread.join()
    assert found[0].stopped == "budget"
    assert found[0].seconds >= 2
    assert here.vault.budget.spent.tickets == 1, "trained once"
    here.close()


def test_work_that_nobody_waits_for_is_abandoned_and_leaves_nothing(here: Here) -> None:
    site = here.client(patience_s=0)
    long = replace(here.case.ticket, max_epochs=None, budget_s=60.0)

    def ask() -> None:
        with pytest.raises(StoreError, match="does not answer"):
            site.train(long, here.case.plan, here.case.weights)

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: here.case.site._controls.current is not None)
    here.gate._actor_user = -1  # it cannot come back
    site._work.channel.shut()  # type: ignore[union-attr]
    thread.join()
    until(lambda: here.case.site._controls.current is None)
    assert here.case.site.describe("r", 1).outbox == ()


def test_whoever_is_fast_finds_a_job_that_is_waited_for() -> None:
    abandoned: list[str] = []
    jobs = Jobs(abandoned.append)
    job = jobs.add("key", "t1", lambda: 7, lambda: None)
    jobs.work(1)  # before who asked came to wait
    assert jobs.wait(job, lambda: False, 0.01, 0.01) == 7
    running, go = threading.Event(), threading.Event()

    def run() -> int:
        running.set()
        go.wait(20)
        return 8

    first = jobs.add("first", "", run, lambda: None)
    second = jobs.add("second", "", run, lambda: None)
    thread = threading.Thread(target=jobs.work, args=(1,))
    thread.start()
    running.wait(20)
    with pytest.raises(Cut):  # who asked for the one that waits goes: the one that runs is another's
        jobs.wait(second, lambda: True, 0.01, 0.01)
    assert abandoned == []
    go.set()
    assert jobs.wait(first, lambda: False, 0.01, 0.01) == 8
    thread.join()
    jobs.work(1)
    assert second.answer is None, "nobody waited for it"


def test_only_the_actors_user_may_connect(tmp_path: Path) -> None:
    here = Here(tmp_path, actor_user=os.getuid() + 1)
    with pytest.raises(StoreUnreachable, match="raypipe vault status south"):
        here.client(patience_s=0.1).describe()
    here.close()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"rpv\x01\xff\xff\xff\xff",
        frame(b""),
        frame(b"\xc1"),
        frame(b"\x91" * 400_000),
        frame(b"\xdf\xff\xff\xff\xff"),
        frame(msgpack.packb([1])),
        frame(msgpack.packb({"verb": "__import__"})),
        frame(msgpack.packb({"verb": ["train"]})),
        frame(pickle.dumps(os.system)),
    ],
)
def test_what_is_no_message_ends_that_connection_and_no_other(here: Here, raw: bytes) -> None:
    site, wrong = here.client(), here.client()
    channel = wrong._work.connect()
    assert site.ping()
    channel._sock.sendall(raw)
    with pytest.raises((Cut, StoreError)):
        channel.receive(5)
    assert site.ping()


def test_a_frame_that_does_not_end_is_waited_for_in_vain_for_a_while_only(here: Here) -> None:
    near, far = socket.socketpair()
    near.sendall(frame(msgpack.packb({"verb": "ping"}))[:-1])
    start = time.monotonic()
    with pytest.raises(Cut, match="did not end"):
        Channel(far, frame_s=0.2).receive(None)
    assert time.monotonic() - start < 2
    for _ in range(40):  # more than the vault holds open
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(here.path))
        sock.sendall(b"rpv")
    assert here.client().ping()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 1}, "batch_size 1, the vault allows 4 to 4096"),
        ({"batch_size": 10**9}, "batch_size 1000000000, the vault"),
        ({"batch_size": 4096, "task": {"name": "classification", "image_size": 1024, "channels": 3}}, "a batch of"),
        ({"run": "../.."}, "a run's name has letters"),
        ({"data": "../../etc"}, "no data set named"),
        ({"model": {"name": "os.system"}}, "no model named 'os.system'"),
    ],
)
def test_a_plan_that_costs_too_much_or_names_what_is_not_there_is_refused(
    here: Here, changes: dict[str, Any], said: str
) -> None:
    case, site = here.case, here.client()
    with pytest.raises(StoreError, match=said):
        site.train(case.ticket, replace(case.plan, **changes), case.weights)
    assert site.train(case.ticket, case.plan, case.weights).steps > 0


def test_a_days_budget_is_not_given_back_by_a_restart_a_new_run_or_a_clock_set_back(tmp_path: Path) -> None:
    now = [86400.0 * 20000]
    file, limits = tmp_path / "budget.json", Limits(tickets_a_day=2, upload_bytes_a_day=100)

    def budget() -> Budget:
        return Budget(file, limits, lambda: now[0], "vault")

    budget().spend(tickets=1)
    budget().spend(tickets=1)
    with pytest.raises(StoreRefused, match="today's tickets are spent"):
        budget().spend(tickets=1)
    budget().spend(upload_bytes=100)
    now[0] -= 86400
    with pytest.raises(StoreRefused, match="today's upload bytes are spent"):
        budget().spend(upload_bytes=1)
    now[0] += 2 * 86400
    budget().spend(tickets=2)
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"budget\.json of the vault is damaged"):
        budget()


def test_the_budget_counts_tickets_of_all_runs_and_bytes_that_left(tmp_path: Path) -> None:
    here = Here(tmp_path, tickets_a_day=1, upload_bytes_a_day=20_000)
    case, site = here.case, here.client()
    site.train(case.ticket, case.plan, case.weights)
    with pytest.raises(StoreRefused, match="today's tickets"):
        site.train(replace(case.ticket, id="t2"), replace(case.plan, run="other"), case.weights)
    site.collect("t1", [], "r", 1)
    with pytest.raises(StoreRefused, match="today's upload bytes"):
        site.collect("t1", [], "r", 1)
    here.close()


def test_a_base_that_is_not_on_the_ledger_is_not_trained_from(tmp_path: Path) -> None:
    key = load_or_make_key(tmp_path / "keys" / "coordinator.pem")
    here = Here(tmp_path, case={"coordinators": [key.public]})
    case, site = here.case, here.client()
    proven = replace(case.ticket, base=(base_proof(tmp_path / "ledger", key, case.weights),))
    with pytest.raises(StoreRefused, match="a ticket needs a proof of its base"):
        site.train(case.ticket, case.plan, case.weights)
    with pytest.raises(StoreRefused, match="other weights than the chain says"):
        site.train(proven, case.plan, case.weights + 1)
    assert here.vault.budget.spent.tickets == 0, "what is refused costs nothing"
    report = site.train(proven, case.plan, case.weights)
    assert report.signature
    assert site.describe("r", 1).head_size == 2
    here.close()


def test_memory_that_the_vault_hands_out_can_only_be_read(here: Here) -> None:
    outlet = Outlet(4096)
    outlet.put(np.full(4096, 7, np.uint8))
    for attempt in (
        lambda: os.pwrite(outlet.file, b"x", 0),
        lambda: os.ftruncate(outlet.file, 0),
        lambda: os.ftruncate(outlet.file, 8192),
        lambda: mmap.mmap(outlet.file, 4096, prot=mmap.PROT_WRITE),
    ):
        with pytest.raises(OSError, match="permitted"):
            attempt()
    seen = mapped(outlet.file, 4096)
    assert seen[0] == 7
    outlet.put(np.full(4096, 9, np.uint8))
    assert seen[0] == 9, "the same memory is used again"
    open_file = os.memfd_create("x")
    with pytest.raises(StoreError, match="not sealed"):
        mapped(open_file, 0)


def test_a_vault_answers_a_recorded_actor_of_the_protocol_before(here: Here) -> None:
    conversation = msgpack.unpackb(RECORDED.read_bytes())
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(here.path))
    channel = Channel(sock)
    for who, raw in conversation:
        if who == "actor":
            sock.sendall(raw)
            continue
        then, now = msgpack.unpackb(raw[8:]), channel.receive(10)
        assert shape(now) == shape(then)


def test_an_actor_understands_a_recorded_vault_of_the_protocol_before(tmp_path: Path) -> None:
    conversation = msgpack.unpackb(RECORDED.read_bytes())
    case = Case(tmp_path / "home")

    told: list[str] = []  # what the old vault would not have known

    def replay(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        channel = Channel(sock)
        for who, raw in conversation:
            if who == "vault":
                sock.sendall(raw)
                continue
            said, then = shape(channel.receive(10)), shape(msgpack.unpackb(raw[8:]))
            told.extend(f"{said}, not {then}" for key in said if said[key] != then.get(key) and key != "speaks")

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "old.sock"))
    listener.listen()
    threading.Thread(target=replay, args=(listener,), daemon=True).start()
    site = VaultSite(tmp_path / "old.sock", "south", pipe=False, patience_s=1)
    card = site.describe("r", 1)
    assert (card.protocol, card.code, card.data["products"]["train"]) == (2, "c0de", 70), "its greeting has the code"
    assert site.train(case.ticket, case.plan, case.weights).steps == 6
    assert site.collect("t1", [], "r", 1).nbytes == 14848
    assert site.evaluate(case.plan, case.weights, "validation", 1).num_examples == 30
    site.settle(Verdict("t1", 1, run="r", epoch=1))
    with pytest.raises(StoreRefused, match="no update waits"):
        site.collect("t1", [], "r", 1)
    assert told == []


def test_a_message_has_no_field_that_an_older_peer_would_stumble_over() -> None:
    known: dict[str, set[str]] = {}
    for _, raw in msgpack.unpackb(RECORDED.read_bytes()):
        for value in msgpack.unpackb(raw[8:]).values():
            if isinstance(value, bytes) and value[:1] == b"\x83":
                message = msgpack.unpackb(value)
                known[message["kind"]] = set(message["body"])
    assert known.keys() >= {"Card", "Plan", "Ticket", "Report", "Evaluation", "Verdict", "Refusal"}
    for kind in (Card, Plan, Ticket, Report, Evaluation, Verdict, Refusal):
        new = NEW.get(kind.__name__, set())
        assert {field.name for field in fields(kind)} - new == known[kind.__name__], "say in messages.NEW what is new"
        for field in fields(kind):
            assert field.name not in new or (field.default, field.default_factory) != (MISSING, MISSING)


@pytest.mark.parametrize("pipe", [True, False])
def test_sums_that_are_measured_come_as_they_are(here: Here, tmp_path: Path, pipe: bool) -> None:
    plain, site, case = Case(tmp_path / "plain"), here.client(pipe=pipe), here.case
    gram = site.measure(case.plan, case.weights, "gram", 1)
    expected = plain.site.measure(plain.plan, plain.weights, "gram", 1)
    assert (gram.dtype, gram.tobytes()) == (expected.dtype, expected.tobytes())
    with pytest.raises(StoreRefused, match="only columns of rows have moments"):
        site.measure(case.plan, None, "moments", 1)


def test_the_doctor_asks_a_vault_for_what_nobody_else_can_read(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYPIPE_VAULTS", str(tmp_path / "v"))
    monkeypatch.setenv("RAYPIPE_STORES", str(tmp_path / "removed"))
    place, now = Place("south"), datetime.now(UTC)
    place.gate.mkdir(parents=True)
    place.settings.write_text(settings())
    place.socket.symlink_to(here.path)
    facts, card = look_around(["south"], now), here.case.site.describe()
    assert facts.troubles == ()
    assert facts.data == (Data("south", "products", card.data["products"], card.data_hashes["products"]),)
    assert facts.vaults == (("south", "c0de"),)
    node = Seen("1", "a", True, ("south",), {}, facts)
    (said,) = [one.line for one in findings([node], [], True) if "vault" in one.line]
    assert said.startswith("store south: its vault runs other code (c0de) than this node (")
    assert "products 100" in (told := "\n".join(map(str, screen([node]).columns[-1].cells)))
    assert "(vault)" in told
    place.socket.unlink()
    monkeypatch.setattr("raypipe.doctor.probe.VAULT_S", 0)
    (trouble,) = look_around(["south"], now).troubles
    end = "(No such file or directory); on its machine: raypipe vault status south"
    assert trouble == f"store south: its vault does not answer {end}"


def test_two_protocols_apart_are_said_to_be(here: Here) -> None:
    with pytest.raises(StoreError, match="the vault speaks protocol 2 and 3; update the older side"):
        here.client(speaks=(4, 5)).describe()
    with pytest.raises(StoreError, match="this is the vault of store south"):
        VaultSite(here.path, "north", patience_s=0).describe()


def shape(value: Any) -> Any:
    """Keys and kinds of a message, what is inside it too."""
    if isinstance(value, dict):
        return {key: shape(inside) for key, inside in sorted(value.items())}
    if isinstance(value, bytes) and value[:1] in (b"\x83",):
        return shape(msgpack.unpackb(value))
    return value if isinstance(value, str) and value in ("ok", "Card", "Report", "Refusal") else type(value).__name__


def until(what: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not CAN, reason=WHY)
def test_an_insider_gets_nothing_from_a_vault_and_everything_from_a_site_in_the_actor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through Ray, with the token: code of the insider's in the actor, whose user is neither root nor the vault's."""
    folder = Path(tempfile.mkdtemp(prefix="rpi", dir="/tmp"))  # short, and open to other users
    try:
        monkeypatch.setenv("RAYPIPE_VAULTS", str(folder / "v"))
        found = insiders_find(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert "vault: answers, speaks protocol 3" in capsys.readouterr().out
    print(json.dumps(found, indent=1))
    assert len(found["vault"]["attacks"]) >= 20
    assert found["vault"]["image_bytes"] == {}
    assert found["vault"]["commands"] == []
    assert found["vault"]["afterwards"] == "vault", "it still answers its actor"
    assert found["vault"]["trained"] == 20, "the day's budget, to the last ticket"
    assert found["actor"]["trained"] > 20
    assert found["actor"]["image_bytes"].keys() >= {
        "read_the_folder",
        "take_decoded_images_from_memory",
        "open_the_images_with_the_stores_own_code",
    }
    assert "actor-command" in found["actor"]["commands"]


def insiders_find(folder: Path) -> dict[str, Any]:
    """For each store (named by its transport): what came of each attack, image bytes in the loot, what ran as whom."""
    folder.chmod(0o755)
    key = load_or_make_key(folder / "coordinator" / "key.pem")
    places = {name: folder / name for name in ("loot", "drop", "ray", "stores", "v")}
    for path in places.values():
        path.mkdir()
    places["drop"].chmod(0o1777)
    home = write(places["stores"] / "actor", store="actor")
    place, source = Place("vault"), write(folder / "source", store="vault", coordinators=[key.public])
    users = ["--user", str(VAULT_USER), "--actor-user", str(ACTOR_USER)]
    said = ["--from", str(source), "--memory-gb", "8"]
    assert main(["vault", "install", "vault", *users, *said]) == 0
    with place.settings.open("a") as file:
        file.write("limits: {tickets_a_day: 20}\n")
    case = Case(folder / "case")
    images = case_images(case)
    messages = {"ticket": encode(case.ticket), "plan": encode(case.plan), "weights": case.weights.tobytes()}
    around = {"RAYPIPE_STORES": str(places["stores"]), "RAYPIPE_VAULTS": str(places["v"]), "HOME": str(folder)}
    around |= {"RAY_TMPDIR": str(places["ray"]), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    brief = {
        "folder": str(folder),
        "drop": str(places["drop"]),
        "environment": around,
        "transports": {"vault": "vault", "actor": "actor"},
        "homes": {"vault": str(place.home), "actor": str(home)},
        "proof": base_proof(folder / "ledger", key, case.weights),
        "messages": {name: raw.hex() for name, raw in messages.items()},
    }
    (folder / "brief.json").write_text(json.dumps(brief))
    (folder / "found.json").touch()
    for path in (home, *home.rglob("*"), places["loot"], places["ray"], places["stores"], folder / "found.json"):
        os.chown(path, ACTOR_USER, ACTOR_USER)
    for path in (folder / "case", folder / "source", folder / "coordinator"):
        shutil.rmtree(path)
    with serving(place):
        assert main(["vault", "status", "vault"]) == 0
        command = beside([sys.executable, str(ROOT / "tests" / "insider.py"), str(folder)], ACTOR_USER)
        env = {**os.environ, **around}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = [(path.name, path.stat().st_uid) for path in places["drop"].iterdir()]
    owners = {"vault": VAULT_USER, "actor": ACTOR_USER}
    return {
        store: {
            "attacks": {name: end for name, end in ends.items() if name != "afterwards"},
            "afterwards": ends["afterwards"],
            "trained": sum(path.read_bytes().count(b"Report(") for path in places["loot"].glob(f"{store}-*")),
            "image_bytes": loot_of(places["loot"], store, images),
            # `-command` is run by the actor's user either way: it is one of the site's only if that is the same user.
            "commands": sorted(
                n for n, who in ran if n.startswith(store) and (who == owners[store] or "-comm" not in n)
            ),
        }
        for store, ends in json.loads((folder / "found.json").read_text()).items()
    }


def case_images(case: Case) -> list[bytes]:
    """A piece of each image, as it lies on the disk and as pixels."""
    files = pq.read_table(case.site.policy.data["products"].folder / "train.parquet")["image"].to_pylist()
    pixels = case.site._shelf.data("products").split("train").decode(np.arange(len(files)), size=12, channels=1)[0]
    return [file["bytes"][-40:-16] if isinstance(file, dict) else file[-40:-16] for file in files] + [
        image.tobytes()[40:64] for image in pixels
    ]


def loot_of(folder: Path, store: str, images: list[bytes]) -> dict[str, int]:
    """Attack -> bytes of images in what it brought home."""
    found = {}
    for path in sorted(folder.glob(f"{store}-*")):
        content = path.read_bytes()
        if count := sum(len(piece) for piece in images if piece in content):
            found[path.name.removeprefix(f"{store}-")] = count
    return found


@contextmanager
def serving(place: Place) -> Iterator[None]:
    """The vault's own process, started by root, which it gives up."""
    process = subprocess.Popen(beside([str(place.folder / "start.sh")], None), stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: place.socket.exists() or process.poll() is not None, 90)
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert place.home.stat().st_mode & 0o777 == 0o700
        assert place.socket.stat().st_uid == VAULT_USER
        yield
    finally:
        process.terminate()
        process.wait(30)


def settings(**changes: Any) -> str:
    return yaml.safe_dump({"store": "south", "user": 1, "actor_user": 2, **changes})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"cannot be read: No such file or directory; first: raypipe vault install south"),
        ("store: [", "is not YAML"),
        (settings(store="north"), "is of store 'north', not of 'south'"),
        (settings(user="root"), "user: input should be a valid integer"),
        (settings(limits={"min_bach": 3}), "limits.min_bach: extra inputs are not permitted"),
    ],
)
def test_settings_that_are_wrong_are_said_in_a_line_each(tmp_path: Path, content: str | None, said: str) -> None:
    place = Place("south", tmp_path)
    place.folder.mkdir()
    if content is not None:
        place.settings.write_text(content)
    with pytest.raises(ConfigError, match=said):
        place.read()


def test_a_file_that_the_actors_user_could_change_is_found(tmp_path: Path) -> None:
    code, user = tmp_path / "code", os.getuid() + 7
    (code / "part").mkdir(parents=True)
    for path in (code / "part", code / "part" / "a.py", code / ".lock"):
        path.touch() if path.suffix or path.name == ".lock" else None
        path.chmod(0o755)
    assert changeable_by(user, [code]) is None
    (code / ".lock").chmod(0o666)
    assert changeable_by(user, [code]) is None, "nobody imports a lock"
    (code / "part" / "a.py").chmod(0o646)
    assert changeable_by(user, [code]) == code / "part" / "a.py"
    (code / "part").chmod(0o777)
    assert changeable_by(user, [code]) == code / "part"
    assert changeable_by(os.getuid(), [code]) is not None, "its owner could"
    tmp_path.chmod(0o707)
    assert changeable_by(user, [code]) == tmp_path, "who can rename a folder above can change what is in it"


def test_a_vault_is_not_started_with_a_hole_in_its_walls(tmp_path: Path) -> None:
    place, user = Place("south", tmp_path), os.geteuid()
    install(place, Settings(store="south", user=user, actor_user=user), write(tmp_path / "source"))
    check(place, place.read())
    place.home.chmod(0o750)
    with pytest.raises(ConfigError, match=r"alone: chown .* chmod 700"):
        check(place, place.read())
    place.home.chmod(0o700)
    with pytest.raises(ConfigError, match=r"'s alone|is started by root"):
        check(place, Settings(store="south", user=user + 1, actor_user=user))


def test_installing_again_renews_the_code_and_keeps_what_is_the_vaults_own(tmp_path: Path) -> None:
    place, user = Place("south", tmp_path), os.geteuid()
    said = Settings(store="south", user=user, actor_user=user)
    source = write(tmp_path / "source")
    old = load_or_make_key(source / "keys" / "store.pem")
    install(place, said, source)
    assert load_key(place.home / "keys" / "store.pem").public != old.public, "others could read the old one"
    key = (place.home / "keys" / "store.pem").read_bytes()
    (place.code / "raypipe" / "old.py").touch()
    (place.home / "policy.yaml").write_text((place.home / "policy.yaml").read_text() + "max_seconds: 5\n")
    install(place, said, tmp_path / "source")
    assert not (place.code / "raypipe" / "old.py").exists()
    assert code_hash(place.code / "raypipe") == code_hash()
    assert (place.home / "keys" / "store.pem").read_bytes() == key
    assert read_policy(place.home).max_seconds == 5
    unit = (place.folder / "raypipe-vault-south.service").read_text()
    assert f"ReadWritePaths={place.home} {place.gate}" in unit
    assert "PrivateNetwork=yes" in unit
    with pytest.raises(ConfigError, match="is of store 'south', not of 'north'"):
        install(Place("north", tmp_path), Settings(store="north", user=user, actor_user=user), tmp_path / "source")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["install", "south"], "name both users"),
        (["install", "south", "--user", "nobody-of-this-name", "--actor-user", "5"], "there is no user"),
        (["install", "south", "--user", "5", "--actor-user", "5"], "have to differ"),
        (["install", "so uth", "--same-user"], "a store id holds"),
        (["install", "south", "--same-user", "--cpus", "0"], "cpus: input should be greater than 0"),
        (["install", "south", "--same-user", "--from", "/nowhere"], "there is no policy.yaml"),
        (["install", "s" * 63, "--same-user"], "a unix socket's path has 107 bytes at most"),
        (["start", "south"], "first: raypipe vault install south"),
        (["status", "south"], "first: raypipe vault install south"),
    ],
)
def test_what_cannot_be_installed_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("RAYPIPE_VAULTS", str(tmp_path / ("x" * 40)) if len(arguments[1]) == 63 else str(tmp_path))
    assert main(["vault", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


ANEW, LAYERS = {"recalibrate": 50}, 2


@pytest.mark.cluster
def test_a_federation_with_a_store_behind_a_vault_gives_the_bytes_of_one_without(cluster: Any) -> None:
    from test_cluster import Federation, connected

    place, user, found = Place("shop-2", cluster.folder / "v"), os.geteuid(), []
    install(place, Settings(store="shop-2", user=user, actor_user=user), cluster.stores / "shop-2")
    homes = {"actor": cluster.stores / "shop-2", "vault": place.home}
    process = subprocess.Popen([sys.executable, "-m", "raypipe", "vault", "start", "shop-2"], cwd=ROOT)
    try:
        until(place.socket.exists, 90)
        for transport in ("vault", "actor"):
            key = load_or_make_key(homes[transport] / "keys" / "store.pem").public
            assert main(["ledger", "enroll", "shop-2", key]) == 0
            config = cluster.config(name=f"by-{transport}", seed=3, train={"keep_optimizer": True}, closed_form=0.01)
            config["train"]["optimizer"] = {"name": "sgd", "momentum": 0.9}
            config["model"]["norm"], config["evaluate"] = "batch", {**config["evaluate"], "metric": "loss", **ANEW}
            config["stores"] = [s | {"transport": transport} for s in config["stores"] if s["id"] == "shop-2"]
            with connected(cluster):
                federation = Federation(cluster, config)
                federation.result()
            found.append([version["hash"] for version in federation.records("version_published")])
            (started,) = federation.records("run_started")
            assert [(fact["what"], fact["missing"]) for fact in started["asked"]] == [("gram", {})]
            joined = [body for body in federation.records("store_joined") if body["store"] == "shop-2"]
            assert {body.get("vault_code") for body in joined} == {code_hash() if transport == "vault" else None}
            left = {name: tuple((home / "egress" / federation.run).glob("*.jsonl")) for name, home in homes.items()}
            said = b"".join(file.read_bytes() for file in left.pop(transport))
            measured = said.count(b'"kind":"sums"') - 1  # the first is the closed form's
            assert measured in (LAYERS, 2 * LAYERS), "it was asked where the data is"
            assert list(left.values()) == [()], "the other one was asked nothing"
        assert len(found[0]) == 4, "the last one has statistics that were measured anew"
        assert found[0] == found[1]
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.cluster
def test_a_site_in_the_actor_is_not_taken_for_the_vault_that_was_asked_for(cluster: Any) -> None:
    from test_cluster import connected

    from raypipe.config.schema import Store
    from raypipe.placement.actor import NAMESPACE
    from raypipe.placement.plan import store_options
    from raypipe.store.actor import StoreActor
    from raypipe.store.client import StoreClient

    asked, found = (StoreClient(Store(id="shop-3", cpus=0.2), "r", 1, "c0de", way) for way in ("vault", "actor"))
    assert asked._name != found._name, "neither finds the other's actor"
    named = {"name": asked._name, "namespace": NAMESPACE, **store_options("shop-3", 0.2, 0)}
    with connected(cluster):
        actor = StoreActor.options(**named).remote("shop-3", 0.2, 0.0, 1.0, transport="actor")
        with pytest.raises(StoreRefused, match="store shop-3: its actor answered without the hash of a vault's code"):
            asyncio.run(asked.join())
        asked.kill()
        del actor

"""Every byte that leaves a store has a receipt there: by every method of its actor, of its vault, of the doctor."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_site import Case
from test_vault import Here, base_proof

from raypipe.cli import main
from raypipe.doctor.probe import look_around
from raypipe.errors import StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.ledger.keys import digest, load_or_make_key
from raypipe.ledger.offline import canonical
from raypipe.ledger.receipts import APART, NAME, read_receipts, write_apart
from raypipe.store import messages as msg
from raypipe.store.actor import SiteActor
from raypipe.store.site import Site
from raypipe.vault.conversation import Conversation
from raypipe.vault.frames import Channel
from raypipe.vault.transfer import PIECE

CUT_AT = 100  # bytes
Left = Counter[tuple[str, int, str]]  # kind, bytes, hash


def receipts(home: Path, *, runs: bool = False) -> Left:
    """All accounts of a store, each of them whole; with `runs`, the run that each receipt names stands for its kind."""
    found: Left = Counter()
    for folder in (home / "egress").iterdir():
        assert read_receipts(folder).problems == ()
        for file in folder.glob("*.jsonl"):
            for line in file.read_text().splitlines():
                said = json.loads(line)["receipt"]
                found[said["run"] if runs else said["kind"], said["num_bytes"], said["digest"]] += 1
    return found


def weighed(kind: str, raw: bytes) -> tuple[str, int, str]:
    return kind, len(raw), digest(raw)


def kind_of(raw: bytes) -> str:
    return type(msg.decode(raw)).__name__.lower()


def until(what: Callable[[], Any]) -> Any:
    end = time.monotonic() + 20
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def proven(case: Case, folder: Path) -> msg.Ticket:
    """In a run with a ledger: what leaves is known by its hash."""
    key = load_or_make_key(folder / "coordinator.pem")
    return replace(case.ticket, base=(base_proof(folder / "ledger", key, case.weights),))


class Actor:
    """A store's actor without Ray, and all that left it."""

    def __init__(self, home: Path, **policy: Any) -> None:
        self.case, self.left, self.called = Case(home, max_upload_bytes_s=1e9, **policy), Left(), set[str]()
        self.actor = SiteActor("south", 1.0, 0.0, 1.0, orphan_s=1e9)
        self.actor._site = self.case.site

    def __call__(self, method: str, *arguments: Any) -> Any:
        answer = getattr(self.actor, method)(*arguments)
        self.called.add(method)
        for one in answer if method == "train" else [answer]:
            self.take(method, one)
        return answer

    def take(self, method: str, answer: Any) -> None:
        match answer:
            case bytes():
                self.left[weighed(kind_of(answer), answer)] += 1
            case np.ndarray():
                self.left[weighed("sums" if method == "measure" else "update", answer.tobytes())] += 1
            case {"num_bytes": num_bytes, "digest": found}:
                self.left["update", num_bytes, found] += 1
            case str():
                self.left[weighed("pause", answer.encode())] += 1


@pytest.fixture
def stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYPIPE_STORES", str(tmp_path / "stores"))
    return tmp_path / "stores"


def test_every_byte_that_leaves_an_actor_is_in_its_stores_receipts(stores: Path, tmp_path: Path) -> None:
    home = stores / "south"
    ask = Actor(home, yield_file="busy")
    ticket, plan = proven(ask.case, tmp_path), msg.encode(ask.case.plan)
    weights, how = ask.case.weights, [{"name": "bfloat16"}]
    assert kind_of(ask("describe", "r", 1)) == "card"
    (home / "busy").touch()
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(ask, "train", msg.encode(ticket), plan, weights, how, [])
        said = until(lambda: isinstance(why := ask.actor.heartbeat(), str) and why)
        assert ask("heartbeat") == said == ask.actor.heartbeat(), "told again and again, and entered once"
        ask("control", "t1", "resume", "r", 1)
        (home / "busy").unlink()
        report, _ = trained.result(20)
    assert kind_of(report) == "report"
    ask("train", msg.encode(ticket), plan, weights, None, [])  # asked again: the same report once more
    ask("collect", "t1", [], "r", 1)
    first, again = ask("piece", "t1", 0), ask("piece", "t1", 0)
    assert first == again
    ask.left[weighed("again", again[1])] += 1
    kind, *_ = kind_of(ask("measure", plan, weights, "moments", 1)), ask("measure", plan, weights, "gram", 1)
    assert kind == "refusal"
    assert kind_of(ask("evaluate", plan, weights, "validation", 1)) == "evaluation"
    ask("settle", [msg.encode(msg.Verdict("t1", 1, run="r", epoch=1))])
    ask("settle", [b"no verdict"])  # nothing leaves, whatever comes of it
    for method, arguments in {
        "describe": ("r", 2),
        "train": (msg.encode(ticket), plan, weights, [], []),  # of an older epoch from here on
        "collect": ("t1", [], "r", 1),
        "piece": ("t1", 0),
        "evaluate": (plan, weights, "validation", 1),
        "measure": (plan, weights, "gram", 1),
    }.items():
        ask(method, *arguments)
    assert ask.called == {name for name in vars(SiteActor) if not name.startswith("_")}, "a method is not tried"
    assert {kind: n for (kind, *_), n in ask.left.items() if kind == "refusal"}
    assert receipts(home) == ask.left
    assert {run for run, *_ in receipts(home, runs=True)} == {"r"}


def test_what_leaves_when_there_is_no_site_has_a_receipt_where_there_is_a_store(stores: Path) -> None:
    ask = Actor(stores / "south")
    ask.actor._site = None
    (stores / "south" / "policy.yaml").write_text("store: [")
    ask.actor._make = lambda: Site(stores / "south")
    assert kind_of(ask("describe", "r", 1)) == "refusal"
    assert receipts(stores / "south") == ask.left
    gone = SiteActor("north", 1.0, 0.0, 1.0, orphan_s=1e9)
    gone._make = lambda: Site(stores / "north")
    assert kind_of(gone.describe("r", 1)) == "refusal"
    assert not (stores / "north").exists()


def test_what_is_asked_of_a_site_for_no_run_or_by_nobody_has_a_receipt_too(tmp_path: Path) -> None:
    case, left = Case(tmp_path / "south"), Left()
    left[weighed("card", msg.encode(case.site.describe()))] += 1
    judged = case.site.evaluate(case.plan, case.weights, "validation")
    left[weighed("evaluation", msg.encode(judged))] += 1
    left[weighed("sums", case.site.measure(case.plan, case.weights, "gram").tobytes())] += 1
    left[weighed("report", msg.encode(case.train()))] += 1
    left["update", case.site.collect("t1", []).nbytes, ""] += 1  # without a ledger nothing is hashed for it
    refused = case.site.refusal(StoreRefused("no"), "train", run="no/run" * 9999)
    left[weighed("refusal", msg.encode(refused))] += 1
    assert receipts(tmp_path / "south") == left
    named = Counter(run for run, *_ in receipts(tmp_path / "south", runs=True).elements())
    assert named == {"": 1, "r": 4, ("no/run" * 9999)[:NAME]: 1}
    assert {f.name for f in (tmp_path / "south" / "egress").iterdir()} == {"r", APART}


class Wire:
    """One connection to a vault as its actor has it, and all that came out of it."""

    def __init__(self, path: Path, store: str = "south", **hello: Any) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        self.channel, self.left, self.said = Channel(sock), Left(), set[str]()
        self.channel.send({"verb": "hello", "store": store, "speaks": [3], "pipe": False, **hello})
        self.left[weighed("hello", msg.msgpack.packb(self.channel.receive(5)))] += 1

    def send(self, verb: str, **body: Any) -> None:
        self.said.add(verb)
        self.channel.send({"verb": verb, **body})

    def ask(self, verb: str, **body: Any) -> Any:
        self.send(verb, **body)
        return self.take(self.channel.receive(20))

    def take(self, answer: dict[str, Any]) -> Any:
        match answer:
            case {"refusal": bytes() as raw} | {"answer": bytes() as raw}:
                self.left[weighed(kind_of(raw), raw)] += 1
            case {"answer": str() as why}:
                self.left[weighed("pause", why.encode())] += 1
        return answer.get("answer", answer)

    def give(self, weights: np.ndarray) -> str:
        """In pieces: the name under which the vault has it then."""
        raw, name = weights.view(np.uint8), digest(weights)
        self.ask("announce", digest=name, num_bytes=raw.size)
        for at in range(0, raw.size, PIECE):
            part = raw[at : at + PIECE].tobytes()
            self.send("piece", digest=name, at=at, data=part, check=msg_check(part))
        self.channel.receive(5)
        return name

    def fetch(self, kind: str, about: dict[str, Any]) -> None:
        self.left[kind, about["num_bytes"], about["digest"]] += 1
        self.send("pull", digest=about["digest"], at=0)
        self.pull(about)

    def pull(self, about: dict[str, Any]) -> None:
        come = 0
        while come < about["num_bytes"]:
            come += len(self.channel.receive(5)["data"])


def msg_check(part: bytes) -> bytes:
    return bytes.fromhex(digest(part).removeprefix("b3:"))[:8]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    made = Here(tmp_path, case={"yield_file": "busy"}, abandon_s=10)
    yield made
    made.close()


def test_every_byte_that_leaves_a_vault_is_in_its_receipts(here: Here, tmp_path: Path) -> None:
    case, home = here.case, tmp_path / "home"
    wire, aside = Wire(here.path), Wire(here.path)
    stranger = Wire(here.path, store="north")  # is told whose vault it is
    plan, ticket = msg.encode(case.plan), msg.encode(proven(case, tmp_path))
    assert kind_of(wire.ask("describe", run="", epoch=0)) == "card"
    card = msg.expect(msg.Card, wire.ask("describe", run="r", epoch=1))
    assert card.code == "c0de", "the card's receipt is of the card as it leaves"
    (home / "busy").touch()
    wire.send("train", ticket=ticket, plan=plan, digest=wire.give(case.weights))
    until(lambda: isinstance(case.site.pausing(), str) and case.site.pausing())
    why = aside.ask("ping")
    assert "yield file" in why
    aside.send("train", ticket=ticket, plan=plan, digest="")  # joins the work that goes on
    aside_too = Wire(here.path)
    assert aside_too.ask("control", ticket="t1", command="resume", run="r", epoch=1) is True
    (home / "busy").unlink()
    reports = [wire.take(wire.channel.receive(20)), aside.take(aside.channel.receive(20))]
    assert reports[0] == reports[1]
    about = wire.ask("collect", ticket="t1", how=[{"name": "bfloat16"}], run="r", epoch=1)
    wire.fetch("update", about)
    wire.send("pull", digest=about["digest"], at=CUT_AT)  # the line was cut there, say
    wire.pull({"num_bytes": about["num_bytes"] - CUT_AT})
    sent_again = case.site.collect("t1", [{"name": "bfloat16"}], "r", 1)  # as the vault has it, of no other's account
    wire.left["update", sent_again.nbytes, digest(sent_again)] += 1
    wire.left[weighed("again", sent_again.view(np.uint8)[CUT_AT:].tobytes())] += 1
    wire.fetch("sums", wire.ask("measure", plan=plan, what="gram", epoch=1, digest=wire.give(case.weights)))
    evaluated = wire.ask("evaluate", plan=plan, split="validation", epoch=1, digest=wire.give(case.weights))
    assert kind_of(evaluated) == "evaluation"
    assert wire.ask("settle", verdict=msg.encode(msg.Verdict("t1", 1, run="r", epoch=1))) is True
    wire.ask("describe", run="r", epoch=2)
    for verb, body in {
        "describe": {"run": "../up", "epoch": 1},
        "train": {"ticket": ticket, "plan": plan, "digest": ""},
        "evaluate": {"plan": b"none", "split": "validation", "epoch": 1},
        "measure": {"plan": plan, "what": "moments", "epoch": 2},
        "collect": {"ticket": "t1", "how": [], "run": "r", "epoch": 1},
        "settle": {"verdict": msg.encode(msg.Verdict("t1", 1, run="r", epoch=1))},  # is answered here
        "control": {"ticket": "t1", "command": "dance", "run": "r", "epoch": 2},
        "announce": {"digest": "x", "num_bytes": -1},
        "pull": {"digest": "x", "at": 0},
    }.items():
        assert wire.ask(verb, **body).keys() == {"refusal"}, verb
    known = Conversation(here.vault, socket.socket())._verbs.keys()
    assert wire.said | aside.said | aside_too.said == set(known), "a verb is not tried"
    assert receipts(home) == wire.left + aside.left + aside_too.left + stranger.left


def test_a_vaults_refusals_come_through_its_actor_as_what_they_are(here: Here, tmp_path: Path) -> None:
    actor = SiteActor("south", 1.0, 0.0, 1.0, orphan_s=1e9, transport="vault")
    actor._site = here.client()
    actor.describe("r", 2)
    for wrong, raw in (
        (StoreSuperseded, actor.describe("r", 1)),
        (StoreRefused, actor.collect("t1", [], "r", 2)),
    ):
        assert isinstance(raw, bytes)
        with pytest.raises(wrong):
            msg.expect(msg.Card, raw)


def test_a_full_disk_tells_nothing_but_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path / "south", yield_file="busy")
    (tmp_path / "south" / "egress").write_text("no folder")
    for ask in (
        case.site.describe,
        lambda: case.site.describe("r", 1),
        case.train,
        lambda: case.site.evaluate(case.plan, case.weights, "validation", 1),
        lambda: case.site.measure(case.plan, case.weights, "gram", 1),
        lambda: case.site.collect("t1", [], "r", 1),
        lambda: case.site.left_again("r", case.site._outboxes["r"].report("t1")),  # type: ignore[arg-type]
        lambda: case.site.sent_again("r", "t1", b"part"),
    ):
        with pytest.raises(StoreError, match="receipts"):
            ask()
    (tmp_path / "south" / "busy").touch()
    with ThreadPoolExecutor(1) as pool:
        trained = pool.submit(case.train, {"id": "t2"})
        until(lambda: case.site._controls.current is not None and case.site._controls.current[1].pausing)
        assert case.site.pausing() == "", "why it pauses is untold"
        (tmp_path / "south" / "busy").unlink()
        with pytest.raises(StoreError, match="receipts"):
            trained.result(20)
    assert case.site.refusal(StoreClosed("no", 1.0), "train").reason == "no", "what holds nothing may go"
    monkeypatch.setenv("RAYPIPE_STORES", str(tmp_path))
    facts = look_around(["south"], datetime.now(UTC))
    assert facts.data == ()
    assert "receipts" in facts.troubles[0]


def test_what_the_doctor_tells_of_a_store_has_a_receipt_there(stores: Path) -> None:
    Case(stores / "south").site.close()
    facts = look_around(["south", "north"], datetime.now(UTC))
    assert [data.counts for data in facts.data] == [{"train": 70, "validation": 30}]
    left = Left([weighed("doctor", canonical([asdict(data) for data in facts.data]))])
    assert receipts(stores / "south") == left
    assert not (stores / "north").exists(), "no store is there, and none is made"
    (stores / "south" / "policy.yaml").write_text("store: west\ndata: {}\n")
    (said, _) = look_around(["south", "north"], datetime.now(UTC)).troubles
    left[weighed("doctor", canonical(said.removeprefix("store south: ")))] += 1
    assert receipts(stores / "south") == left


def test_many_write_the_account_of_no_run_and_it_is_one_chain(tmp_path: Path) -> None:
    about = {"kind": "card", "run": "", "ticket": "", "num_bytes": 7, "digest": "", "why": "asked"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda at: write_apart(tmp_path, at=1_795_000_000.0 + at, **about), range(60)))
    egress = read_receipts(tmp_path / APART)
    assert (egress.problems, egress.kinds["card"].messages) == ((), 60)


def test_the_command_sums_receipts_up_and_finds_a_changed_one(stores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(stores / "south")
    case.site.describe()
    case.train()
    case.site.close()
    assert main(["ledger", "receipts", "south"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("of no run: 1 card, ")
    assert said[1].startswith("r: 1 report, ")
    (file,) = (stores / "south" / "egress" / "r").glob("*.jsonl")
    file.write_text(file.read_text().replace('"num_bytes":', '"num_bytes":1'))
    assert main(["ledger", "receipts", str(stores / "south")]) == 1
    assert f"WRONG: r/{file.name}:1: its content does not have its hash" in capsys.readouterr().out
    assert main(["ledger", "receipts", "north"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"raypipe: store north has no receipts in {stores / 'north' / 'egress'}"

"""The shell with real sites in this process: no Ray, everything else as in a run."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import CLASSES, ROOT
from test_site import write

from raypipe.compose import compose
from raypipe.config.schema import RunConfig
from raypipe.coordinator.composition import Composition
from raypipe.coordinator.loop import drive
from raypipe.coordinator.tickets import AHEAD
from raypipe.data.dataset import open_data
from raypipe.data.sample import encode_png, load_sample
from raypipe.data.stores import make_stores
from raypipe.errors import ConfigError, StoreUnreachable
from raypipe.store import messages as msg
from raypipe.store.safety import refusal
from raypipe.store.site import Site
from raypipe.tracking.journal import Journal

NAMES = ["a", "b", "c"]
Spoil = Callable[[np.ndarray], np.ndarray]


class SitePort:
    """A store in this process; `spoil` is what a lying one does to its update on the way out."""

    def __init__(self, home: Path, spoil: Spoil | None = None, *, fresh: bool = True) -> None:
        if fresh:
            for kept in ("state", "heads"):  # of an earlier test's run of the same name
                shutil.rmtree(home / kept, ignore_errors=True)
        self.site, self.spoil, self.store = Site(home), spoil, home.name
        self.run, self.epoch = "run", 0

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await asyncio.to_thread(getattr(self.site, method), *arguments)
        except Exception as error:  # noqa: BLE001  as the Ray shell does
            raise msg.refusal_error(refusal(error, self.store, method, self.site._log)) from None

    async def join(self) -> msg.Card:
        return await self._ask("describe", self.run, self.epoch)

    def waiting_for(self, waited_s: float) -> str:
        return "nothing"

    async def train(
        self, ticket: msg.Ticket, plan: bytes, weights: np.ndarray, how: list[msg.Part] | None = None, *more: Any
    ) -> msg.Report:
        return await self._ask("train", ticket, msg.expect(msg.Plan, plan), weights, *more)

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        update = await self._ask("collect", ticket, how, self.run, self.epoch)
        return self.spoil(update) if self.spoil else update

    async def evaluate(self, plan: bytes, weights: np.ndarray, split: str) -> msg.Evaluation:
        return await self._ask("evaluate", msg.expect(msg.Plan, plan), weights, split, self.epoch)

    def settle(self, verdict: msg.Verdict) -> None:
        self.site.settle(replace(verdict, run=self.run, epoch=self.epoch))

    def control(self, ticket: str, command: msg.Command) -> None:
        self.site.control(ticket, command)

    async def watch(self, heartbeat_s: float, pauses: Callable[[str], None]) -> tuple[bool, str]:
        await asyncio.Event().wait()
        raise AssertionError

    def kill(self) -> None:
        pass

    async def release(self) -> None:
        pass


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores")
    split = {"name": "iid"}
    make_stores(out, NAMES, source=load_sample(), split=split, size_ratio=2.0, camera_shift=0.0, max_images=300)
    return out


def config(**changes: Any) -> dict[str, Any]:
    said: dict[str, Any] = {
        "name": "shell",
        "task": {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
        "model": {"name": "small_cnn", "width": 8},
        "stores": [{"id": name} for name in NAMES],
        "train": {"local_steps": 2, "batch_size": 16},
        "pace": "wait_for_all",
        "pacing": {"max_failures": 2, "backoff_s": 0.05},
        "stop": {"max_versions": 2},
        "local": {},
        **changes,
    }
    return RunConfig.model_validate(said).model_dump(mode="json")


def run(
    said: dict[str, Any],
    home: Path,
    ports: dict[str, Any],
    puts: list[int] | None = None,
    beside: Callable[[Composition], None] | None = None,
    patience_s: float = 60,
) -> Composition:
    """A whole run in this process; `beside` runs in a thread."""

    def put(vector: np.ndarray) -> np.ndarray:
        if puts is not None:
            puts.append(1)
        return vector.copy()

    made = compose(said, "run", home=str(home), put=put)
    for port in ports.values():
        port.epoch = made.epoch

    async def work() -> None:
        made.begin()
        if beside is not None:
            threading.Thread(target=beside, args=(made,), daemon=True).start()
        lane = asyncio.create_task(made.shell.run_lane())
        trains = {name: name != made.config.evaluate.central for name in ports}
        kept = [made.shell.keep(name, port, 1.0, 1.0, trains=trains[name]) for name, port in ports.items()]
        keeping = [asyncio.create_task(each) for each in kept]
        running = asyncio.create_task(
            drive(made.machine, made.shell.perform, made.shell.inbox, made.shell.clock, made.shell.note, made.first)
        )
        done, _ = await asyncio.wait({running, lane}, return_when=asyncio.FIRST_COMPLETED, timeout=patience_s)
        for task in (lane, running, *keeping):
            task.cancel()
        for task in done:
            task.result()
        assert running in done, f"not over in {patience_s} s: {made.machine.memory()}"

    try:
        asyncio.run(work())
    finally:
        if made.notary is not None:
            made.notary.finish()
    return made


def records(home: Path, *kinds: Any) -> list[dict[str, Any]]:
    return [r.body for r in Journal(home / "runs" / "run" / "journal.sqlite").read(kinds=kinds)]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda u: np.where(np.arange(u.size) == 7, np.float32("nan"), u), "not finite"),
        (lambda u: np.where(np.arange(u.size) == u.size - 20, np.float32("inf"), u), "not finite"),
        (lambda u: u[:-1], "expects 52224 values"),
        (lambda u: u.astype(np.float64), "float64"),
    ],
    ids=["nan", "infinite", "wrong shape", "wrong type"],
)
def test_a_spoiled_update_is_refused_recorded_and_its_store_set_aside(
    spoil: Spoil, said: str, stores: Path, tmp_path: Path
) -> None:
    ports = {name: SitePort(stores / name, spoil if name == "b" else None) for name in NAMES}
    unsigned = {"keep": False}  # else it is refused as another update than its store signed
    made = run(config(ledger=unsigned), tmp_path, ports)
    rejected = records(tmp_path, "update_rejected")
    assert [r["store"] for r in rejected] == ["b", "b"]
    assert said in rejected[0]["reason"], rejected
    assert [r["store"] for r in records(tmp_path, "store_set_aside")] == ["b"]
    versions = records(tmp_path, "version_published")
    assert [v["version"] for v in versions] == [0, 1, 2]
    assert {c["store"] for v in versions for c in v["contributions"]} == {"a", "c"}
    assert np.isfinite(made.read(2)).all()
    alone = run(
        config(ledger=unsigned, stores=[{"id": "a"}, {"id": "c"}]),
        tmp_path / "alone",
        {n: ports[n] for n in ("a", "c")},
    )
    assert made.read(2).tobytes() == alone.read(2).tobytes(), "it left a trace"


def test_weights_are_handed_out_once_a_version_and_let_go(stores: Path, tmp_path: Path) -> None:
    puts: list[int] = []
    made = run(config(stop={"max_versions": 4}), tmp_path, {n: SitePort(stores / n) for n in NAMES}, puts)
    assert len(puts) == 5
    assert sorted(made.shell.bases.handles) == [4]
    assert made.shell.updates.arrived == {}
    assert all(port.site.describe("run").outbox == () for port in made.shell.ports.values()), "every ticket was settled"


def test_a_store_whose_policy_forbids_the_task_is_set_aside_at_once_with_its_reason(
    stores: Path, tmp_path: Path
) -> None:
    shutil.copytree(stores, tmp_path / "stores", ignore=FRESH)
    policy = tmp_path / "stores" / "b" / "policy.yaml"
    policy.write_text(policy.read_text().replace("tasks: [classification]", "tasks: [detection]"))
    run(config(), tmp_path, {n: SitePort(tmp_path / "stores" / n) for n in NAMES})
    (aside,) = records(tmp_path, "store_set_aside")
    assert aside["store"] == "b"
    assert "task" in aside["reason"]


def test_a_users_own_model_loss_and_reader_train_and_promote_like_ours(
    stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raypipe import registry
    from raypipe.tracking.follow import follow
    from raypipe.tracking.registry import promote
    from raypipe.use import predict

    monkeypatch.syspath_prepend(str(ROOT / "tests" / "own_parts"))
    registry._entry_points.cache_clear()
    shutil.copytree(stores, tmp_path / "stores", ignore=FRESH)
    photos = as_photos(tmp_path / "stores" / "b")
    task = {"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1, "loss": "own_squared"}
    said = config(task=task, model={"name": "own_linear", "dropout": 0.1})
    made = run(said, tmp_path, {n: SitePort(tmp_path / "stores" / n) for n in NAMES})
    assert made.machine.version == 2
    assert made.read(2).tobytes() != made.read(0).tobytes()
    (joined,) = [r for r in records(tmp_path, "store_joined") if r["store"] == "b"]
    assert joined["counts"] == photos
    contributions = [c for v in records(tmp_path, "version_published") for c in v["contributions"]]
    assert [c["examples"] > 0 for c in contributions if c["store"] == "b"] == [True, True]

    folder = tmp_path / "runs" / "run"
    follow(folder, home=tmp_path, patience_s=30)
    assert promote(folder, 2, home=tmp_path).uri == "models:/shell@champion"
    image = next((tmp_path / "stores/b/photos/train").iterdir())
    (found,) = predict("models:/shell@champion", [image], home=tmp_path)
    assert found.label in CLASSES
    registry._entry_points.cache_clear()


FRESH = shutil.ignore_patterns("state", "heads", "egress")  # what other tests' runs, of the same name, left there


def as_photos(store: Path) -> dict[str, int]:
    """Its data set as a user's own tree of files, and its policy naming the reader for it; images by split."""
    data, counts = open_data(store / "data" / "products", name="products"), {}
    for split in ("train", "validation"):
        labels = data.split(split).labels
        pixels, _ = data.split(split).decode(np.arange(len(labels)), size=28, channels=1)
        (folder := store / "photos" / split).mkdir(parents=True)
        for number, (label, image) in enumerate(zip(labels, pixels[:, 0], strict=True)):
            (folder / f"{CLASSES[label].replace('/', '_')}-{number}.png").write_bytes(
                encode_png(image[None], level=1)[0]
            )
        counts[split] = len(labels)
    policy = yaml.safe_load((store / "policy.yaml").read_text())
    own = {"folder": "photos", "reader": "own_photos", "names": {"T-shirt_top": "T-shirt/top"}}
    policy["data"]["products"] = own
    (store / "policy.yaml").write_text(yaml.safe_dump(policy))
    shutil.rmtree(store / "data")
    return counts


def test_a_central_validation_set_alone_judges_and_nobody_trains_on_it(stores: Path, tmp_path: Path) -> None:
    sample, split = load_sample(), {"name": "iid"}
    make_stores(tmp_path / "head", ["centre"], source=sample, split=split, camera_shift=0.0, max_images=100, seed=9)
    shutil.copytree(stores, tmp_path / "stores", ignore=FRESH)
    ports = {n: SitePort(tmp_path / "stores" / n) for n in NAMES}
    ports["centre"] = SitePort(tmp_path / "head" / "centre")
    made = run(config(evaluate={"central": "centre"}), tmp_path, ports)
    judged = records(tmp_path, "evaluated")
    assert all("centre" in r["stores"] for r in judged)  # stores may have judged too: their word is shown
    assert judged[-1]["version"] == 2
    assert {c["store"] for v in records(tmp_path, "version_published") for c in v["contributions"]} == {*NAMES}
    plan = made.stages.at(2).plan
    seen = ports["centre"].site.evaluate(plan, made.read(2), "validation", made.epoch)
    assert judged[-1]["stores"]["centre"]["num_examples"] == seen.num_examples > 0
    assert judged[-1]["metrics"]["accuracy"] == pytest.approx(seen.sums["accuracy"] / seen.num_examples)
    assert made.machine.scores.best is not None
    assert made.machine.scores.best[1] == pytest.approx(max(r["metrics"]["accuracy"] for r in judged))


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cached", "decoded per batch"])
def test_images_that_cannot_be_read_are_said_once_a_store(cache_bytes: int, stores: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "b", num=70, broken=(3, 11, 12), classes=tuple(CLASSES), store="b")
    ports = {n: SitePort(folder if n == "b" else stores / n) for n in NAMES}
    ports["b"].site = Site(folder, cache_bytes=cache_bytes)
    train = {"local_epochs": 1, "local_steps": None, "batch_size": 70, "max_bad_share": 0.05}
    made = run(config(train=train, stop={"max_versions": 3}), tmp_path, ports)
    said = [(r["store"], r["skipped"], r["of"]) for r in records(tmp_path, "images_skipped")]
    assert said == [("b", 3, 70)]
    assert [line for line in made.board.lines if "cannot be read" in line] == [
        "b: 3 of 70 images cannot be read, left out"
    ]


def test_bytes_both_ways_are_counted(stores: Path, tmp_path: Path) -> None:
    made = run(config(update=["bfloat16"]), tmp_path, {n: SitePort(stores / n) for n in NAMES})
    layout = made.shell.publisher.model.layout
    first = records(tmp_path, "version_published")[1]
    assert first["bytes_up"] == 3 * 2 * layout.update_size
    assert first["bytes_down"] == 3 * 4 * layout.size
    assert first["bytes_total"] == first["bytes_up"] + first["bytes_down"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small filesystem: needs root")
def test_a_full_disk_is_said_and_waited_for_and_nothing_is_lost(stores: Path, tmp_path: Path) -> None:
    home = tmp_path / "small"
    home.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "raypipe-test", str(home)], check=True)
    try:
        said = config(stop={"max_versions": 8}, track={"keep_last": 100, "mlflow": False}, model={"name": "small_cnn"})
        seen: list[str] = []

        def make_room(made: Composition) -> None:
            """Once it is said that there is none."""
            while not (full := [line for line in made.board.lines if "it goes on when there is room" in line]):
                time.sleep(0.1)
            seen.extend(full)
            subprocess.run(["mount", "-o", "remount,size=100m", str(home)], check=True)

        made = run(said, home, {n: SitePort(stores / n) for n in NAMES}, beside=make_room)
        assert "No space left" in seen[0]
        assert "\n" not in seen[0]
        assert made.machine.version == 8
        assert [v["version"] for v in records(home, "version_published")] == list(range(9))
        assert sorted(r["version"] for r in records(home, "weights_kept")) == list(range(9))
    finally:
        subprocess.run(["umount", "--lazy", str(home)], check=True)


class NoOp:
    """A store that does nothing at once, with an update of the right size."""

    def __init__(self, name: str, update: np.ndarray) -> None:
        self.name, self.update = name, update

    async def join(self) -> msg.Card:
        return msg.Card(self.name, 1, {"products": {"train": 10}}, (), (), 1.0, None, "n", 1, {}, {})

    def waiting_for(self, waited_s: float) -> str:
        return ""

    async def train(
        self, ticket: msg.Ticket, plan: bytes, weights: Any, how: list[msg.Part] | None = None
    ) -> msg.Report:
        return msg.Report(ticket.id, self.name, ticket.version, 1, 32, 10, 0, 0.001, 1.0, 4, "done")

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        return self.update.copy()  # as each store's own: who keeps it, keeps its bytes

    async def evaluate(self, plan: bytes, weights: Any, split: str) -> msg.Evaluation:
        raise StoreUnreachable("no validation here")

    def settle(self, verdict: msg.Verdict) -> None: ...
    def control(self, ticket: str, command: msg.Command) -> None: ...
    def kill(self) -> None: ...
    async def release(self) -> None: ...

    async def watch(self, heartbeat_s: float, pauses: Callable[[str], None]) -> tuple[bool, str]:
        await asyncio.Event().wait()
        raise AssertionError


def peak_growth(num_stores: int, home: Path) -> tuple[int, int]:
    """Peak resident bytes that a run of no-op stores adds, and the model's bytes; meant for a process of its own."""
    names = [f"s{i:03}" for i in range(num_stores)]
    said = config(
        stores=[{"id": n} for n in names],
        task={"name": "classification", "classes": CLASSES, "image_size": 28, "channels": 1},
        model={"name": "resnet18"},
        stop={"max_versions": 3},
        track={"mlflow": False},
        ledger={"keep": False},
    )
    made = compose(said, "warm", home=str(home / "warm"), put=lambda v: None)  # imports and the first torch calls
    size, model_bytes = made.shell.publisher.model.layout.update_size, made.shell.publisher.model.layout.size * 4
    update = np.zeros(size, np.float32)
    update += 1e-4  # touched: it counts before, not in the run
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    del made
    run_no_ops(said, home, {n: NoOp(n, update) for n in names})
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, model_bytes


def run_no_ops(said: dict[str, Any], home: Path, ports: dict[str, NoOp]) -> None:
    made = compose(said, "run", home=str(home), put=lambda v: None)

    async def work() -> None:
        made.begin()
        lane = asyncio.create_task(made.shell.run_lane())
        keeping = [asyncio.create_task(made.shell.keep(n, p, 1.0, 1.0)) for n, p in ports.items()]
        await drive(made.machine, made.shell.perform, made.shell.inbox, made.shell.clock, made.shell.note, made.first)
        for task in (lane, *keeping):
            task.cancel()

    asyncio.run(work())


def test_the_coordinators_memory_does_not_grow_with_stores(tmp_path: Path) -> None:
    grown = {}
    for stores in (10, 100):
        home = tmp_path / str(stores)
        code = f"import test_shell as t, pathlib; print(*t.peak_growth({stores}, pathlib.Path({str(home)!r})))"
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
        grown[stores], model_bytes = map(int, done.stdout.split())
    models = {stores: growth / model_bytes for stores, growth in grown.items()}
    # Weights, the sum's two vectors (no transform state), half for all else; and AHEAD updates and one that is folded.
    assert models[100] <= 3.5 + AHEAD + 1, models
    assert models[100] - models[10] <= AHEAD, models  # of ten the last ones may not have been ahead of their turn


def test_a_run_that_is_refused_leaves_no_record_that_anything_would_take_for_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'/nope' is no \.safetensors file"):
        compose(config(warm_start="/nope"), "run", home=str(tmp_path), put=lambda vector: vector)
    assert not (tmp_path / "runs").exists()

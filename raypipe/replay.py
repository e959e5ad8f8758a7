"""A run made again from its record, at the stores' data: the same versions, byte for byte, or the first that differs.

The record says of each version which updates are in it, in which order and with which weights, and of each update all
that its training followed from. So any run can be replayed, asynchronous ones too: what was chance then (who came
first, how many steps fitted into the time) is a fact now. Sums depend on a processor's vector instructions: the
replay needs the same architecture, and a store that trained on a GPU cannot be replayed to the bit. The record says
what the coordinator and each store computed with; `strange` says where that is another here.

    journal -> [version | withdrawal] in order -> contributions trained again -> folded as recorded -> hash compared
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from pydantic import TypeAdapter

from raypipe.aggregation.statistics import pooled, put
from raypipe.aggregation.variates import Learned, Sent, Variates
from raypipe.compose import initial_model
from raypipe.config.schema import RunConfig
from raypipe.coordinator.stages import Stage
from raypipe.errors import ConfigError, RunError, StoreError
from raypipe.ledger.keys import digest
from raypipe.models.growth import Growth
from raypipe.models.tensors import vector_from
from raypipe.plans import first_stage, norms_of, recorded_stage
from raypipe.run import policy_of
from raypipe.store.messages import Part, Ticket
from raypipe.store.processor import fewer, machine, same
from raypipe.store.seeds import ticket_seed
from raypipe.tasks.class_list import Change, ClassList
from raypipe.tracking.journal import FILE, Journal, Record
from raypipe.tracking.records import Kind, RunStarted
from raypipe.tracking.versions import FOLDER, VersionStore
from raypipe.update.codec import encode_chain

if TYPE_CHECKING:
    from raypipe.store.kept import State
    from raypipe.store.retrain import Retrainer

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
NEEDED = ("progress", "repeat", "after")
KINDS: tuple[Kind, ...] = ("run_started", "store_joined", "version_published", "version_withdrawn")


@dataclass(frozen=True, slots=True)
class Made:
    """A version made again. `hints`: what else was not as recorded, a line each. `vector` changes with the next."""

    version: int
    recorded: str
    found: str
    hints: list[str]
    vector: Array

    @property
    def same(self) -> bool:
        return self.recorded == self.found


@dataclass(slots=True)
class Point:
    """A version as a later one needs it: so many trainings begin from it or withdrawals go back to it."""

    uses: int = 0
    vector: Array | None = None
    state: dict[str, Array] = field(default_factory=dict)
    variates: Variates | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """What has to be remembered: of each version by its place in the record, of each ticket what it left."""

    points: dict[int, Point]
    bases: dict[tuple[int, int], int]  # (place, base version) -> the place of that version as it was then
    states: Counter[str]
    back: dict[int, int]  # place of a withdrawal -> place of the version that is the newest again

    @classmethod
    def of(cls, records: list[Record]) -> Needs:
        """From the record alone. Raises RunError where it does not hold together."""
        needs, live = cls({}, {}, Counter(), {}), dict[int, int]()

        def place(version: int, of: Record) -> int:
            if version not in live:
                raise RunError(f"record {of.seq} builds on version {version}, of which the record has nothing")
            needs.points[live[version]].uses += 1
            return live[version]

        for record in records:
            if record.kind == "version_published":
                if (measured := record.body.get("recalibrated")) and measured["of"] is not None:
                    needs.bases[record.seq, measured["of"]] = place(measured["of"], record)
                for part in record.body["contributions"]:
                    needs.bases[record.seq, part["base"]] = place(part["base"], record)
                    needs.states[part["after"] or ""] += 1
                needs.points[record.seq] = Point()
                live[record.body["version"]] = record.seq
            elif record.kind == "version_withdrawn":
                live.pop(record.body["version"], None)
                needs.back[record.seq] = place(record.body["version"] - 1, record)
        return needs


class Replay:
    """One run. `stores`: the folder with a folder for each store that trained."""

    def __init__(self, folder: Path, stores: Path) -> None:
        """Raises ConfigError: a store's data is not here or is another; RunError: the record does not suffice."""
        journal = Journal(folder / FILE)
        self._records = list(journal.read(kinds=KINDS))
        journal.close()
        first = next((r.body for r in self._records if r.kind == "run_started"), None)
        if first is None:
            raise RunError("this run never started: there is nothing to replay")
        self.started: RunStarted = first  # type: ignore[assignment]  # JSON of that kind
        self.run = str(first["run"])
        self._said = RunConfig.model_validate(first["config"])
        self._by_steps = policy_of(self._said).weigh == "steps"
        self._check_record()
        self._stores = self._open_stores(stores)
        self._model = initial_model(self._said)
        if self._said.warm_start or self._said.closed_form is not None:  # its version 0 was given to the run
            given = VersionStore(folder / FOLDER).read(0)
            self._model.restore(vector_from(self._model.layout, given), self._model.state)
        self._stage = first_stage(self._said, self.run, self._model.form)  # of the newest version
        self._stages: dict[int, Stage] = {}  # by a version's place in the record
        self._needs = Needs.of(self._records)
        self._states: dict[str, State | None] = {}

    @property
    def num_versions(self) -> int:
        return len(self._needs.points)

    @property
    def layout(self) -> Any:
        """Of the vectors."""
        return self._model.layout

    @property
    def task(self) -> Part:
        """That the newest version is of: its class list may have changed."""
        return self._stage.plan.task

    def other_environment(self) -> dict[str, str]:
        """In which this machine computes as all of those did, where it can and does not; see processor.py."""
        kinds = ("run_started", "store_joined")
        return fewer({r.body["machine"] for r in self._records if r.kind in kinds and r.body.get("machine")}, machine())

    def strange(self) -> list[str]:
        """What may be why a version differs: other machines than this one, a line each."""
        cards = [r.body for r in self._records if r.kind == "store_joined" and r.body["store"] in self._stores]
        had = {"the coordinator": {r.body.get("machine", "") for r in self._records if r.kind == "run_started"}}
        for card in sorted(cards, key=lambda card: str(card["store"])):
            had.setdefault(f"store {card['store']}", set()).add(card.get("machine", ""))
        here = machine()
        found = [f"{who} had {one}; here is {here}" for who in had for one in sorted(had[who]) if not same(one, here)]
        gpus = {card["store"] for card in cards if card["gpu"]}
        found += [f"store {store} trained on a GPU, whose sums are not repeated here" for store in sorted(gpus)]
        many = [store for store in self._said.stores if store.num_ranks > 1 and store.id in self._stores]
        return found + [f"store {s.id} trained in {s.num_ranks} processes, here it is one" for s in many]

    def versions(self) -> Iterator[Made]:
        """Each version that was ever a fact, also those that were withdrawn later, in the order of the record."""
        for record in self._records:
            if record.kind == "version_published":
                yield self._make(record)
            elif record.kind == "version_withdrawn":
                point = self._point(place := self._needs.back[record.seq])
                assert point.vector is not None
                self._stage = self._stages[place]
                self._model.restore(point.vector, point.state, self._stage.form, point.variates)

    def _make(self, record: Record) -> Made:
        body, hints = record.body, list[str]()
        for part in body["contributions"]:
            trained, learned = self._trained(record.seq, part, hints)
            update = encode_chain(self._said.update, trained)
            if part.get("digest") not in (None, "", digest(update)):
                hints.append(f"{_name(part)} is not the one that the store signed")
            steps = part["steps"] if self._by_steps else None
            form = self._stages[self._needs.bases[record.seq, part["base"]]].form
            for reason in self._model.fold([(update, part["weight"], steps)], [form], [learned]).values():
                hints.append(f"{_name(part)} is refused now: {reason}")
        if body["contributions"]:
            self._model.step(body["full_weight"], body["statistic_mix"])
        if body.get("classes"):
            self._grow(body)
        if body.get("recalibrated"):
            return self._measured(record, hints)
        self._stages[record.seq] = self._stage
        point = self._needs.points[record.seq]
        if point.uses:
            point.vector = self._model.vector.copy()
            point.state = {name: values.copy() for name, values in self._model.state.items()}
            point.variates = self._model.variates  # never changed in place
        return Made(body["version"], body["hash"], digest(self._model.vector), hints, self._model.vector)

    def _measured(self, record: Record, hints: list[str]) -> Made:
        """A run's last version, which differs from another in its statistics alone. Nothing follows from it."""
        body, asked = record.body, record.body["recalibrated"]
        stage, vector = self._stage, self._model.average
        if asked["of"] is not None:
            vector = self._point(self._needs.bases[record.seq, asked["of"]]).vector
        assert vector is not None
        vector = vector.copy()
        for layer in norms_of(self._said, stage) if asked["stores"] else ():
            what = (asked["images"], layer)
            sums = {s: self._stores[s].statistics(stage.plan, vector, *what) for s in asked["stores"]}
            both = pooled(sums, asked["stores"])
            if both is None or not put(vector, stage.layout, layer, both):
                raise RunError(f"the statistics of layer {layer} are not finite now")
        return Made(body["version"], body["hash"], digest(vector), hints, vector)

    def _grow(self, body: dict[str, Any]) -> None:
        before, self._stage = self._stage, recorded_stage(self._stage, body)
        change, classes = TypeAdapter(Change).validate_python(body["classes"]["change"]), ClassList.of(before.plan.task)
        self._model.grow(Growth(before.form, self._stage.form, classes.live, classes.begins(change)))

    def _trained(self, seq: int, part: dict[str, Any], hints: list[str]) -> tuple[Array, Learned | None]:
        """The update, and what its control variate is derived from."""
        store, after = part["store"], part["after"]
        if after and after not in self._states:
            raise RunError(f"{_name(part)} went on from what ticket {after} left, which is not in the record")
        place = self._needs.bases[seq, part["base"]]
        base = self._point(place)
        weights, sent = base.vector, Sent(store) if base.variates is None else base.variates.sent(store)
        assert weights is not None
        if part.get("data_hash") not in (None, "", self._stores[store].content_hash(self._said.data)):
            hints.append(f"{_name(part)} was trained on other images than lie there now")
        ticket = Ticket(
            id=part["ticket"],
            store=store,
            epoch=0,
            version=part["base"],
            seed=ticket_seed(self._said.seed, store, part["base"], part["repeat"]),
            progress=(part["progress"], part["progress"]),
            max_steps=part["steps"],
        )
        try:
            plan = self._stages[place].plan
            again = self._stores[store].train(ticket, plan, weights, self._states.get(after), sent.correction())
        except StoreError as error:
            raise RunError(f"{_name(part)} cannot be trained again: {error.message}") from None
        outcome = again.outcome
        if (outcome.steps, outcome.examples, outcome.loss) != (part["steps"], part["examples"], part["loss"]):
            now = f"{outcome.examples} images, loss {outcome.loss}"
            then = f"{part['examples']} images, loss {part['loss']}"
            hints.append(f"{_name(part)} trains otherwise: {now}; by the record {then}")
        self._keep_state(part["ticket"], after, again.state)
        if base.variates is None:
            return again.update, None
        return again.update, Learned(sent, part["steps"], part["progress"], part["worth"], part["base"])

    def _keep_state(self, ticket: str, after: str, state: State | None) -> None:
        wanted = self._needs.states
        wanted[after] -= 1
        if after and not wanted[after]:
            del self._states[after]
        if wanted[ticket]:
            self._states[ticket] = state

    def _point(self, seq: int) -> Point:
        """For one of its uses; after the last one its memory is free."""
        point = self._needs.points[seq]
        taken = Point(point.uses, point.vector, point.state, point.variates)
        point.uses -= 1
        if not point.uses:
            point.vector, point.state, point.variates = None, {}, None
        return taken

    def _check_record(self) -> None:
        for record in self._records:
            if record.kind == "version_published" and any(p[key] is None for p in _parts(record) for key in NEEDED):
                number = record.body["version"]
                raise RunError(f"version {number} was recorded by an older raypipe, without what a replay needs")

    def _open_stores(self, home: Path) -> dict[str, Retrainer]:
        """Those that contributed. Raises ConfigError with a line for each that is not here as it was."""
        from raypipe.store.retrain import Retrainer

        opened: dict[str, Retrainer] = {}
        problems = []
        cards = {r.body["store"]: r.body for r in self._records if r.kind == "store_joined"}
        hashes = {(r.body["store"], r.body.get("hash")) for r in self._records if r.kind == "store_joined"}
        measured = {store for r in self._records for store in r.body.get("recalibrated", {}).get("stores", {})}
        for store in sorted(measured | {p["store"] for r in self._records for p in _parts(r)}):
            if not (home / store / "policy.yaml").is_file():
                problems.append(f"store {store}: its data is not on this machine (no policy file in {home / store})")
                continue
            try:
                opened[store] = Retrainer(home / store, max(1, int(cards[store]["cpus"])))
                if (store, opened[store].content_hash(self._said.data)) not in hashes:
                    problems.append(f"store {store}: its data set {self._said.data!r} is not what it trained on then")
            except (ConfigError, StoreError) as error:
                problems.append(f"store {store}: {error.message}")
        if problems:
            raise ConfigError(problems)
        return opened


def _parts(record: Record) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = record.body.get("contributions", [])
    return parts


def _name(part: dict[str, Any]) -> str:
    return f"store {part['store']}'s update of ticket {part['ticket']}"

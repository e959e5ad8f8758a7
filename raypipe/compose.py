"""All parts of one run, put together; a run that died is taken up where it was left.

With run.py and cli.py the only file that knows all rooms.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.config.load import to_dict
from raypipe.config.schema import RunConfig
from raypipe.coordinator.actions import Action, Record
from raypipe.coordinator.bases import Bases
from raypipe.coordinator.board import Board
from raypipe.coordinator.composition import Composition
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.events import Tick
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.notary import Notary
from raypipe.coordinator.publisher import Publisher
from raypipe.coordinator.resume import bring_back
from raypipe.coordinator.room import when_there_is_room
from raypipe.coordinator.shell import Shell
from raypipe.coordinator.stages import Next, Stage, Stages, rehearse
from raypipe.errors import RunError
from raypipe.ledger import roster
from raypipe.models import licence_of
from raypipe.models.growth import Form
from raypipe.placement.homes import raypipe_home
from raypipe.run import classes_of, initial_of, policy_of
from raypipe.store.code import code_hash
from raypipe.store.correct import reach
from raypipe.store.messages import Plan
from raypipe.store.schedules import schedules
from raypipe.tasks import tasks
from raypipe.tasks.class_list import Change, ClassList
from raypipe.tracking.book import RunBook
from raypipe.tracking.journal import FILE
from raypipe.types import Layout

if TYPE_CHECKING:
    from raypipe.aggregation.global_model import GlobalModel

GRACE_S = 60.0  # for the stores to return after the coordinator did


def compose(
    config: dict[str, Any],
    run: str,
    *,
    home: str | None,
    put: Callable[[np.ndarray], Any],
    must_exist: bool = False,
    start: np.ndarray | None = None,
    asked: Sequence[dict[str, Any]] = (),
) -> Composition:
    """All parts of a run, in the process that will coordinate it. `put` makes weights fetchable.

    `start`: version 0's weights where they are not the usual ones; `asked`: what prelude.py asked of the stores.

    A run whose folder is there already is taken up where it was left. Raises RaypipeError.
    """
    said = RunConfig.model_validate(config)
    place = Path(home) if home else raypipe_home()
    folder = place / "runs" / run
    there = (folder / FILE).is_file()
    if must_exist and not there:
        raise RunError(f"no run named {run!r} on the coordinator's machine, in {folder.parent}")
    model = initial_model(said)
    layout, stages = model.layout, Stages(first_stage(said, run, model.form))
    rehearse(stages.at(0), next_stage(said), classes_of(said)[1])
    every = (said.track.keep_every, said.track.log_model_every)
    board, diary, code, plan = Board(said.evaluate.metric), Diary(folder), code_hash(), stages.at(0).plan
    room: dict[str, Any] = {"folder": folder, "num_bytes": model.vector.nbytes, "say": board.lines.append}
    book = when_there_is_room(partial(RunBook, folder, said.track.keep_last, every, time.time), **room)
    past = _past(book, board) if there else _Past()
    board.lines += [line for line in (book.damage, past.other_code(code), licence_of(said.model)) if line]
    again = bool(past.versions)  # else it died before its first version, or is new
    if start is not None and not again:
        model.restore(start, model.state)
    elif said.warm_start and not again:
        from raypipe.tracking.registry import load_weights

        model.restore(load_weights(said.warm_start, layout), model.state)
    machine = new_machine(said if past.config is None else RunConfig.model_validate(past.config))
    first: list[Action] = []
    if again:
        first = _take_up(past, machine, diary, book, model, stages, board)
        machine.policy = policy_of(said)
    elif said.pacing.max_active_stores is not None:
        first = machine.handle(Tick(machine.now))  # whom to ask for first
    clock = _clock(machine.memory().now)
    notary = _notary(said, place, run, board, demo=home is not None and said.local is not None)
    epochs = said.train.local_epochs
    timed = said.pace == "paced" or said.pacing.budget_s is not None
    if epochs is None and said.train.local_steps is None and not timed:
        epochs = 1.0
    publisher = Publisher(
        stages=stages,
        next_stage=next_stage(said),
        model=model,
        book=book,
        diary=diary,
        board=board,
        bases=Bases(stages, book, put, varies=model.variates is not None),
        clock=clock,
        wall=time.time,
        notary=notary,
    )
    shell = Shell(
        run=run,
        seed=said.seed,
        epoch=past.epoch + 1,
        how=said.update,
        max_epochs=epochs,
        max_steps=said.train.local_steps,
        publisher=publisher,
        memory=machine.memory,
        put=put,
        notary=notary,
        asks_all=said.pacing.max_active_stores is None,
    )
    body = started(said, run, layout, plan, code, past.epoch + 1, home is None)
    publisher.record("run_started", body | ({"asked": list(asked)} if asked else {}))
    publisher.moved_before(sum(fact["bytes_up"] + fact["bytes_down"] for fact in asked))
    if past.again is not None:
        publisher.record(
            "version_withdrawn", {"version": past.again, "reason": "its statistics are measured once more"}
        )
    for version in past.withdrawn:
        publisher.record("version_withdrawn", {"version": version, "reason": "its weights were lost"})
    shell.owe(first)
    owed = [action for action in first if isinstance(action, Record)]
    when_there_is_room(partial(diary.checkpoint, machine.memory(), owed), **room)
    begin = partial(publisher.resume, past.newest) if again else publisher.begin

    def read(version: int) -> np.ndarray:
        return book.read(version, stages.at(version).layout)

    return Composition(
        said, machine, shell, board, stages, place, folder, past.epoch + 1, code, book.versions.kept, read, begin,
        first, notary, lambda version: norms_of(said, stages.at(version)),
    )  # fmt: skip


def norms_of(said: RunConfig, stage: Stage) -> list[str]:
    """Layers whose statistics are measured anew at the end: those of a model of images, in the order of a batch."""
    import torch

    from raypipe.models import build_for
    from raypipe.models.norms import norm_order
    from raypipe.store.measure import forward

    task = tasks.build(stage.plan.task)
    if task.table is not None or not stage.layout.moments:
        return []
    module = build_for(task, {key: value for key, value in said.model.items() if key != "pretrained"})
    images = torch.zeros(1, task.channels, task.image_size, task.image_size, dtype=torch.uint8)
    return norm_order(module, stage.layout, forward(module, task, images, torch.zeros(0, 7)))


def _notary(said: RunConfig, place: Path, run: str, board: Board, *, demo: bool) -> Notary | None:
    """The run's ledger, open. Demo stores have a roster of their own, as real ones may bear the same names."""
    if not said.ledger.keep:
        return None
    notary = Notary(
        place / "runs" / run,
        place,
        run,
        roster_file=(place / "demo" / said.name if demo else place) / roster.FILE,
        rule=said.ledger.roster,
        threads=threads_of(said),
        wall=time.time,
        say=board.lines.append,
    )
    notary.open()
    return notary


def initial_model(said: RunConfig) -> GlobalModel:
    """Version 0 of a run that begins from nothing; equal for equal configurations."""
    from raypipe.aggregation.global_model import GlobalModel
    from raypipe.aggregation.transforms import transforms

    task = tasks.build(said.task)
    layout, vector = initial_of(said, task)
    form = Form.of(layout, task.num_outputs, boxes=task.boxes is not None)
    more: dict[str, Any] = {"how": said.update, "normalise": said.pacing.normalise, "threads": threads_of(said)}
    return GlobalModel(form, vector, transforms.build(said.server), reach=reach_of(said), **more)


def reach_of(said: RunConfig) -> Callable[[int, float], float] | None:
    """How far a ticket's steps go, by their number and the run's progress; None without control variates.

    A ticket's progress is that of its beginning throughout, and so is its learning rate.
    """
    if not said.train.control_variates:
        return None
    train, schedule = said.train, schedules.build(said.train.schedule)

    def reached(steps: int, progress: float) -> float:
        return train.lr * schedule(progress) * reach(train.optimizer, steps, kept=train.keep_optimizer)

    return reached


def first_stage(said: RunConfig, run: str, form: Form) -> Stage:
    """What a run begins with."""
    return Stage(0, plan_of(said, run, form.layout), form)


def next_stage(said: RunConfig) -> Next:
    """What follows a stage at a version whose class list changes. Raises ConfigError for a change that cannot be."""

    def follow(before: Stage, version: int, change: Change) -> Stage:
        part = ClassList.of(before.plan.task).changed(change).task(before.plan.task)
        task = tasks.build(part)
        layout = before.layout
        if task.num_outputs != before.form.num_classes:
            spec = {key: value for key, value in said.model.items() if key != "pretrained"}
            layout, _ = initial_of(said.model_copy(update={"model": spec}), task)
        form = Form.of(layout, task.num_outputs, boxes=task.boxes is not None)
        return Stage(version, replace(before.plan, task=part, layout=layout.fingerprint), form)

    return follow


def recorded_stage(before: Stage, body: Mapping[str, Any]) -> Stage:
    """The same as a version's record has it."""
    said = body["classes"]
    task, layout = tasks.build(said["task"]), Layout.from_json(said["layout"])
    form = Form.of(layout, task.num_outputs, boxes=task.boxes is not None)
    return Stage(body["version"], replace(before.plan, task=said["task"], layout=layout.fingerprint), form)


def threads_of(said: RunConfig) -> int | None:
    """For the coordinator's arithmetic; None: as many as help. On one machine the cores belong to the stores."""
    return None if said.local is None else 1


def plan_of(said: RunConfig, run: str, layout: Layout) -> Plan:
    """What each ticket of a run is told."""
    return Plan(
        run=run,
        task=said.task,
        model=said.model,
        data=said.data,
        optimizer=said.train.optimizer,
        lr=said.train.lr,
        schedule=said.train.schedule,
        batch_size=said.train.batch_size,
        layout=layout.fingerprint,
        keep_optimizer=said.train.keep_optimizer,
        max_bad_share=said.train.max_bad_share,
        update=said.update,
        trained=said.train.trained,
        fix_statistics_from=said.train.fix_statistics_from,
        local=said.train.local,
    )


def new_machine(said: RunConfig) -> Coordinator:
    """A run's machine as it begins: the run's policy, and chance by its seed."""

    def chance(version: int) -> random.Random:
        return random.Random(f"{said.seed}/{version}")

    ids = [store.id for store in said.stores]
    classes, changes = classes_of(said)
    return Coordinator(
        policy_of(said), ids, metric=said.evaluate.metric, chance=chance, start_at=0.0, classes=classes, changes=changes
    )


def _clock(start: float) -> Callable[[], float]:
    """Seconds of the run's own clock, which stands still while nobody coordinates."""
    begun = time.monotonic()
    return lambda: start + time.monotonic() - begun


def started(
    said: RunConfig, run: str, layout: Layout, plan: Plan, code: str, epoch: int, cluster: bool
) -> dict[str, Any]:
    """The record's first fact: see RunStarted."""
    from raypipe.store.processor import machine  # imports torch

    licence = licence_of(said.model)
    return {
        "run": run,
        "name": said.name,
        "config": to_dict(said),
        "layout": layout.to_json(),
        "plan": asdict(plan),
        "code_hash": code,
        "at": time.time(),
        "stores": [store.id for store in said.stores],
        "experiment": said.track.experiment or said.name,
        "register_as": said.track.register_as or said.name,
        "epoch": epoch,
        "cluster": cluster,
        "machine": machine(),
        **({"licence": licence} if licence else {}),
    }


@dataclass
class _Past:
    """What the record says of a run that is taken up again."""

    epoch: int = 0
    told: int = 0  # the machine's records
    config: dict[str, Any] | None = None
    code: str = ""
    versions: dict[int, dict[str, Any]] = field(default_factory=dict)
    withdrawn: list[int] = field(default_factory=list)
    again: int | None = None  # a last version that is measured once more

    @property
    def newest(self) -> dict[str, Any]:
        return self.versions[max(self.versions)]

    def other_code(self, now: str) -> str:
        """That this is not the code which the run was last taken up with; empty: it is."""
        if self.code in ("", now):
            return ""
        return f"the code is another than the run had: {self.code[:12]} then, {now[:12]} now; it goes on with this one"


def _past(book: RunBook, board: Board) -> _Past:
    past = _Past()
    for kind, body in book.past():
        board.add(kind, body)
        past.told = max(past.told, body.get("told", 0))
        if kind == "run_started":
            past.epoch, past.config, past.code = body["epoch"], body["config"], body["code_hash"]
        elif kind == "run_restored":
            past.epoch = body["epoch"]
        elif kind == "version_published" and "recalibrated" in body:
            past.again = body["version"]
        elif kind == "version_published":
            past.versions[body["version"]] = body
        elif kind == "version_withdrawn":
            past.versions.pop(body["version"], None)
            past.again = None if past.again == body["version"] else past.again
        elif kind == "run_finished":
            raise RunError(f"run {book.folder.name} is over: {body['reason']}")
    return past


def _take_up(
    past: _Past, machine: Coordinator, diary: Diary, book: RunBook, model: GlobalModel, stages: Stages, board: Board
) -> list[Action]:
    """The machine as it was, the model at the newest version that can be had; what is to be done first."""
    for version, body in sorted(past.versions.items()):
        if body.get("classes"):
            stages.add(recorded_stage(stages.at(version), body))

    def intact(version: int) -> bool:
        form = stages.at(version).form
        vector = book.versions.recover(version, form.layout, past.versions[version]["hash"])
        state = book.state(version) if model.state else {}
        variates = book.table(version) if model.variates is not None else None
        if vector is None or state is None or (variates is None and model.variates is not None):
            return False
        model.restore(vector, state, form, variates)
        return True

    newest = max(past.versions)
    back = bring_back(
        machine, diary, newest=newest, told=past.told, intact=intact, epoch=past.epoch + 1, grace_s=GRACE_S
    )
    past.withdrawn = back.withdrawn
    board.lines += [back.damage] if back.damage else []
    for version in back.withdrawn:
        del past.versions[version]
        stages.withdraw(version)
    return back.actions

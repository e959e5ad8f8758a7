"""All parts of one run, put together; a run that died is taken up where it was left.

Like every file beside the rooms, it may know them all.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from raypipe.coordinator.room import when_there_is_room
from raypipe.coordinator.shell import Shell
from raypipe.coordinator.stages import Stages, rehearse
from raypipe.errors import RunError
from raypipe.ledger import roster
from raypipe.models import licence_of
from raypipe.models.growth import Form
from raypipe.past import Past, past_of, take_up
from raypipe.placement.homes import raypipe_home
from raypipe.plans import first_stage, next_stage, norms_of
from raypipe.run import classes_of, initial_of, policy_of
from raypipe.store.code import code_hash
from raypipe.store.correct import reach
from raypipe.store.messages import Plan
from raypipe.store.schedules import schedules
from raypipe.tasks import tasks
from raypipe.tracking.book import RunBook
from raypipe.tracking.journal import FILE
from raypipe.types import Layout

if TYPE_CHECKING:
    from raypipe.aggregation.global_model import GlobalModel


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
    if not there:
        _begin_with(said, model, start)  # what is refused leaves no folder
    stages = Stages(first_stage(said, run, model.form))
    rehearse(stages.at(0), next_stage(said), classes_of(said)[1])
    every = (said.track.keep_every, said.track.log_model_every)
    board, diary, code = Board(said.evaluate.metric), Diary(folder), code_hash()
    room: dict[str, Any] = {"folder": folder, "num_bytes": model.vector.nbytes, "say": board.lines.append}
    book = when_there_is_room(partial(RunBook, folder, said.track.keep_last, every, time.time), **room)
    past = past_of(book, board) if there else Past()
    board.lines += [line for line in (book.damage, past.other_code(code), licence_of(said.model)) if line]
    again = bool(past.versions)  # else it died before its first version, or is new
    if there and not again:
        _begin_with(said, model, start)
    machine, first = _machine(said, past, diary, book, model, stages, board)
    publisher = Publisher(
        stages=stages,
        next_stage=next_stage(said),
        model=model,
        book=book,
        diary=diary,
        board=board,
        bases=Bases(stages, book, put, varies=model.variates is not None),
        clock=_clock(machine.memory().now),
        wall=time.time,
        notary=_notary(said, place, run, board, demo=home is not None and said.local is not None),
    )
    shell = _shell(said, run, past.epoch + 1, publisher, machine, put)
    begun = started(said, run, stages.at(0).layout, stages.at(0).plan, code, past.epoch + 1, home is None)
    _tell(publisher, past, begun, asked)
    shell.owe(first)
    owed = [action for action in first if isinstance(action, Record)]
    when_there_is_room(partial(diary.checkpoint, machine.memory(), owed), **room)
    begin = partial(publisher.resume, past.newest) if again else publisher.begin

    def read(version: int) -> np.ndarray:
        return book.read(version, stages.at(version).layout)

    return Composition(
        said, machine, shell, board, stages, place, folder, past.epoch + 1, code, book.versions.kept, read, begin,
        first, publisher.notary, lambda version: norms_of(said, stages.at(version)),
    )  # fmt: skip


def _begin_with(said: RunConfig, model: GlobalModel, start: np.ndarray | None) -> None:
    """Version 0's weights where they are not the usual ones: those given, or another run's."""
    if start is not None:
        model.restore(start, model.state)
    elif said.warm_start:
        from raypipe.tracking.registry import load_weights

        model.restore(load_weights(said.warm_start, model.layout), model.state)


def _machine(
    said: RunConfig, past: Past, diary: Diary, book: RunBook, model: GlobalModel, stages: Stages, board: Board
) -> tuple[Coordinator, list[Action]]:
    """As it begins, or as it was, and what is to be done first."""
    machine = new_machine(said if past.config is None else RunConfig.model_validate(past.config))
    if past.versions:
        first = take_up(past, machine, diary, book, model, stages, board)
        machine.policy = policy_of(said)
        return machine, first
    asks_first = said.pacing.max_active_stores is not None
    return machine, machine.handle(Tick(machine.now)) if asks_first else []  # whom to ask for


def _shell(
    said: RunConfig, run: str, epoch: int, publisher: Publisher, machine: Coordinator, put: Callable[[np.ndarray], Any]
) -> Shell:
    epochs = said.train.local_epochs
    timed = said.pace == "paced" or said.pacing.budget_s is not None
    if epochs is None and said.train.local_steps is None and not timed:
        epochs = 1.0
    return Shell(
        run=run,
        seed=said.seed,
        epoch=epoch,
        how=said.update,
        max_epochs=epochs,
        max_steps=said.train.local_steps,
        publisher=publisher,
        memory=machine.memory,
        put=put,
        asks_all=said.pacing.max_active_stores is None,
    )


def _tell(publisher: Publisher, past: Past, body: dict[str, Any], asked: Sequence[dict[str, Any]]) -> None:
    """The record, that this coordinator has the run, and what of its versions is lost."""
    publisher.record("run_started", body | ({"asked": list(asked)} if asked else {}))
    publisher.moved_before(sum(fact["bytes_up"] + fact["bytes_down"] for fact in asked))
    if past.again is not None:
        reason = "its statistics are measured once more"
        publisher.record("version_withdrawn", {"version": past.again, "reason": reason})
    for version in past.withdrawn:
        publisher.record("version_withdrawn", {"version": version, "reason": "its weights were lost"})


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


def threads_of(said: RunConfig) -> int | None:
    """For the coordinator's arithmetic; None: as many as help. On one machine the cores belong to the stores."""
    return None if said.local is None else 1


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

"""A run that died: what its record says of it, and how it is taken up where it was left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raypipe.coordinator.actions import Action
from raypipe.coordinator.board import Board
from raypipe.coordinator.diary import Diary
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.resume import bring_back
from raypipe.coordinator.stages import Stages
from raypipe.errors import RunError
from raypipe.plans import recorded_stage
from raypipe.tracking.book import RunBook

if TYPE_CHECKING:
    from raypipe.aggregation.global_model import GlobalModel

GRACE_S = 60.0  # for the stores to return after the coordinator did


@dataclass
class Past:
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


def past_of(book: RunBook, board: Board) -> Past:
    past = Past()
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


def take_up(
    past: Past, machine: Coordinator, diary: Diary, book: RunBook, model: GlobalModel, stages: Stages, board: Board
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

"""What a run asks its stores before the first version: sums that its task lacks, and those of a closed-form head.

Both are additive, so nothing is trained and nobody's order counts; each store uploads once. What comes of them is part
of the run's configuration (the task's `scale`, `class_weights`) and of version 0's weights: so it is in the record, a
run that is taken up again asks nothing twice, and a run that dies meanwhile begins anew. The sums for a head are kept,
so that `forget` can make that head again without a store.

Like every file beside the rooms, it may know them all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from raypipe.config.schema import RunConfig
from raypipe.coordinator.asking import Answers, Question
from raypipe.errors import ConfigError, RunError
from raypipe.placement.homes import raypipe_home
from raypipe.run import initial_of, policy_of
from raypipe.store.code import code_hash
from raypipe.store.messages import Plan, encode
from raypipe.tasks import tasks
from raypipe.types import Layout

if TYPE_CHECKING:
    from raypipe.tracking.sums import Head

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Ask: TypeAlias = Callable[[RunConfig, Question], Awaitable[Answers]]


@dataclass(slots=True)
class Prepared:
    """The configuration completed, the first version's weights where they are not the usual ones, and what was done."""

    config: dict[str, Any]
    start: Array | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)


async def prepare(config: dict[str, Any], run: str, home: str | None, ask: Ask) -> Prepared:
    """Ask the stores what a run lacks. Raises RunError when too few answer, ConfigError for what cannot be."""
    from raypipe.tracking.journal import FILE
    from raypipe.tracking.lineage import read_history

    folder = (Path(home) if home else raypipe_home()) / "runs" / run
    if (folder / FILE).is_file():
        recorded = read_history(folder).run()
        return Prepared({**config, "task": recorded["config"]["task"]})
    prepared = Prepared(config)
    said = RunConfig.model_validate(config)
    settle = tasks.build(said.task).settle
    if settle is not None:
        answers = await ask(said, _question(said, _plan(said, run), None, "moments"))
        total = _sum(answers.sums)
        prepared.config = {**config, "task": {**said.task, **settle(total.tolist())}}
        prepared.asked.append(_fact("moments", answers, 0))
    if said.closed_form is not None:
        said = RunConfig.model_validate(prepared.config)
        await _closed_form(said, run, folder, prepared, ask)
    return prepared


async def _closed_form(said: RunConfig, run: str, folder: Path, prepared: Prepared, ask: Ask) -> None:
    from raypipe.models.flat import with_head
    from raypipe.tracking.sums import Head, save_sums

    assert said.closed_form is not None
    task = tasks.build(said.task)
    layout, vector = initial_of(said, task)
    if said.warm_start:
        from raypipe.tracking.registry import load_weights

        vector = load_weights(said.warm_start, layout)
    began = time.monotonic()
    answers = await ask(said, _question(said, _plan(said, run, layout), vector, "gram"))
    place, width = _head(said, task)
    head = Head(place, width, task.num_outputs, said.closed_form)
    solved, num_examples = _solved(answers.sums, head)
    prepared.start = with_head(layout, vector, place, solved)
    save_sums(folder, answers.sums, head)
    fact = _fact("gram", answers, vector.nbytes) | {
        "examples": num_examples,
        "seconds": time.monotonic() - began,
    }
    prepared.asked.append(fact)


def _solved(sums: Mapping[str, Array], head: Head) -> tuple[Array, int]:
    """The head (width + 1, outputs) of all these stores' sums, and of how many examples it is."""
    from raypipe.aggregation.closed_form import Gram

    total = Gram.zero(head.width, head.num_outputs)
    for _, own in sorted(sums.items()):  # equal answers give equal bits
        total = total + Gram.unpacked(own, head.width, head.num_outputs)
    return total.solve(head.ridge), int(total.num_examples)


def forget(run_dir: Path, stores: Sequence[str], out: Path) -> tuple[list[str], int]:
    """Version 0 of a run as if these stores had never been asked, into a new file; their sums are deleted.

    Who is left, and their examples. Equal to the bit to what a run without them begins with: the others' sums are the
    same, and their order too. Raises ConfigError: no sums are kept, none of such a store, or the file is there.
    """
    from raypipe.models.flat import with_head
    from raypipe.models.tensors import state_dict_from, vector_from
    from raypipe.tracking.lineage import read_history
    from raypipe.tracking.sums import read_sums, save_sums, without
    from raypipe.tracking.versions import FOLDER, HEADER, VersionStore

    sums, head = read_sums(run_dir)
    left = without(sums, stores)
    if out.exists():
        raise ConfigError(f"{out} is there already: name another file")
    history = read_history(run_dir)
    layout = Layout.from_json(history.run()["layout"])
    first = vector_from(layout, VersionStore(run_dir / FOLDER).read(0, history.file_hash(0)))
    solved, num_examples = _solved(left, head)
    vector = with_head(layout, first, head.name, solved)
    card = history.card(0) | {"without": sorted({*stores})}
    try:
        save_file(state_dict_from(layout, vector), out, metadata={HEADER: json.dumps(card, sort_keys=True)})
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out} could not be written: {str(error).splitlines()[0]}") from None
    save_sums(run_dir, left, head)
    return sorted(left), num_examples


def _head(said: RunConfig, task: Any) -> tuple[str, int]:
    from raypipe.models import build_for
    from raypipe.models.heads import head_of

    spec = {key: value for key, value in said.model.items() if key != "pretrained"}
    module = build_for(task, spec)
    name, head = head_of(module, task.num_outputs)
    return name, head.in_features


def _sum(sums: Mapping[str, Array]) -> Array:
    """In the order of the stores' names, so that equal answers give equal bits."""
    shapes = {array.shape for array in sums.values()}
    if len(shapes) != 1 or not all(np.isfinite(array).all() for array in sums.values()):
        raise RunError("the stores' sums do not belong together: their lengths differ or they are not finite")
    total = np.zeros(next(iter(shapes)))
    for store in sorted(sums):
        total += sums[store]
    return total


def _question(said: RunConfig, plan: Plan, weights: Array | None, what: str) -> Question:
    return Question(encode(plan), weights, what, code_hash(), policy_of(said).quorum)


def _plan(said: RunConfig, run: str, layout: Layout | None = None) -> Plan:
    return Plan(
        run=run,
        task=said.task,
        model=said.model,
        data=said.data,
        optimizer=said.train.optimizer,
        lr=said.train.lr,
        schedule=said.train.schedule,
        batch_size=said.train.batch_size,
        layout=layout.fingerprint if layout is not None else "",
        max_bad_share=said.train.max_bad_share,
        trained=said.train.trained,
    )


def _fact(what: str, answers: Answers, num_bytes: int) -> dict[str, Any]:
    """For the record: who answered, who did not and why, and what moved; `num_bytes` went to each store."""
    moved = {"bytes_up": sum(array.nbytes for array in answers.sums.values())}
    moved["bytes_down"] = num_bytes * len(answers.sums)
    return {"what": what, "stores": sorted(answers.sums), "missing": dict(answers.missing), **moved}

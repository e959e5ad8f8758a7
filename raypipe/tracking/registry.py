"""Promote versions to the model registry, go back, and open what is there; raypipe/use.py says what it is used for.

A promoted version gets a small child run of its own with its parameters and metrics: the page that compares
registered versions shows those of their runs, so versions that share a run would look identical. Beside the module,
its LoggedModel holds the plain weights and the parts they belong to; raypipe itself reads those and unpickles nothing.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.config.schema import NAME
from raypipe.errors import ConfigError, RunError
from raypipe.models.tensors import Array, vector_from
from raypipe.tracking.follow import version_name
from raypipe.tracking.lineage import History, flat_params, lineage_params, read_history
from raypipe.tracking.mlflow_sink import TROUBLE, Kept, RunPlace, Sink, one_line, points
from raypipe.tracking.versions import FOLDER, Tensors, VersionStore, read_file
from raypipe.types import Layout

if TYPE_CHECKING:
    from torch import nn

    from raypipe.tasks import Task

CHAMPION, PREVIOUS = "champion", "previous"
WEIGHTS, CARD = "state.safetensors", "raypipe.json"
log = logging.getLogger(__name__)
NOT_THERE = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}  # a model, a version; an alias
REGISTERED = re.compile(r"^models:/[^/:@]+(@[^/:@]+|/[0-9]+)$")


@dataclass(frozen=True, slots=True)
class Promotion:
    """A registered version; `previous` is the number that had the alias before."""

    name: str
    number: str
    alias: str
    previous: str | None

    @property
    def uri(self) -> str:
        return f"models:/{self.name}@{self.alias}"


def promote(
    run_dir: Path, version: int, *, alias: str = CHAMPION, uri: str | None = None, home: Path | None = None
) -> Promotion:
    """Register a version and point the alias to it; the old one stays reachable as `previous`. May be repeated.

    Raises ConfigError (no such version, weights gone, a bad alias), RunError (MLflow unreachable, run not in it yet).
    """
    previous_alias = _previous(alias)
    history, store = read_history(run_dir), VersionStore(run_dir / FOLDER)
    body, started = history.version(version), history.run()
    store.pin(version)
    card = history.card(version)
    module, task = module_of(card, store.read(version, history.file_hash(version)))
    name = started["register_as"]
    if started["config"]["train"].get("local") and not started.get("pooled"):
        log.warning("version %d has the local weights that its run began with, and no store's own", version)
    shapes = _shapes(task)
    files: dict[str, Path | str] = {
        WEIGHTS: store.path(version),
        CARD: json.dumps(card),
        "lineage.json": json.dumps(body),
    }
    kept = Kept(version_name(history, version), version, lineage_params(body), files)
    with _in_one_line():
        sink = Sink(uri, home)
        child = _child(sink, history, version)
        model_id = sink.torch_model(child, kept, module, shapes)
        for at, metrics in history.moments(version):
            sink.metrics(child.run_id, points(metrics, at, version), model_id)
        sink.end(child.run_id, "finished", body["at"])
        number = sink.register(
            name, model_id, child.run_id, f"version {version} of {started['run']}, {body['hash'][:15]}"
        )
        before = sink.alias(name, alias)
        if before not in (None, number):
            sink.set_alias(name, previous_alias, str(before))
        sink.set_alias(name, alias, number)
    return Promotion(name, number, alias, before)


def rollback(name: str, *, alias: str = CHAMPION, uri: str | None = None, home: Path | None = None) -> Promotion:
    """Swap the alias with the one before it; a second rollback undoes the first."""
    previous_alias = _previous(alias)
    with _in_one_line():
        sink = Sink(uri, home)
        now, before = sink.alias(name, alias), sink.alias(name, previous_alias)
        if now is None or before is None:
            missing = alias if now is None else previous_alias
            raise ConfigError(
                f"model {name!r} has no version with the alias {missing!r}: there is nothing to go back to"
            )
        sink.set_alias(name, alias, before)
        sink.set_alias(name, previous_alias, now)
    return Promotion(name, before, alias, now)


def load_weights(source: str, layout: Layout, *, uri: str | None = None, home: Path | None = None) -> Array:
    """A new vector from a .safetensors file or `models:/NAME@alias`, for a warm start.

    Raises ConfigError in one line when they do not fit the model or are not finite.
    """
    try:
        vector = vector_from(layout, open_weights(source, uri, home)[0])
    except ConfigError as error:
        more = f" (and {len(error.problems) - 1} more like this)" if len(error.problems) > 1 else ""
        raise ConfigError(f"weights from {source}: {error.problems[0]}{more}") from None
    if not np.isfinite(vector).all():
        raise ConfigError(f"weights from {source}: they hold values that are not finite")
    return vector


def open_weights(
    source: str, uri: str | None, home: Path | None, version: int | None = None
) -> tuple[Tensors, dict[str, Any]]:
    """Tensors by name and, where it is there, the card: of `models:/NAME@alias`, a .safetensors file, or a run's folder
    (then `version`; None for the best one). Raises ConfigError, RunError."""
    if source.startswith("models:"):
        return _open_registered(source, uri, home)
    path = Path(source)
    if path.is_dir():
        return _open_run(path, version)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ConfigError(f"{source!r} is no .safetensors file, no run's folder and no models:/NAME@alias")
    return read_file(path)


def _open_run(run_dir: Path, version: int | None) -> tuple[Tensors, dict[str, Any]]:
    """The version asked for; else the best, or where that is damaged the newest whole one before it, and says so."""
    history, store = read_history(run_dir), VersionStore(run_dir / FOLDER)
    newest = max(history.versions, default=0)
    best = history.best if history.best is not None else newest
    chosen = best if version is None else version
    try:
        tensors = store.read(chosen, history.file_hash(chosen))
    except (ConfigError, RunError) as error:
        earlier = next((v for v in reversed(store.kept()) if v < chosen and store.is_whole(v)), None)
        if version is not None or earlier is None:
            raise
        log.warning("%s: version %d is used instead", error.message.partition(";")[0], earlier)
        chosen, tensors = earlier, store.read(earlier, history.file_hash(earlier))
    return tensors, history.card(chosen)


def _open_registered(source: str, uri: str | None, home: Path | None) -> tuple[Tensors, dict[str, Any]]:
    if not REGISTERED.match(source):
        raise ConfigError(f"{source!r} is no registered model: write models:/NAME@alias or models:/NAME/3")
    with TemporaryDirectory() as folder, _in_one_line():
        sink = Sink(uri, home)
        place = sink.download(source, Path(folder))
        if (place / WEIGHTS).is_file():
            card: dict[str, Any] = json.loads((place / CARD).read_text()) if (place / CARD).is_file() else {}
            return read_file(place / WEIGHTS)[0], card
        state = sink.load_torch(place).state_dict()  # somebody else's model
        return {key: tensor.cpu().numpy() for key, tensor in state.items()}, {}


def module_of(card: Mapping[str, Any], tensors: Tensors) -> tuple[nn.Module, Task]:
    """The model of a card with these weights, in evaluation mode, and its task."""
    import torch

    from raypipe.models import build_for
    from raypipe.tasks import tasks

    task = tasks.build(card["task"])
    spec = {**card["model"], **({"pretrained": False} if "pretrained" in card["model"] else {})}  # nothing to fetch
    module: nn.Module = build_for(task, spec)
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}  # a tied weight once
    try:
        problems = module.load_state_dict({n: torch.from_numpy(np.array(t)) for n, t in tensors.items()}, strict=False)
    except RuntimeError as error:
        raise ConfigError(
            f"the weights do not fit model {spec['name']!r}: {str(error).splitlines()[-1].strip()}"
        ) from None
    wrong = [*problems.unexpected_keys, *(own & set(problems.missing_keys))]
    if wrong:
        raise ConfigError(f"the weights do not fit model {spec['name']!r}: {wrong[0]!r} is missing on one side")
    return module.eval(), task


def _shapes(task: Task) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    """Of the module's arguments by name, and of its output."""
    inputs: dict[str, tuple[int, ...]] = {}
    if task.channels:
        inputs["images"] = (-1, task.channels, task.image_size, task.image_size)
    if task.columns:
        inputs["table"] = (-1, task.columns)
    if task.boxes is not None:  # centre, sides, object, a class each; torchvision's own put out dictionaries
        return inputs, (-1, -1, 5 + task.num_outputs)
    return inputs, (-1, task.num_outputs)


def _child(sink: Sink, history: History, version: int) -> RunPlace:
    """The promoted version's own run below the training run, with its parameters."""
    started, body = history.run(), history.version(version)
    experiment = sink.experiment(started["experiment"])
    parent = sink.find_run(experiment, {"fed.run_key": started["run"]})
    if parent is None:
        raise RunError(f"run {started['run']} is not in MLflow yet: `raypipe track {started['run']}` brings it there")
    tags = {"mlflow.parentRunId": parent.run_id, "fed.promoted": version_name(history, version)}
    child = sink.run(experiment, f"{started['name']} v{version:05d}", body["at"], tags)
    sink.params(child.run_id, flat_params(started["config"]) | lineage_params(body))
    return child


def _previous(alias: str) -> str:
    """The alias of the one before. Raises ConfigError for an alias that MLflow would refuse."""
    if not NAME.match(alias) or re.match(r"^v[0-9]+$", alias) or alias in ("latest", PREVIOUS):
        raise ConfigError(f"{alias!r} cannot be an alias: take a word such as champion (not latest, previous or v42)")
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except TROUBLE as error:
        if "not found" in str(error) and getattr(error, "error_code", "") in NOT_THERE:
            raise ConfigError(f"MLflow does not have it: {one_line(error).partition(': ')[2]}") from None
        raise RunError(f"MLflow did not do it: {one_line(error)}") from None

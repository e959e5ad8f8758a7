"""Where the rooms meet: a configuration is checked against every registry, composed, and run.

It knows all rooms, as the files beside it may; no room imports them (tests/test_house.py).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raypipe.config.load import load, to_dict
from raypipe.config.schema import RunConfig
from raypipe.coordinator.explain import Sizes, explain
from raypipe.coordinator.policy import Policy, pace
from raypipe.coordinator.staleness import staleness
from raypipe.data.split import splits
from raypipe.errors import ConfigError, did_you_mean
from raypipe.models import DETECTORS, licence_of, models
from raypipe.registry import Registry
from raypipe.store.optimizers import optimizers
from raypipe.store.schedules import schedules
from raypipe.tasks import Task, tasks
from raypipe.tasks.class_list import Change, ClassList, lists, twice
from raypipe.tasks.metrics import lower_is_better
from raypipe.tracking.lineage import flat_params
from raypipe.types import Layout, Role
from raypipe.update.codec import chain, codecs, encoded_bytes

METRIC = "accuracy"  # unless another is said


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration whose every part exists and fits. Raises ConfigError with all problems, a line each."""
    config = load(path, overrides, part_problems)
    try:
        policy_of(config)
    except ValueError as error:
        raise ConfigError(f"pacing: {error}") from None
    if problems := _local_problems(config) or _class_problems(config):
        raise ConfigError(problems)
    return config


def classes_of(config: RunConfig) -> tuple[ClassList | None, dict[int, Change]]:
    """A run's first class list, None where it may not change; and the changes that are planned, by version."""
    said = {one.at_version: one for one in config.class_changes}
    changes = {v: Change(tuple(one.add), tuple(one.merge.items()), tuple(one.retire)) for v, one in said.items()}
    try:
        return ClassList.of(config.task), changes
    except ConfigError:
        return None, changes


def _class_problems(config: RunConfig) -> list[str]:
    """What is wrong with the changes of the class list."""
    at, last = [one.at_version for one in config.class_changes], config.stop.max_versions
    problems = [f"class_changes: version {v} is named twice; make one change of both" for v in twice(map(str, at))]
    late = [v for v in at if last is not None and v >= last]
    problems += [f"class_changes: version {v} comes too late: the run ends with version {last}" for v in late]
    if at and config.train.control_variates:
        problems.append("class_changes: not with train.control_variates, whose table has the first version's shape")
    if problems or not at:
        return problems
    try:
        lists(ClassList.of(config.task), classes_of(config)[1])
    except ConfigError as error:
        return list(error.problems)
    return []


def _local_problems(config: RunConfig) -> list[str]:
    """What does not go with what each store has of its own: entries of the model that stay there, or statistics."""
    train, problems = config.train, list[str]()
    if config.evaluate.own_statistics is not None:
        if config.evaluate.central is not None:
            problems.append("evaluate.own_statistics: not with evaluate.central, which judges as no store does")
        if train.local is not None:
            problems.append("evaluate.own_statistics: not with train.local, by which stores keep statistics")
    if train.local is None:
        return problems
    if config.class_changes:
        problems.append("class_changes: not with train.local: what stores keep has the first version's shape")
    if config.evaluate.central is not None:
        problems.append("evaluate.central: not with train.local: a store that never trains has no entries of its own")
    if train.local == "norms" and train.fix_statistics_from is not None:
        problems.append("train.fix_statistics_from: not with train.local: norms, whose statistics are each store's own")
    return problems


HARMLESS = (
    "stop.",
    "track.",
    "evaluate.every",
    "evaluate.test",
    "evaluate.alone",
    "ledger.roster",
    "pacing.join_s",
    "pacing.hung_s",
    "pacing.heartbeat_s",
    "pacing.backoff_s",
)


def load_resumed(which: str, path: Path | None, overrides: Sequence[str], *, accept: bool) -> tuple[str, RunConfig]:
    """The id and the configuration of a run to be taken up: its own, or with changes that do it no harm.

    Raises ConfigError with every change that is not accepted.
    """
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.lineage import read_history

    folder = run_folder(which)
    history = read_history(folder)
    if history.finished is not None:
        ended = history.finished["reason"]
        raise ConfigError(f"run {folder.name} is over: {ended}; a new one may begin with its weights (warm_start)")
    if history.run().get("pooled"):
        raise ConfigError(f"run {folder.name} is of pooled data, which no store can take up: start jobs/centralize.py")
    own = RunConfig.model_validate(history.run()["config"])
    before = flat_params(to_dict(own))  # with the keys that came since
    if path is None and not overrides:
        return folder.name, own
    if path is None:
        raise ConfigError("--set with --resume: name the configuration file too, so that it is clear what changes")
    config = load_run(path, overrides)
    after = flat_params(to_dict(config))
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    refused = [key for key in changed if not (accept and key.startswith(HARMLESS))]
    if refused:
        said = [(key, before.get(key, "nothing"), after.get(key, "nothing")) for key in refused]
        allowed = {key: " (--accept-changes allows it)" for key in refused if key.startswith(HARMLESS)}
        lines = [f"{key}: the run has {old}, {path} says {new}{allowed.get(key, '')}" for key, old, new in said]
        raise ConfigError(lines)
    return folder.name, config


def part_problems(said: Mapping[str, Any]) -> list[str]:
    """What the registries say about the parts that a configuration, as plain data, names."""
    from raypipe.aggregation.transforms import transforms

    registries: dict[str, Registry[Any]] = {
        "task": tasks,
        "model": models,
        "train.optimizer": optimizers,
        "train.schedule": schedules,
        "server": transforms,
        "pacing.staleness": staleness,
        "local.split": splits,
    }
    problems = []
    for key, registry in registries.items():
        value: Any = said
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        problems += _part_problems(registry, value, key)
    codec_list = said.get("update")
    wrong = len(problems)
    for place, codec in enumerate(codec_list if isinstance(codec_list, list) else []):
        problems += _part_problems(codecs, codec, f"update.{place}")
    if isinstance(codec_list, list) and len(problems) == wrong:
        problems += _chain_problems(codec_list, said.get("train"))
    judged = said.get("evaluate")
    metric = judged.get("metric", METRIC) if isinstance(judged, Mapping) else METRIC
    return problems + _task_problems(said.get("task", {"name": "classification"}), said.get("model"), metric)


def _task_problems(task: Any, model: Any, metric: Any) -> list[str]:
    """What the task, which has its own metrics and kind of model, finds wrong with the rest."""
    part = {"name": task} if isinstance(task, str) else task
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str) or _part_problems(tasks, part, "task"):
        return []  # it has been said
    try:
        built = tasks.build(part)
    except ConfigError as error:
        return [f"task: {problem}" for problem in error.problems]
    problems = []
    if metric not in built.metrics:
        problems.append(f"evaluate.metric: no metric {metric!r}.{did_you_mean(str(metric), built.metrics)}")
    name = model.get("name") if isinstance(model, Mapping) else model
    if built.boxes is not None and name not in DETECTORS and _is_ours(name):
        problems.append(f"model: {name} finds no boxes; take one of {', '.join(DETECTORS)}")
    if built.boxes is None and name in DETECTORS:
        problems.append(f"model: {name} finds boxes, which is for the task detection")
    return problems


def _is_ours(model: Any) -> bool:
    """A model of raypipe's own: of a user's, nothing is known before it is built."""
    return model in models.names() and str(models.get(model).__module__).startswith("raypipe.")


def _part_problems(registry: Registry[Any], value: Any, key: str) -> list[str]:
    part = {"name": value} if isinstance(value, str) else value
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        return []  # not said, or not a part at all: the schema has said so
    return registry.problems(part, key)


def _chain_problems(how: list[Any], train: Any) -> list[str]:
    try:
        made = chain([{"name": codec} if isinstance(codec, str) else codec for codec in how])
    except (ConfigError, TypeError, KeyError) as error:
        return [f"update: {error}"]
    sealed = [codec.name for codec in made if codec.seals]
    if sealed and isinstance(train, Mapping) and train.get("control_variates") is True:
        why = "control variates are read from each store's own update"
        return [f"train.control_variates: not with update {sealed[0]}, which opens as a sum alone: {why}"]
    return []


def policy_of(config: RunConfig) -> Policy:
    """The machine's settings: what the pace stands for, and what is said on top."""
    said = config.pacing.model_dump(exclude={"staleness", "heartbeat_s"})
    said["settle_first"] = config.train.keep_optimizer or config.train.local is not None
    said |= config.stop.model_dump() | {"evaluate_every": config.evaluate.every, "central": config.evaluate.central}
    said["weigh_staleness"] = staleness.build(config.pacing.staleness)
    said["lower_is_better"] = lower_is_better(config.evaluate.metric)
    return pace(config.pace, len(config.stores), said)


def new_run_id(name: str, now: float) -> str:
    """Unique, sortable by time, safe in file and actor names."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(2)}"


def initial_of(config: RunConfig, task: Task) -> tuple[Layout, Any]:
    """A run's layout and the weights that it begins with, warm start and stores apart."""
    from raypipe.models.flat import initial

    shape = (task.num_outputs, task.channels, task.image_size)
    more: dict[str, Any] = {"columns": task.columns, "trained": config.train.trained, "boxes": task.boxes is not None}
    layout, weights = initial(config.model, *shape, config.seed, local=config.train.local, **more)
    if config.train.fix_statistics_from is not None and not layout.moments:
        name = config.model["name"]
        raise ConfigError(f"train.fix_statistics_from: {name} has no BatchNorm statistics that move; leave it out")
    return layout, weights


PHOTO_BYTES = 100_000.0  # a product photo as JPEG, where nothing better is known


def check(config: RunConfig) -> str:
    """What a run would do, without starting anything."""
    from raypipe.aggregation.transforms import server_memory, transforms
    from raypipe.data.sample import sample_image_bytes

    task = tasks.build(config.task)
    layout, _ = initial_of(config, task)
    image_bytes, source = PHOTO_BYTES, "assumed for photos"
    if task.table is not None:
        image_bytes = 8.0 * (len(task.table.features) + len(task.table.categories) + 1)
        photo = sample_image_bytes("fashion-mnist") if config.local is not None else PHOTO_BYTES
        image_bytes, source = image_bytes + (photo if task.table.image else 0), "assumed: 8 a number"
    elif config.local is not None:
        image_bytes, source = sample_image_bytes(config.local.sample), f"{config.local.sample} as bundled"
    variate_bytes = 4 * layout.shared.stop if config.train.control_variates else 0
    sizes = Sizes(
        parameters=sum(entry.size for entry in layout.entries if entry.role is Role.SHARED),
        down_bytes=4 * (layout.update_size if layout.splits else layout.size) + variate_bytes,
        once_bytes=4 * (layout.size - layout.update_size) if layout.splits else 0,
        up_bytes=encoded_bytes(config.update, layout.update_size),
        server_bytes=4 * server_memory(layout, transforms.build(config.server)),
        image_bytes=image_bytes,
        image_source=source,
        variate_bytes=variate_bytes,
        num_local=sum(entry.size for entry in layout.entries if entry.role is Role.LOCAL),
    )
    stores = [(store.id, store.cpus, store.gpus) for store in config.stores]
    lines = [f"{config.name}: nothing wrong found", *explain(stores, policy_of(config), sizes)]
    return "\n".join([*lines, *filter(None, [licence_of(config.model)])])

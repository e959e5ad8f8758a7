"""Where the rooms meet: a configuration is checked against every registry, composed, and run.

This file and cli.py alone know all rooms.
"""

from __future__ import annotations

import hashlib
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.config.load import load, to_dict
from raypipe.config.schema import RunConfig
from raypipe.coordinator.board import Board
from raypipe.coordinator.composition import Composition
from raypipe.coordinator.explain import Sizes, explain
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.policy import Policy, pace
from raypipe.coordinator.shell import Shell
from raypipe.coordinator.staleness import staleness
from raypipe.data.split import splits
from raypipe.errors import ConfigError, did_you_mean
from raypipe.models import models
from raypipe.models.tensors import vector_from
from raypipe.placement.homes import raypipe_home
from raypipe.registry import Registry
from raypipe.store.messages import Plan
from raypipe.store.optimizers import optimizers
from raypipe.store.schedules import schedules
from raypipe.tasks import tasks
from raypipe.tasks.metrics import lower_is_better
from raypipe.tracking.book import RunBook
from raypipe.types import Role
from raypipe.update.codec import chain, codecs, encoded_bytes

METRICS = ("accuracy", "loss")


def load_run(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration whose every part exists and fits. Raises ConfigError with all problems, a line each."""
    config = load(path, overrides, part_problems)
    try:
        policy_of(config)
    except ValueError as error:
        raise ConfigError(f"pacing: {error}") from None
    return config


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
        problems += _chain_problems(codec_list)
    judged = said.get("evaluate")
    metric = judged.get("metric", METRICS[0]) if isinstance(judged, Mapping) else METRICS[0]
    if metric not in METRICS:
        problems.append(f"evaluate.metric: no metric {metric!r}.{did_you_mean(str(metric), METRICS)}")
    return problems


def _part_problems(registry: Registry[Any], value: Any, key: str) -> list[str]:
    part = {"name": value} if isinstance(value, str) else value
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        return []  # not said, or not a part at all: the schema has said so
    return registry.problems(part, key)


def _chain_problems(how: list[Any]) -> list[str]:
    try:
        chain([{"name": codec} if isinstance(codec, str) else codec for codec in how])
    except (ConfigError, TypeError, KeyError) as error:
        return [f"update: {error}"]
    return []


def policy_of(config: RunConfig) -> Policy:
    """The machine's settings: what the pace stands for, and what is said on top."""
    said = config.pacing.model_dump(exclude={"staleness", "heartbeat_s"})
    said |= config.stop.model_dump() | {"evaluate_every": config.evaluate.every, "central": config.evaluate.central}
    said["weigh_staleness"] = staleness.build(config.pacing.staleness)
    said["lower_is_better"] = lower_is_better(config.evaluate.metric)
    return pace(config.pace, len(config.stores), said)


def new_run_id(name: str, now: float) -> str:
    """Unique, sortable by time, safe in file and actor names."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{secrets.token_hex(2)}"


def compose(config: dict[str, Any], run: str, *, home: str | None, put: Callable[[np.ndarray], Any]) -> Composition:
    """All parts of a run, in the process that will coordinate it. `put` makes weights fetchable."""
    from raypipe.aggregation.global_model import GlobalModel
    from raypipe.aggregation.transforms import transforms
    from raypipe.models.flat import initial

    said = RunConfig.model_validate(config)
    place = Path(home) if home else raypipe_home()
    task = tasks.build(said.task)
    layout, vector = initial(said.model, task.num_outputs, task.channels, task.image_size, said.seed)
    if said.warm_start:
        from raypipe.tracking.registry import load_weights

        vector = load_weights(said.warm_start, layout)
    epochs = said.train.local_epochs
    if epochs is None and said.train.local_steps is None and said.pace != "paced":
        epochs = 1.0
    plan = Plan(
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
    )
    transform = transforms.build(said.server)
    threads = None if said.local is None else 1  # on one machine the cores belong to the stores
    model = GlobalModel(layout, vector, transform, how=said.update, normalise=said.pacing.normalise, threads=threads)
    folder = place / "runs" / run
    every = (said.track.keep_every, said.track.log_model_every)
    book = RunBook(folder, said.track.keep_last, every, time.time)
    ids = [store.id for store in said.stores]
    clock = time.monotonic
    policy = policy_of(said)
    chance = random.Random(said.seed)
    machine = Coordinator(policy, ids, metric=said.evaluate.metric, chance=chance, start_at=clock())
    board = Board(said.evaluate.metric)
    code = code_hash()
    shell = Shell(
        run=run,
        seed=said.seed,
        epoch=1,
        plan=plan,
        how=said.update,
        max_epochs=epochs,
        max_steps=said.train.local_steps,
        model=model,
        book=book,
        board=board,
        put=put,
        clock=clock,
        wall=time.time,
    )
    shell.record(
        "run_started",
        {
            "run": run,
            "name": said.name,
            "config": to_dict(said),
            "layout": layout.to_json(),
            "plan": asdict(plan),
            "code_hash": code,
            "at": time.time(),
            "stores": ids,
            "experiment": said.track.experiment or said.name,
            "register_as": said.track.register_as or said.name,
            "epoch": 1,
        },
    )

    def read(version: int) -> np.ndarray:
        return vector_from(layout, book.versions.read(version))

    return Composition(said, machine, shell, board, plan, place, folder, 1, code, book.versions.kept, read)


def code_hash() -> str:
    """Of this package's own source: what ran, and a guard against actors of other code."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for file in sorted(here.rglob("*.py")):
        digest.update(str(file.relative_to(here)).encode() + file.read_bytes())
    return digest.hexdigest()


PHOTO_BYTES = 100_000.0  # a product photo as JPEG, where nothing better is known


def check(config: RunConfig) -> str:
    """What a run would do, without starting anything."""
    from raypipe.aggregation.transforms import server_memory, transforms
    from raypipe.data.sample import sample_image_bytes
    from raypipe.models.flat import initial

    task = tasks.build(config.task)
    layout, _ = initial(config.model, task.num_outputs, task.channels, task.image_size, config.seed)
    image_bytes, source = PHOTO_BYTES, "assumed for photos"
    if config.local is not None:
        image_bytes, source = sample_image_bytes(config.local.sample), f"{config.local.sample} as bundled"
    sizes = Sizes(
        parameters=sum(entry.size for entry in layout.entries if entry.role is Role.SHARED),
        down_bytes=4 * layout.size,
        up_bytes=encoded_bytes(config.update, layout.update_size),
        server_bytes=4 * server_memory(layout, transforms.build(config.server)),
        image_bytes=image_bytes,
        image_source=source,
    )
    stores = [(store.id, store.cpus, store.gpus) for store in config.stores]
    return "\n".join([f"{config.name}: nothing wrong found", *explain(stores, policy_of(config), sizes)])

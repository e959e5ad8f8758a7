"""What a run's tickets are told, by its configuration: plans, and the stages that a changed class list makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from raypipe.config.schema import RunConfig
from raypipe.coordinator.stages import Next, Stage
from raypipe.models.growth import Form
from raypipe.run import initial_of
from raypipe.store.messages import Plan
from raypipe.tasks import tasks
from raypipe.tasks.class_list import Change, ClassList
from raypipe.types import Layout


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
        own_statistics=said.evaluate.own_statistics if layout.moments else None,
    )


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

"""What the comparison keeps and what it costs: each finished run is a line of JSON, so that one that was cut goes on.

A line counts only for the same run: the same arm as it is configured, split, seed, rate and scale, made by the same
code. Lines of other code stay in the file and are not read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any

from compare_arms import LONGEST, MODEL, Result, Scale, Unit, configuration
from compare_clock import STEP_S, Look, Trace
from compare_world import NUM, TASK

from raypipe.store.code import code_hash

# Steps that an arm takes, of all that its stores could take in the time: a round number of what was measured. The
# pooled arm is one store that is as fast as the fastest, and goes on until its plateau.
BUSY = {"alone": 1.0, "wait for all": 0.3, "k of n": 0.5, "FedBuff, short tickets": 0.35, "closed form": 0.0}
POOLED_TIMES, ELSE_BUSY = 0.6, 0.7


class Kept:
    """The file; None keeps nothing."""

    def __init__(self, file: Path | None) -> None:
        self._file, self._code = file, _code()
        self._found: dict[str, Result] = {}
        if file is None or not file.is_file():
            return
        whole, end, _cut = file.read_bytes().rpartition(b"\n")
        file.write_bytes(whole + end)
        for line in whole.splitlines():
            row = json.loads(line)
            self._found[row["key"]] = _result(row["result"])

    def get(self, unit: Unit) -> Result | None:
        return self._found.get(self._key(unit))

    def add(self, result: Result) -> None:
        key = self._key(result.unit)
        self._found[key] = result
        if self._file is not None:
            with self._file.open("a") as file:
                file.write(json.dumps({"key": key, "result": asdict(result)}) + "\n")

    def _key(self, unit: Unit) -> str:
        said = configuration(unit).model_dump(mode="json")
        return sha256(json.dumps([asdict(unit), said, self._code], sort_keys=True).encode()).hexdigest()[:24]

    def cpu_s(self, arm: str, scale: Scale) -> float | None:
        """CPU seconds of a run of this arm, by those that are here."""
        known = [
            result.cpu_s for result in self._found.values() if (result.unit.arm, result.unit.scale) == (arm, scale)
        ]
        return fmean(known) if known else None


def _code() -> str:
    """Of the package, and of these jobs."""
    jobs = "".join(file.read_text() for file in sorted(Path(__file__).parent.glob("compare*.py")))
    return code_hash() + sha256(jobs.encode()).hexdigest()


def _result(row: dict[str, Any]) -> Result:
    unit = Unit(**{**row["unit"], "scale": Scale(**row["unit"]["scale"])})
    looks = [Look(**{**look, "recalls": tuple(look["recalls"])}) for look in row["trace"]["looks"]]
    return Result(**{**row, "unit": unit, "trace": Trace(**{**row["trace"], "looks": looks})})


def speed() -> tuple[float, float]:
    """CPU seconds of a training step here, and of judging an image; measured for a second."""
    import numpy as np
    import torch
    from compare_arms import BATCH

    from raypipe.models import build
    from raypipe.models.flat import FlatModel, layout_of
    from raypipe.store.trainer import backward
    from raypipe.tasks import tasks

    torch.set_num_threads(1)
    task, module = tasks.build(TASK), build(MODEL, 10, 1, 28, 0)
    model = FlatModel(module, layout_of(module))
    optimizer = torch.optim.SGD(model.trained, lr=0.0, momentum=0.9)
    pixels = torch.from_numpy(np.zeros((BATCH, 1, 28, 28), np.uint8))
    targets = torch.zeros(BATCH, dtype=torch.int64)
    times = []
    for _ in range(60):
        began = time.process_time()
        backward(model, task, pixels, targets)
        optimizer.step()
        times.append(time.process_time() - began)
    began = time.process_time()
    with torch.inference_mode():
        for _ in range(20):
            module(task.prepare(pixels))
    return fmean(times[20:]), (time.process_time() - began) / (20 * BATCH)


def expected_s(unit: Unit, step_s: float, image_s: float) -> float:
    """CPU seconds of a run, roughly."""
    scale = unit.scale
    capacity = sum(scale.seconds / STEP_S / 10 ** (n / (NUM - 1)) for n in range(NUM))
    steps = BUSY.get(unit.arm, ELSE_BUSY) * capacity
    looks = scale.seconds / scale.every_s
    if unit.arm == "pooled":
        steps, looks = POOLED_TIMES * LONGEST * scale.seconds / STEP_S, POOLED_TIMES * LONGEST * looks
    if unit.arm == "alone":
        looks = 4 * NUM
    return 1.0 + steps * step_s + looks * scale.judged * image_s


def plan(units: Iterable[Unit], kept: Kept, processes: int) -> list[str]:
    """What is still to be run and how long it takes, a line an arm."""
    left: dict[str, list[Unit]] = {}
    for unit in units:
        if kept.get(unit) is None:
            left.setdefault(unit.arm, []).append(unit)
    if not left:
        return ["nothing is left to be run"]
    per_step, per_image = speed()
    total, lines = 0.0, []
    for arm, runs in left.items():
        known = kept.cpu_s(arm, runs[0].scale)
        each = known if known is not None else expected_s(runs[0], per_step, per_image)
        total += each * len(runs)
        lines.append(f"  {arm}: {len(runs)} runs of {'' if known is not None else 'about '}{each:.0f} s")
    minutes = total / 60 / processes
    return [f"to be run, in about {minutes:.0f} minutes on {processes} processes that have a core each:", *lines]

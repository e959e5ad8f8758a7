"""Two figures of detection on this machine: a store's training loop against plain PyTorch, and an import's memory.

    .venv/bin/python jobs/bench_detection.py            # both; or one: loop, import

loop     images a second of a store's loop (`raypipe.store.trainer.train`) over those of a bare loop with the same
         model, optimizer and batches, in turns, the median of the pairs. Must be 0.95. Beside other work that median
         says little: then look at the second figure, of the seconds of CPU that both took in all turns together.
import   most memory of `raypipe import yolo` over 10,000 images of 640 x 480. Must be 500 MB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from raypipe.data.dataset import open_data
from raypipe.data.sample import load_sample
from raypipe.data.shelves import make_shelves
from raypipe.models import build_for
from raypipe.models.flat import FlatModel, layout_of
from raypipe.store.batches import Images, shuffled
from raypipe.store.control import Control
from raypipe.store.optimizers import optimizers
from raypipe.store.policy import Limits
from raypipe.store.schedules import schedules
from raypipe.store.targets import targets_of
from raypipe.store.trainer import Work, train
from raypipe.tasks import Task, tasks

BATCH, STEPS, PAIRS, SIZE = 16, 16, 5, 160
IMAGES, DISTINCT = 10_000, 200
ROOT = Path(__file__).parent.parent
# Linux counts as a child's own what its parent had when the child was made; so a small process is between.
MEASURED = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "raypipe", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def loop_ratio(folder: Path) -> tuple[float, float]:
    """A store's images a second over a bare loop's: by the clock, and by the process's seconds of CPU."""
    torch.set_num_threads(1)
    scenes = {"train": BATCH * STEPS, "validation": 2, "test": 2}
    make_shelves(folder, ["a"], source=load_sample(), split={"name": "iid"}, scenes=scenes)
    data = open_data(folder / "a" / "data" / "shelves", name="shelves")
    said = {"name": "detection", "classes": list(data.classes), "image_size": SIZE, "mosaic": 0, "flip": 0, "colour": 0}
    task = tasks.build(said)
    split = data.split("train")
    images = Images(split, targets_of(split, data.classes, task, "it"), task, what="it", max_bytes=1 << 30)
    limits = Limits(BATCH, STEPS, None, None, 1.0)
    ratios, spent = [], [0.0, 0.0]
    for turn in range(PAIRS + 1):
        (ours, own_cpu), (bare, bare_cpu) = _ours(task, images, limits), _bare(task, images)
        print(f"  store {ours:.1f}, bare {bare:.1f} images/s" + (" (warm-up)" if turn == 0 else ""), flush=True)
        if turn:
            ratios.append(ours / bare)
            spent = [spent[0] + own_cpu, spent[1] + bare_cpu]
    return statistics.median(ratios), spent[1] / spent[0]


def _ours(task: Task, images: Images, limits: Limits) -> tuple[float, float]:
    """Images a second, and seconds of CPU for an image; so of the bare loop."""
    module = build_for(task, {"name": "yolov5n"})
    model = FlatModel(module, layout_of(module))
    optimizer = optimizers.build({"name": "adamw"})(model.trained)
    work = Work(0, 1e-3, schedules.build({"name": "constant"}), (0.0, 1.0), limits)
    start, cpu = time.perf_counter(), time.process_time()
    done = train(model, task, images, optimizer, work, Control(), time.monotonic)
    return done.examples / (time.perf_counter() - start), (time.process_time() - cpu) / done.examples


def _bare(task: Task, images: Images) -> tuple[float, float]:
    """What one would write without a federation, with batches that lie in memory."""
    module = build_for(task, {"name": "yolov5n"})
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)
    picks = shuffled(images.num, BATCH, 1, np.random.default_rng(0))
    batches = list(images.batches([next(picks) for _ in range(STEPS)], torch.device("cpu"), 1.0))
    module.train()
    start, cpu = time.perf_counter(), time.process_time()
    for pixels, targets in batches:
        optimizer.zero_grad()
        module.loss(pixels.float() / 255, targets).backward()
        optimizer.step()
    num = sum(len(pixels) for pixels, _ in batches)
    return num / (time.perf_counter() - start), (time.process_time() - cpu) / num


def import_peak(folder: Path) -> tuple[float, float]:
    """Most memory in MB, and seconds, of the command in a process of its own."""
    rng = np.random.default_rng(0)
    root = folder / "in"
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    (root / "classes.txt").write_text("mug\ncup\n")
    for i in range(IMAGES):
        path = root / "images" / f"{i:05d}.jpg"
        if i < DISTINCT:
            coarse = rng.integers(0, 255, (30, 40, 3), np.uint8)
            cv2.imwrite(str(path), cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC))
        else:
            os.link(root / "images" / f"{i % DISTINCT:05d}.jpg", path)
        boxes = rng.uniform(0.2, 0.4, (6, 4))
        lines = (f"{i % 2} {x:.4f} {y:.4f} {w:.4f} {h:.4f}" for x, y, w, h in boxes)
        (root / "labels" / f"{i:05d}.txt").write_text("\n".join(lines))
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, "import", "yolo", str(root), "--to", str(folder / "out")]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    *said, most = done.stdout.strip().splitlines()
    print("  " + "\n  ".join(said), flush=True)
    return int(most) * 1024 / 1e6, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Two figures of detection.")
    parser.add_argument("which", nargs="?", choices=("loop", "import"))
    which = parser.parse_args().which
    with tempfile.TemporaryDirectory() as folder:
        if which != "loop":
            peak, seconds = import_peak(Path(folder) / "import")
            print(f"import of {IMAGES} images: {peak:.0f} MB at most (must: 500), {seconds:.0f} s", flush=True)
        if which != "import":
            ratio, by_cpu = loop_ratio(Path(folder) / "loop")
            print(f"store loop over bare loop: {ratio:.3f} (must: 0.95); by CPU time {by_cpu:.3f}", flush=True)


if __name__ == "__main__":
    main()

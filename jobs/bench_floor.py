"""What jobs/bench.py measures against: the same arithmetic in plain PyTorch. Nothing of raypipe is imported here.

    python jobs/bench_floor.py processes JOB    two forked processes, one torch thread each, shared flat vectors
    python jobs/bench_floor.py ray JOB          a bare Ray script, an actor a store, with the tests at the end

JOB is the JSON of a Job; a JSON line of results is printed. Each version: every store judges it on its validation
images, trains on its own images, and the average of the deltas, weighted by images, makes the next one.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn import functional

SIZE = 32  # pixels
Data: TypeAlias = tuple[Tensor, Tensor]  # uint8 (n, 3, SIZE, SIZE), int64 (n,)


@dataclass(frozen=True)
class Job:
    """The arithmetic: `steps` of `batch` images a store and version, None: one epoch."""

    stores: str  # folder of the stores' folders
    ids: list[str]
    model: str
    lr: float
    batch: int
    steps: int | None
    versions: int
    at_once: int = 2


def read(job: Job, store: str, split: str) -> Data:
    """All images of a split, decoded."""
    table = pq.read_table(Path(job.stores, store, "data", "products", f"{split}.parquet"), columns=["image", "label"])
    blobs: list[Any] = table["image"].to_pylist()
    images: list[Any] = [cv2.imdecode(np.frombuffer(blob, np.uint8), cv2.IMREAD_COLOR_RGB) for blob in blobs]
    pixels = np.stack([cv2.resize(i, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR) for i in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"].to_pylist())


def build(name: str) -> nn.Module:
    """The two models as raypipe has them, written out again."""
    if name == "resnet18":
        import torchvision

        module: nn.Module = torchvision.models.resnet18(num_classes=10, norm_layer=lambda n: nn.GroupNorm(32, n))
        return module
    block = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(8, 16), nn.ReLU(), nn.MaxPool2d(2)]
    block += [nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*block, nn.Flatten(), nn.Linear(32 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


class Learner:
    """A module on one flat vector (each tensor at a multiple of 64 bytes) and its plain loops; one thread."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.job, self.module = job, build(job.model)
        self.params: list[Any] = list(self.module.parameters())
        starts = np.cumsum([0, *(-(-p.numel() // 16) * 16 for p in self.params)]).tolist()
        self.vector = torch.zeros(starts[-1])
        for start, param in zip(starts, self.params, strict=False):
            view = self.vector[start : start + param.numel()].view_as(param)
            view.copy_(param.detach())
            param.data = view

    def train(self, data: Data, steps: int | None = None) -> None:
        """SGD in place; by default as many steps as the job says."""
        pixels, labels = data
        self.module.train()
        left = steps or self.job.steps or -(-len(labels) // self.job.batch)
        while left:
            for pick in torch.split(torch.randperm(len(labels)), self.job.batch)[:left]:
                outputs = self.module(prepared(pixels.index_select(0, pick)))
                functional.cross_entropy(outputs, labels.index_select(0, pick)).backward()  # type: ignore[no-untyped-call]
                grads: Any = [param.grad for param in self.params]
                with torch.no_grad():
                    torch._foreach_add_(self.params, grads, alpha=-self.job.lr)
                for param in self.params:
                    param.grad = None
                left -= 1

    @torch.inference_mode()
    def judge(self, data: Data) -> tuple[float, float, int]:
        """Sum of losses, right answers, images."""
        self.module.eval()
        loss = right = 0.0
        for pixels, labels in zip(*(torch.split(part, 256) for part in data), strict=True):
            outputs = self.module(prepared(pixels))
            loss += float(functional.cross_entropy(outputs, labels, reduction="sum"))
            right += float((outputs.argmax(1) == labels).sum())
        return loss, right, len(data[1])


def prepared(pixels: Tensor) -> Tensor:
    return pixels.float().sub_(127.5).div_(63.75)


# -- forked processes -----------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What the processes have in common; the tensors lie in shared memory."""

    base: Tensor
    sums: list[Tensor]  # one a process, of its stores' weighted deltas
    losses: Tensor  # summed over images, by version
    next_store: Any
    barrier: Any
    data: dict[str, tuple[Data, Data]]


def common(tensor: Tensor) -> Tensor:
    """A copy in shared memory."""
    return tensor.clone().share_memory_()  # type: ignore[no-untyped-call,no-any-return]


def in_processes(job: Job) -> dict[str, Any]:
    """Seconds at which each version was complete."""
    learner, fork = Learner(job), mp.get_context("fork")
    data = {store: (read(job, store, "train"), read(job, store, "validation")) for store in job.ids}
    shared = Shared(
        base=common(learner.vector),
        sums=[common(torch.zeros_like(learner.vector)) for _ in range(job.at_once)],
        losses=common(torch.zeros(job.versions)),
        next_store=fork.Value("i", 0),
        barrier=fork.Barrier(job.at_once),
        data=data,
    )
    times = fork.SimpleQueue()
    workers = [fork.Process(target=work, args=(job, place, shared, times)) for place in range(job.at_once)]
    for worker in workers:
        worker.start()
    complete = times.get()
    for worker in workers:
        worker.join()
    seen = sum(len(validation[1]) for _, validation in data.values())
    parameters = sum(p.numel() for p in learner.params)
    return {"at": complete, "parameters": parameters, "loss": float(shared.losses[-1]) / seen}


def work(job: Job, place: int, shared: Shared, times: Any) -> None:
    """One process: takes stores as they are left, keeps one sum, and at the end averages its part of the vector."""
    learner, base = Learner(job), shared.base
    delta, mine = torch.empty_like(base), shared.sums[place]
    total = sum(len(train[1]) for train, _ in shared.data.values())
    part = slice(place * len(base) // job.at_once, (place + 1) * len(base) // job.at_once)
    complete = []
    for version in range(job.versions):
        mine.zero_()
        while (store := take(shared.next_store)) < len(job.ids):
            train, validation = shared.data[job.ids[store]]
            learner.vector.copy_(base)
            loss = learner.judge(validation)[0]
            with shared.next_store.get_lock():
                shared.losses[version] += loss
            learner.train(train)
            mine.add_(torch.sub(learner.vector, base, out=delta), alpha=len(train[1]))
        shared.barrier.wait()
        for summed in shared.sums:
            base[part].add_(summed[part], alpha=1 / total)
        shared.next_store.value = 0
        shared.barrier.wait()
        complete.append(time.time())
    if place == 0:
        times.put(complete)


def take(counter: Any) -> int:
    """The next number, once."""
    with counter.get_lock():
        counter.value += 1
        return int(counter.value) - 1


# -- bare Ray -------------------------------------------------------------------------------------------------


class Store:
    """An actor that holds a store's images and a model."""

    def __init__(self, job: Job, store: str) -> None:
        self.learner = Learner(job)
        self.train, self.validation, self.test = (read(job, store, s) for s in ("train", "validation", "test"))

    def round(self, base: np.ndarray) -> tuple[np.ndarray, int]:
        self._load(base)
        self.learner.judge(self.validation)
        self.learner.train(self.train)
        return self.learner.vector.numpy() - base, len(self.train[1])

    def judge(self, base: np.ndarray, split: str) -> tuple[float, int]:
        self._load(base)
        return self.learner.judge(getattr(self, split))[1:]

    def alone(self, base: np.ndarray, steps: int) -> tuple[float, int]:
        self._load(base)
        self.learner.train(self.train, steps)
        return self.learner.judge(self.test)[1:]

    def _load(self, base: np.ndarray) -> None:
        np.copyto(self.learner.vector.numpy(), base)


def on_bare_ray(job: Job) -> dict[str, Any]:
    """The whole of a federation's arithmetic, its end included: test of the last version, and each store alone.

    Seconds at which each version was complete, and mean accuracies.
    """
    import ray

    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="local", num_cpus=len(job.ids) + 1, **options)
    make: Any = ray.remote(num_cpus=1)(Store)
    actors = [make.remote(job, store) for store in job.ids]
    first = base = Learner(job).vector.numpy()
    at = []
    for _ in range(job.versions):
        handle = ray.put(base)
        waiting, total, images = deque(actors), np.zeros_like(base), 0
        running = [waiting.popleft().round.remote(handle) for _ in range(job.at_once)]
        while running:
            (done,), running = ray.wait(running)
            if waiting:
                running.append(waiting.popleft().round.remote(handle))
            delta, weight = ray.get(done)
            total += weight * delta
            images += weight
        base = base + total / np.float32(images)
        at.append(time.time())
    handle, start = ray.put(base), ray.put(first)
    ray.get([actor.judge.remote(handle, "validation") for actor in actors])
    shared = ray.get([actor.judge.remote(handle, "test") for actor in actors])
    steps = job.versions * (job.steps or -(-(images // len(actors)) // job.batch))
    alone = ray.get([actor.alone.remote(start, steps) for actor in actors])
    ray.shutdown()
    scores = {"shared": shared, "alone": alone}
    means = {name: sum(right / seen for right, seen in rows) / len(rows) for name, rows in scores.items()}
    return {"at": at, **means}


# -- W3 ----------------------------------------------------------------------------------------------------

SLEEPY = '''\
import time

import torch
from torch import nn


class Sleepy(nn.Module):
    """Sleeps in the forward pass of a training batch: a ticket of one step takes that long, on no core."""

    def __init__(self, num_outputs: int, channels: int, seconds: float) -> None:
        super().__init__()
        self.seconds, self.dense = seconds, nn.Linear(channels, num_outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.seconds)
        return self.dense(images.mean((2, 3)))


def sleepy(num_outputs: int, channels: int, image_size: int, *, seconds: float) -> nn.Module:
    return Sleepy(num_outputs, channels, seconds)
'''


def write_sleepy(folder: Path) -> None:
    """An installed package with a model of its own, as a user would bring one; `folder` goes on the Python path."""
    info = folder / "bench_sleepy-1.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (folder / "bench_sleepy.py").write_text(SLEEPY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bench-sleepy\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[raypipe.model]\nsleepy = bench_sleepy:sleepy\n")


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


if __name__ == "__main__":
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ways = {"processes": in_processes, "ray": on_bare_ray}
    print(json.dumps(ways[sys.argv[1]](Job(**json.loads(sys.argv[2])))))

"""One of the other ranks of a store, as a process: `-m raypipe.store.rank HOME FILE DEVICE RANK NUM THREADS CACHE`.

What goes wrong goes to the store's own log; nothing else leaves. See ranks.py.
"""

from __future__ import annotations

import os
import queue
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from raypipe.store.batches import shuffled
from raypipe.store.messages import Plan, Ticket, expect
from raypipe.store.policy import Policy, read_policy
from raypipe.store.ranks import gradients, hear, meet, part, say
from raypipe.store.safety import site_log
from raypipe.store.shelf import Shelf
from raypipe.store.trainer import AUGMENTED, augmented, backward, num_of, seeded, smallest_batch


def commands(pipe: IO[bytes]) -> Iterator[dict[str, Any]]:
    """As they come; when the pipe is closed this process ends at once, whatever it waits for."""
    heard: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def listen() -> None:
        while (message := hear(pipe)) is not None:
            heard.put(message)
        os._exit(0)

    Thread(target=listen, name="listen", daemon=True).start()
    while True:
        yield heard.get()


def follow(shelf: Shelf, policy: Policy, told: Iterator[dict[str, Any]], out: IO[bytes], rank: int, num: int) -> None:
    """One ticket after another. Raises what goes wrong: then the others lose this rank."""
    for begin in told:
        ticket, plan = expect(Ticket, begin["ticket"]), expect(Plan, begin["plan"])
        base = np.zeros(begin["size"], np.float32)
        learner = shelf.learner(plan, base)
        model, task = learner.model, learner.task
        images = shelf.images(plan, task, "train")
        limits = policy.admit(ticket, plan)
        smallest = smallest_batch(model, images, limits.batch_size)
        say(out, {"ready": True})
        weights = torch.from_numpy(base)
        dist.broadcast(weights, 0)
        model.load(base)
        task = task.among(images.labelled, model.module)
        model.train(fixed=plan.fixes_statistics(ticket.progress[0]))
        picks = shuffled(images.num, limits.batch_size, smallest, np.random.default_rng(ticket.seed))
        mine = (part(pick, rank, num) for pick in picks)
        chance = np.random.default_rng((ticket.seed, AUGMENTED, rank))
        batches = images.batches(mine, model.device, limits.max_bad_share)
        with seeded(ticket.seed + rank, model.device), closing(batches) as stream:
            while next(told)["go"]:
                inputs, targets = augmented(task, *next(stream), chance)
                share = num_of(task, inputs, targets)
                loss = backward(model, task, inputs, targets) if share >= smallest else None
                dist.reduce(gradients(model, share, loss), 0)
                dist.broadcast(model.vector, 0)


def main(home: Path, file: Path, kind: str, rank: int, num: int, threads: int, cache_bytes: int) -> None:
    """Until standard input is closed."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    policy = read_policy(home)
    log = site_log(home, policy.store)
    try:
        torch.set_num_threads(threads)
        device = torch.device("cpu") if kind == "cpu" else torch.device(kind, rank)
        if kind != "cpu":
            torch.cuda.set_device(device)
        shelf = Shelf(policy, device, threads=threads, cache_bytes=cache_bytes)
        told = commands(sys.stdin.buffer)
        say(out, {"ready": True})
        meet(file, rank, num, device)
        say(out, {"met": True})
        follow(shelf, policy, told, out, rank, num)
    except Exception as error:
        log.error("rank %d of %d", rank, num, exc_info=error)
        os._exit(1)


if __name__ == "__main__":
    place, found_at, device_type, *numbers = sys.argv[1:]
    main(Path(place), Path(found_at), device_type, *map(int, numbers))

"""Work for the vault's main thread: one piece at a time, in order; who asks for the same again joins it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreError
from raypipe.vault.frames import Cut

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"

MAX_WAITING = 16
MAX_VECTORS = 2  # lent at a time: one is worked on while the next comes in
BUSY_S = 10.0  # to wait for one


class Job:
    """`run` is called once, by the main thread, unless nobody waits for it any more."""

    def __init__(self, key: Any, ticket: str, run: Callable[[], Any], end: Callable[[], None]) -> None:
        self.key, self.ticket, self.run, self.end = key, ticket, run, end
        self.done = threading.Event()
        self.answer: Any = None
        self.error: BaseException | None = None
        self.began = False
        self.waiters = 1  # who asked


class Jobs:
    """`abandon(ticket)` ends a ticket that trains."""

    def __init__(self, abandon: Callable[[str], None]) -> None:
        self._abandon = abandon
        self._queue: queue.Queue[Job] = queue.Queue(MAX_WAITING)
        self._by_key: dict[Any, Job] = {}
        self._guard = threading.Lock()

    def joined(self, key: Any) -> Job | None:
        """The job of this key that waits or runs."""
        with self._guard:
            return self._by_key.get(key)

    def add(self, key: Any, ticket: str, run: Callable[[], Any], end: Callable[[], None]) -> Job:
        """`key` None: nobody can join. `end` is called when it is over, run or not. Raises StoreError when too many
        wait."""
        job = Job(key, ticket, run, end)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            end()
            raise StoreError("too much is asked of the vault at once") from None
        with self._guard:
            if key is not None and not job.done.is_set():
                self._by_key[key] = job
        return job

    def wait(self, job: Job, gone: Callable[[], bool], look_s: float, abandon_s: float, *, joined: bool = False) -> Any:
        """Its answer. When all who asked are `gone`, a job that runs is given a while to be joined, then abandoned.

        Who added it is counted already. Raises what the job raised; Cut.
        """
        if joined:
            with self._guard:
                job.waiters += 1
        while not job.done.wait(look_s):
            if gone():
                self._left(job, look_s, abandon_s)
                raise Cut("who asked is gone")
        if job.error is not None:
            raise job.error
        return job.answer

    def _left(self, job: Job, look_s: float, abandon_s: float) -> None:
        with self._guard:
            job.waiters -= 1
        wait_s = abandon_s
        while job.began and not job.done.wait(wait_s):
            with self._guard:
                if job.waiters > 0:
                    return
            self._abandon(job.ticket)  # again and again: it may not have come to where it looks
            wait_s = look_s

    def work(self, wait_s: float) -> None:
        """Do the next one, if one comes in time."""
        try:
            job = self._queue.get(timeout=wait_s)
        except queue.Empty:
            return
        try:
            with self._guard:
                job.began = job.waiters > 0
            if job.began:
                job.answer = job.run()
            else:
                job.error = StoreError("nobody waited for it any more")
        except BaseException as error:  # noqa: BLE001  it is the asker's to hear
            job.error = error
        finally:
            job.run = _nothing
            with self._guard:
                if self._by_key.get(job.key) is job:
                    del self._by_key[job.key]
            job.end()
            job.done.set()


def _nothing() -> None:
    return None


class Pool:
    """Buffers for weights, used again while they are of one size: their pages are there already."""

    def __init__(self) -> None:
        self._free = threading.BoundedSemaphore(MAX_VECTORS)
        self._spare: list[Array] = []
        self._guard = threading.Lock()

    def take(self, num_bytes: int) -> Array:
        """uint8, of any content. Raises StoreError when all are taken."""
        if not self._free.acquire(timeout=BUSY_S):
            raise StoreError("the vault is busy with other weights")
        with self._guard:
            while self._spare:
                if (room := self._spare.pop()).size == num_bytes:
                    return room
        try:
            return np.empty(num_bytes, np.uint8)
        except MemoryError:
            self._free.release()
            raise

    def give(self, room: Array) -> None:
        with self._guard:
            self._spare.append(room)
        self._free.release()

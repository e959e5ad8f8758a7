"""The lane: a thread that does one thing at a time, in the order in which the machine named it.

So a sum never sees an update twice, and the journal reads in the order in which things became true. Folds that wait
together are worked off together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev


class Lane:
    """Arithmetic and the record. `work` does actions in the lane's thread, and answers each: folds, or one other."""

    def __init__(self, work: Callable[[Sequence[do.Action]], list[ev.Event | None]]) -> None:
        self._work = work
        self._waiting: asyncio.Queue[tuple[do.Action, asyncio.Future[Any]]] = asyncio.Queue()
        self._arithmetic = ThreadPoolExecutor(1, thread_name_prefix="arithmetic")

    async def perform(self, action: do.Action) -> ev.Event | None:
        """Its answer, once it is its turn."""
        answer: asyncio.Future[ev.Event | None] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((action, answer))
        return await answer

    async def run(self) -> None:
        """Work it off until cancelled; consecutive folds are taken together."""
        loop = asyncio.get_running_loop()
        waiting: deque[tuple[do.Action, asyncio.Future[Any]]] = deque()
        while True:
            waiting.append(await self._waiting.get())
            while not self._waiting.empty():
                waiting.append(self._waiting.get_nowait())
            while waiting:
                jobs = [waiting.popleft()]
                while isinstance(jobs[0][0], do.Fold) and waiting and isinstance(waiting[0][0], do.Fold):
                    jobs.append(waiting.popleft())
                try:
                    answers = await loop.run_in_executor(self._arithmetic, self._work, [action for action, _ in jobs])
                except BaseException as error:
                    for _, future in jobs:
                        if not future.done():
                            future.set_exception(error)
                    raise
                for (_, future), answer in zip(jobs, answers, strict=True):
                    if not future.done():
                        future.set_result(answer)

"""The one loop: an event in, actions out, each performed by the shell, which answers with an event."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence

from raypipe.coordinator.actions import Action, Cancel, Record, Settle
from raypipe.coordinator.events import Event, Tick
from raypipe.coordinator.machine import Coordinator


async def drive(
    machine: Coordinator,
    perform: Callable[[Action], Awaitable[Event | None]],
    inbox: asyncio.Queue[Event],
    clock: Callable[[], float],
    note: Callable[[Event, list[Action]], Awaitable[None]],
    first: Sequence[Action],
) -> None:
    """Run the machine to its end. What it is told and what it decides is noted before anything is done about it.

    Actions start in the order in which the machine names them. An effect that raises ends the run with that
    error. At the end what is in flight is cancelled, never waited for: a hung ticket has no end.
    """

    async def outcome(action: Action) -> None:
        if (event := await perform(action)) is not None:
            inbox.put_nowait(event)

    in_flight: set[asyncio.Task[None]] = set()
    said: list[asyncio.Task[None]] = []  # what the last step tells, which must be heard
    try:
        async with asyncio.TaskGroup() as group:
            for action in first:
                group.create_task(outcome(action))
            while not machine.finished:
                said = []
                event = await _next(inbox, machine.wake_at(), clock)
                actions = machine.handle(event)
                await note(event, actions)
                for action in actions:
                    task = group.create_task(outcome(action))
                    in_flight.add(task)
                    task.add_done_callback(in_flight.discard)
                    if isinstance(action, Record | Settle | Cancel):
                        said.append(task)
            if said:
                await asyncio.wait(said)
            for task in list(in_flight):
                task.cancel()
    except BaseExceptionGroup as group_error:
        if len(group_error.exceptions) == 1:  # one cause: let it be seen as itself
            raise group_error.exceptions[0] from None
        raise


async def _next(inbox: asyncio.Queue[Event], wake_at: float, clock: Callable[[], float]) -> Event:
    """The next event, or a Tick at `wake_at`."""
    if not inbox.empty():
        return inbox.get_nowait()
    wait = None if math.isinf(wake_at) else max(0.0, wake_at - clock())
    try:
        async with asyncio.timeout(wait):
            return await inbox.get()
    except TimeoutError:
        return Tick(max(clock(), wake_at))

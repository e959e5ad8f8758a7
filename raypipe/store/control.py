"""What is said to a site that computes: stop, pause, go on; and that it pauses itself, for who owns the machine.

It is said in another thread than the one that computes, which looks between two batches.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock
from typing import TypeAlias

from raypipe.errors import StoreError
from raypipe.store.messages import Command

Clock: TypeAlias = Callable[[], float]
LOOK_S = 0.2  # between two looks whether who owns the machine needs it still
EARLY = 64  # commands kept for tickets that have not begun


class Control:
    """Flags that another thread sets while a ticket trains; looked at between batches."""

    def __init__(self, taken: Callable[[], str] = lambda: "", closed: Callable[[], bool] = lambda: False) -> None:
        """`taken`: why the store's owner needs the machine now; `closed`: whether it may compute no more today."""
        self.abandoned = False  # nobody wants what comes of it
        self.pausing = ""  # why it computes nothing now
        self._taken, self._closed = taken, closed
        self._stop = Event()
        self._go = Event()
        self._go.set()

    def give(self, command: Command) -> None:
        if command == "pause":
            self._go.clear()
            return
        if command == "stop":
            self._stop.set()
        self._go.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stops(self, clock: Clock) -> bool:
        """Whether it was told to stop, after giving way."""
        self.give_way(clock)
        return self.stopped

    def sleep(self, seconds: float) -> None:
        """Until then, or until told to stop."""
        self._stop.wait(seconds)

    def wait_while_paused(self, seconds: float | None) -> None:
        """At most so long: a pause does not lengthen a ticket's time."""
        self._go.wait(seconds)

    def give_way(self, clock: Clock) -> float:
        """While the owner needs the machine, or until told to stop; seconds that it took, which are no work's."""
        if not (why := self._taken()):
            return 0.0
        began = clock()
        while why and not self.stopped:
            self.pausing = why
            self._stop.wait(LOOK_S)
            why = self._taken()
        self.pausing = ""
        if self._closed():  # meanwhile
            self.give("stop")
        return clock() - began


class Controls:
    """Of one site: what runs now, and commands to it and to tickets that have not begun.

    `taken`, `closed`: see Control; `say` has it written that a run's ticket pauses, and why. Raises StoreError: it may
    not leave.
    """

    def __init__(
        self, taken: Callable[[], str], closed: Callable[[], bool], say: Callable[[str, str, str], None]
    ) -> None:
        self.current: tuple[str, Control, str] | None = None  # ticket, its flags, run
        self._taken, self._closed, self._say = taken, closed, say
        self._flags = Lock()
        self._told = ""  # why the store pauses, as it was said last
        self._early: OrderedDict[str, Command] = OrderedDict()

    @contextmanager
    def running(self, ticket: str, run: str) -> Iterator[Control]:
        """What is controlled until this ends; without a ticket where it is an evaluation."""
        control = Control(self._taken, self._closed)
        with self._flags:
            self.current = ticket, control, run
            if early := self._early.pop(ticket, None):
                control.give(early)
        try:
            yield control
        finally:
            with self._flags:
                self.current = None

    def give(self, ticket: str, command: Command) -> None:
        """Seen within a batch; "" and "*" mean what runs now. A ticket that has not begun yet obeys as it begins."""
        with self._flags:
            if self.current is not None and ticket in ("", "*", self.current[0]):
                self.current[1].give(command)
            elif ticket not in ("", "*"):
                self._early[ticket] = command
                while len(self._early) > EARLY:
                    self._early.popitem(last=False)

    def abandon(self, ticket: str) -> None:
        """Nobody waits for what runs under this id: it ends within a batch and leaves nothing."""
        with self._flags:
            if self.current is not None and self.current[0] == ticket:
                self.current[1].abandoned = True
                self.current[1].give("stop")

    def pausing(self) -> str:
        """Why what runs now computes nothing; empty when it does, or nothing runs."""
        with self._flags:
            ticket, control, run = self.current or ("", None, "")
            why = "" if control is None else control.pausing
            if why and why != self._told:
                try:
                    self._say(run, ticket, why)
                except StoreError:  # a full disk: it pauses untold
                    return ""
            self._told = why
            return why

"""What a store may spend in a day, which is one of UTC: on its own disk before it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from threading import Lock
from typing import Protocol

from raypipe.errors import ConfigError, StoreClosed, unwritten


class Most(Protocol):
    """Of a day; None: no limit."""

    @property
    def tickets_a_day(self) -> int | None: ...
    @property
    def upload_bytes_a_day(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Spent:
    """Of today."""

    day: str
    tickets: int = 0
    upload_bytes: int = 0


class Budget:
    """Neither a restart nor a new run's name gives any of it back.

    `wall`: seconds since the epoch. A clock that is set back does not begin a day again. `whose`: for messages.
    """

    def __init__(self, file: Path, most: Most, wall: Callable[[], float], whose: str) -> None:
        self._file, self._most, self._wall, self._whose, self._lock = file, most, wall, whose, Lock()
        try:
            self._spent = Spent(**json.loads(file.read_text("ascii")))
        except FileNotFoundError:
            self._spent = Spent("")
        except (ValueError, TypeError):
            raise ConfigError(f"{file.name} of the {whose} is damaged; who removes it begins the day anew") from None

    @property
    def spent(self) -> Spent:
        return self._spent

    def check(self, *, tickets: int = 0, upload_bytes: int = 0) -> Spent:
        """What would be spent with this. Raises StoreClosed, until the day is over, when there is not so much left."""
        now, at = self._spent, datetime.fromtimestamp(self._wall(), UTC)
        if (today := f"{at:%Y-%m-%d}") > now.day:
            now = Spent(today)
        after = Spent(now.day, now.tickets + tickets, now.upload_bytes + upload_bytes)
        for name in ("tickets", "upload_bytes"):
            most = getattr(self._most, f"{name}_a_day")
            if most is not None and getattr(after, name) > max(most, getattr(now, name)):
                day = datetime.fromisoformat(now.day).replace(tzinfo=UTC)  # after today where the clock was set back
                left = (datetime.combine(day + timedelta(days=1), time(), UTC) - at).total_seconds()
                what, most_is = name.replace("_", " "), f"{most} by the {self._whose}'s limits"
                raise StoreClosed(f"today's {what} are spent ({most_is}), until 00:00 UTC", max(1.0, left))
        return after

    def spend(self, *, tickets: int = 0, upload_bytes: int = 0) -> None:
        """Raises StoreClosed when it is spent; StoreError when it cannot be written down, and then nothing is."""
        with self._lock:
            after = self.check(tickets=tickets, upload_bytes=upload_bytes)
            part = self._file.with_suffix(".part")
            try:
                fields = {"day": after.day, "tickets": after.tickets, "upload_bytes": after.upload_bytes}
                part.write_text(json.dumps(fields), "ascii")
                os.replace(part, self._file)
            except OSError as error:
                raise unwritten(f"the {self._whose} cannot write its budget", error) from None
            self._spent = after

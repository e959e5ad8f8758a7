"""What a store's policy says of now: its hours, what may leave today and how fast, and whether its owner needs it.

upload_bytes_a_day   updates and measured sums as they are encoded, each time that they are handed over; messages
                     of some hundred bytes (reports, evaluations) are not counted
max_upload_bytes_s   the next one is handed over when the last could have gone at this rate; a store behind Ray
                     sends it in pieces at this rate, see actor.py
yield_file           while it is there nothing is computed; looked for between batches
yield_gpu_load       the same while others have so much of a GPU's time, 0 to 1, and for some seconds after
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from raypipe.errors import StoreClosed, StoreRefused
from raypipe.store.budget import Budget
from raypipe.store.gpu_load import GpuWatch
from raypipe.store.hours import closes, opens
from raypipe.store.policy import Policy

FILE = "spent.json"


class Pacer:
    """Bytes a second on average, without a burst saved up. Times are seconds of any one clock."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at = rate, float("-inf")

    def take(self, num_bytes: int, now: float) -> float:
        """Seconds to wait before these may go."""
        start = max(now, self._free_at)
        self._free_at = start + num_bytes / self._rate
        return start - now


class Terms:
    """`wall`: seconds since the epoch. Threads may share it as far as `Budget` lets them."""

    def __init__(
        self,
        home: Path,
        policy: Policy,
        wall: Callable[[], float],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Raises ConfigError when what was spent today cannot be read, or the GPU's load cannot be told."""
        self._policy, self._wall, self._sleep = policy, wall, sleep
        rate, counts = policy.max_upload_bytes_s, policy.upload_bytes_a_day is not None
        self._pacer = None if rate is None else Pacer(rate)
        self._budget = Budget(home / FILE, policy, wall, "store") if counts else None
        self._gpu = None if policy.yield_gpu_load is None else GpuWatch(home, policy.yield_gpu_load)

    def begin(self, upload_bytes: int = 0) -> float | None:
        """Before any work whose result has so many bytes. How many seconds are left of today's hours, None: no end.

        Raises StoreClosed; StoreRefused for what no day allows.
        """
        now = self._now()
        if (then := opens(self._policy.hours, now)) is not None:
            day = "" if then.date() == now.date() else f" {then:%A}"
            zone = "" if then.tzinfo is None else f" {then.tzname()}"
            raise StoreClosed(f"closed until{day} {then:%H:%M}{zone}, by its hours", self._until(then))
        if self._budget is not None:
            most = self._policy.upload_bytes_a_day
            if most is not None and upload_bytes > most:
                raise StoreRefused(f"an update has {upload_bytes} bytes, the store's policy allows {most} a day")
            self._budget.check(upload_bytes=upload_bytes)
        end = closes(self._policy.hours, now)
        return None if end is None else self._until(end)

    def closed(self) -> bool:
        """By its hours."""
        return opens(self._policy.hours, self._now()) is not None

    def leave(self, num_bytes: int) -> None:
        """Before so many bytes are handed over: they are paid, and wait for their turn. Raises StoreClosed."""
        if self._budget is not None:
            self._budget.spend(upload_bytes=num_bytes)
        if self._pacer is not None and (wait_s := self._pacer.take(num_bytes, time.monotonic())) > 0:
            self._sleep(wait_s)

    def taken(self) -> str:
        """Why nothing may be computed at this moment; empty when it may."""
        file = self._policy.yield_file
        if file is not None and file.exists():
            return "its owner needs the machine (yield file)"
        return "" if self._gpu is None else self._gpu.why()

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._wall())  # local, as hours without a zone are

    def _until(self, then: datetime) -> float:
        return max(1.0, then.timestamp() - self._wall())

"""What the vault checks beside the policy file: what a plan may cost, and what a day may.

A site in the actor's process believes that whoever holds that process means well. A vault does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from raypipe.errors import ConfigError, StoreError, StoreRefused
from raypipe.store.messages import Part, Plan
from raypipe.tasks import tasks

Count: TypeAlias = Annotated[int, Field(ge=1)]
MAX_CODECS = 8


class Limits(BaseModel):
    """`limits:` in vault.yaml. A day is one of UTC."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_batch: Count = 4  # images a step: the gradient of a single image can be turned back into that image
    max_batch: Count = 4096
    max_vector_bytes: Count = 2 << 30  # of a model
    max_batch_bytes: Count = 4 << 30  # of one batch as the model reads it
    tickets_a_day: Count | None = None  # trained, or evaluated
    upload_bytes_a_day: Count | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """Of today."""

    day: str
    tickets: int = 0
    upload_bytes: int = 0


class Budget:
    """On the store's disk before it is used: neither a restart nor a new run's name gives any of it back.

    `wall`: seconds since the epoch. A clock that is set back does not begin a day again.
    """

    def __init__(self, file: Path, limits: Limits, wall: Callable[[], float]) -> None:
        self._file, self._limits, self._wall, self._lock = file, limits, wall, Lock()
        try:
            self._spent = Spent(**json.loads(file.read_text("ascii")))
        except FileNotFoundError:
            self._spent = Spent("")
        except (ValueError, TypeError):
            raise ConfigError(f"{file.name} of the vault is damaged; who removes it begins the day anew") from None

    @property
    def spent(self) -> Spent:
        return self._spent

    def spend(self, *, tickets: int = 0, upload_bytes: int = 0) -> None:
        """Raises StoreRefused when it is spent; StoreError when it cannot be written down, and then nothing is."""
        with self._lock:
            now = self._spent
            if (today := f"{datetime.fromtimestamp(self._wall(), UTC):%Y-%m-%d}") > now.day:
                now = Spent(today)
            after = Spent(now.day, now.tickets + tickets, now.upload_bytes + upload_bytes)
            for name in ("tickets", "upload_bytes"):
                most = getattr(self._limits, f"{name}_a_day")
                if most is not None and getattr(after, name) > max(most, getattr(now, name)):
                    raise StoreRefused(f"today's {name.replace('_', ' ')} are spent ({most} by the vault's limits)")
            part = self._file.with_suffix(".part")
            try:
                fields = {"day": after.day, "tickets": after.tickets, "upload_bytes": after.upload_bytes}
                part.write_text(json.dumps(fields), "ascii")
                os.replace(part, self._file)
            except OSError as error:
                raise StoreError(f"the vault cannot write its budget: {error.strerror}") from None
            self._spent = after


def check_vector(num_bytes: Any, limits: Limits) -> int:
    """Raises StoreRefused for a size that no vector of floats has, or that is beyond the limit."""
    if type(num_bytes) is not int or num_bytes <= 0 or num_bytes % 4:
        raise StoreRefused("the weights' size is not that of a vector of float32")
    if num_bytes > limits.max_vector_bytes:
        raise StoreRefused(f"weights of {num_bytes} bytes, the vault allows {limits.max_vector_bytes}")
    return num_bytes


def check_plan(plan: Plan, limits: Limits) -> None:
    """Raises StoreRefused before anything of the plan's size is allocated.

    A model's size is bounded by its own settings' bounds, see models/, and by `memory_gb`.
    """
    if not limits.min_batch <= plan.batch_size <= limits.max_batch:
        allowed = f"{limits.min_batch} to {limits.max_batch}"
        raise StoreRefused(f"batch_size {plan.batch_size}, the vault allows {allowed}")
    task = tasks.build(plan.task)
    batch_bytes = 4 * plan.batch_size * task.channels * task.image_size**2
    if batch_bytes > limits.max_batch_bytes:
        raise StoreRefused(f"a batch of {batch_bytes} bytes, the vault allows {limits.max_batch_bytes}")


def check_codecs(how: Any) -> list[Part]:
    """Raises StoreRefused for what is not a short list of parts."""
    if not isinstance(how, list) or len(how) > MAX_CODECS or not all(isinstance(part, dict) for part in how):
        raise StoreRefused(f"`how` is a list of at most {MAX_CODECS} codecs")
    return how

"""What the vault checks beside the policy file: what a plan may cost, and what a day may.

A site in the actor's process believes that whoever holds that process means well. A vault does not.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from raypipe.errors import StoreRefused
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

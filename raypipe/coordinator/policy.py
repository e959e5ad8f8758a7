"""The settings of the machine. Sync is a setting of async: a pace is a set of these values and nothing else.

| pace         | cohort | buffer_size | refill     | a ticket ends        | a version is made                      |
|--------------|--------|-------------|------------|----------------------|----------------------------------------|
| paced        | all    | by clock    | on publish | after equal time     | when all came, or at the tick          |
| wait_for_all | all    | the cohort  | on publish | when its work is done| when all came                          |
| k_of_n       | n      | K           | on publish | when its work is done| when K came; later ones join the next  |
| fedbuff      | -      | M/2, >= 3   | on arrival | when its work is done| when K stores came                     |
| delta_async  | -      | 1           | on arrival | when its work is done| at each arrival                        |

In every pace a ticket ends at the first of its limits, so at budget_s too where that is said. That many seconds are of
training: only a paced version is made without who takes longer.

The equal time of paced tickets is budget_s, or where nothing is said `TRAINS` times what a ticket takes beside its
training: base down, judging, update up, the median store's. Unlike stores drift apart in long tickets, and in short
ones nothing but bytes moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

TRAINS = 2.0  # measured with jobs/compare.py, see README
FIRST_BUDGET_S = 1.0  # before anything is known of the stores
LEAST_BUDGET_S = 0.1


@dataclass(frozen=True, slots=True)
class Policy:
    """What the machine goes by; see the table above and Pacing, Stop in config/schema.py for units."""

    refill: Literal["on_publish", "on_arrival"]
    cohort: int | None = None  # stores picked for a version; None: all who are there
    buffer_size: int | None = None  # K; None: by the clock (tick) or the whole cohort
    tick: bool = False  # a version at the tick with who is there
    concurrency: int | None = None  # None: no limit
    max_active_stores: int | None = None  # None: all; this and the next two: see rotation.py
    turn: int = 1
    cool_down_s: float = 0.0
    budget_s: float | None = None
    deadline_s: float | None = None
    hung_s: float = 60.0
    quorum: int = 1
    join_s: float = 120.0
    weigh: Literal["examples", "steps", "equal"] = "examples"
    normalise: Literal["sum", "k"] = "sum"
    in_order: bool = False  # fold in store order: bits repeat
    settle_first: bool = False  # stores keep a state from ticket to ticket: it is committed before the next begins
    stale_limit: float = 10.0
    stale_action: Literal["floor", "drop"] = "floor"
    floor_weight: float = 0.05
    max_failures: int = 3
    backoff_s: float = 1.0
    max_versions: int | None = None
    max_seconds: float | None = None
    target: float | None = None
    patience: int | None = None
    evaluate_every: int = 1
    lower_is_better: bool = False
    central: str | None = None
    weigh_staleness: Callable[[int], float] = lambda staleness: 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for settings that contradict each other."""
        if self.refill == "on_arrival" and (self.buffer_size is None or self.in_order or self.tick):
            raise ValueError("refill on arrival needs a buffer_size, and neither a tick nor store order")
        if self.budget_s is not None and self.deadline_s is not None and self.budget_s > self.deadline_s:
            raise ValueError(f"budget_s {self.budget_s:g} is more than deadline_s {self.deadline_s:g}")


def pace(name: str, num_stores: int, overrides: dict[str, Any]) -> Policy:
    """The policy that a pace's name stands for, with what the configuration says on top (None: not said)."""
    given = {key: value for key, value in overrides.items() if value is not None}
    active = min(num_stores, given.get("max_active_stores") or num_stores)
    concurrency = given.get("concurrency") or active
    presets: dict[str, Policy] = {
        "paced": Policy(refill="on_publish", tick=True, weigh="steps"),
        "wait_for_all": Policy(refill="on_publish", in_order=True),
        "k_of_n": Policy(refill="on_publish", buffer_size=max(1, -(-2 * active // 3))),
        "fedbuff": Policy(refill="on_arrival", buffer_size=min(active, max(3, concurrency // 2))),
        "delta_async": Policy(refill="on_arrival", buffer_size=1),
    }
    preset = presets[name]
    # Where bits must repeat, the same stores must be there from the first version on.
    wanted = active if preset.in_order else max(1, active - active // 5)
    return replace(preset, **{"quorum": wanted, **given})

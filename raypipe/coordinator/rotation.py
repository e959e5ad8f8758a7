"""Which stores have an actor, where not all may: at most `max_active_stores`, each for a turn.

A store is *asked for*: its actor is made, or waited for until a node offers its resource. Its turn is over when it has
handed `turn` updates over and another waits; then it is given no more work, and *released* as soon as it holds no
ticket: what it gave is in a version on the disk, and it was told so. Without an actor its node is idle. It rests for
`cool_down_s`. Who was released first comes next; at the same time who had less work; then the seed draws. Who did not
come within `join_s` comes last. A store that is closed for long by its own policy is released in every run.

A store whose node died is still asked for: it has its place until it did not come for `join_s`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping

from raypipe.coordinator.policy import Policy
from raypipe.coordinator.state import Member

RESTS_S = 60.0  # a store closed for less keeps its actor: to start one takes seconds too


def rests_until(member: Member, policy: Policy) -> float:
    """When a store without an actor may be asked for."""
    return max(member.closed_until, member.released_at + policy.cool_down_s)


def waiting(members: Iterable[Member], policy: Policy, at: float) -> list[Member]:
    """Those who could have a place."""
    return [m for m in members if not m.asked and not m.aside and rests_until(m, policy) <= at]


def in_turn(able: Iterable[Member], rng: random.Random) -> list[Member]:
    """The next one first."""
    drawn = sorted(able, key=lambda m: m.id)
    rng.shuffle(drawn)
    return sorted(drawn, key=lambda m: (m.missed, m.released_at, m.issued))


def room(members: Iterable[Member], policy: Policy) -> float:
    """Places that nobody has."""
    return (policy.max_active_stores or math.inf) - sum(m.asked for m in members)


def why_release(member: Member, policy: Policy, at: float, *, crowded: bool) -> str:
    """Of a store that holds no ticket; empty: it stays. `crowded`: another waits for its place."""
    if member.closed_until - at > RESTS_S:
        return "it is closed"
    if policy.max_active_stores is None:
        return ""
    if member.aside:
        return "it is set aside"
    if crowded and not member.present and member.asked_at + policy.join_s <= at:
        return f"it did not come within {policy.join_s:.0f} s"
    return "its turn is over" if crowded and member.present and turn_over(member, policy) else ""


def turn_over(member: Member, policy: Policy) -> bool:
    """Whether it has handed over what a turn is."""
    return member.turns >= policy.turn


def patience_s(members: Mapping[str, Member], policy: Policy) -> float:
    """How long a run goes on without stores: until each could have had a place, and has not come."""
    most = policy.max_active_stores
    return policy.join_s * (1 if most is None else max(1, len(members) - most + 1))

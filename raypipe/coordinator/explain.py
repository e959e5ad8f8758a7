"""A run in words and figures before it starts: what runs where, what moves, and when federating moves less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raypipe.coordinator.policy import TRAINS, Policy


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one message each way, of the coordinator's memory, and of an image as it lies on a store's disk."""

    parameters: int
    down_bytes: int
    up_bytes: int
    server_bytes: int
    image_bytes: float
    image_source: str  # where image_bytes is from
    once_bytes: int = 0  # of frozen weights, once to a store
    variate_bytes: int = 0  # of a store's control variate; in `down_bytes` too
    num_local: int = 0  # numbers that stay at each store


def expected_versions(policy: Policy) -> int:
    """At most so many versions; by the clock where tickets take equal time, else by the limit that is set."""
    by_time = math.inf
    if policy.tick and policy.max_seconds is not None and policy.budget_s is not None:
        by_time = policy.max_seconds / policy.budget_s
    return int(min(policy.max_versions or math.inf, max(1.0, by_time), 10**9))


def pace_in_words(policy: Policy, num_stores: int) -> str:
    """When a version is made, in one line."""
    if policy.tick:
        tickets = f"tickets that train {TRAINS:g} times as long as they take to fetch and hand over"
        if policy.budget_s is not None:
            tickets = f"tickets of {policy.budget_s:g} s"
        return f"{tickets}, a version at each tick with who is there; late work joins the next"
    limit = "" if policy.budget_s is None else f"; a ticket ends after {policy.budget_s:g} s of training"
    if policy.refill == "on_arrival":
        when = f"a version after each {policy.buffer_size} stores' updates"
        return f"{when}; a store gets new work when it hands over{limit}"
    if policy.buffer_size is not None:
        cohort = policy.cohort or num_stores
        return f"a version when {policy.buffer_size} of {cohort} stores came; late work joins the next{limit}"
    return f"a version when all stores came, folded in store order{limit}"


def _turns(policy: Policy, num_stores: int) -> list[str]:
    """Few places are not concluded from a small cohort: who takes turns is not drawn by chance from all, each turn
    begins with a process that starts, and who does not come or is slow keeps a place from others. That is right where
    nodes are to idle out, and a loss where they are up anyway: so it is said, and the run's owner decides."""
    if policy.max_active_stores is None:
        few = (policy.cohort if policy.refill == "on_publish" else policy.concurrency) or num_stores
        at_work = f"all {num_stores} stores have an actor, and so a node, though {few} work at a time"
        return [f"{at_work}; with pacing.max_active_stores: {few} or more they take turns"] if few < num_stores else []
    each = "each update" if policy.turn == 1 else f"{policy.turn} updates"
    return [f"at most {policy.max_active_stores} stores have an actor at a time; another's turn comes after {each}"]


def explain(stores: Sequence[tuple[str, float, float]], policy: Policy, sizes: Sizes) -> list[str]:
    """Lines for `raypipe check`; stores are (id, CPUs, GPUs)."""
    n, versions = len(stores), expected_versions(policy)
    bounded = versions < 10**9
    lines = [f"{n} stores, {policy.quorum} must be there to start:"]
    lines += [f"  {s:<16} on the node with store:{s}, {cpus:g} CPU, {gpus:g} GPU" for s, cpus, gpus in stores]
    lines += [
        f"pace: {pace_in_words(policy, n)}",
        *_turns(policy, n),
        f"model: {sizes.parameters:,} parameters; for each update {sizes.down_bytes / 1e6:.2f} MB down and "
        f"{sizes.up_bytes / 1e6:.2f} MB up",
        f"coordinator: {sizes.server_bytes / 1e6:.1f} MB for weights, server state and the open sum, for any number of "
        "stores",
    ]
    if sizes.once_bytes:
        what = "frozen and local" if sizes.num_local else "frozen"
        lines.append(f"{what} weights: {sizes.once_bytes / 1e6:.2f} MB down, once to a store")
    if sizes.num_local:
        lines.append(
            f"local: {sizes.num_local:,} numbers are each store's own and stay there; a version, also when it is "
            "exported or promoted, has those that the run began with"
        )
    if sizes.variate_bytes:
        mega = sizes.variate_bytes / 1e6
        lines.append(
            f"control variates: {mega:.2f} MB of what goes down for each update, nothing more goes up; the coordinator "
            f"keeps {mega:.2f} MB more for each store, twice while a version is made, and on its disk: "
            f"{2 * n * mega:.1f} MB for {n} stores"
        )
    each = n * (sizes.down_bytes + sizes.up_bytes)
    lines.append(
        f"moves: at most {each / 1e6:.1f} MB a version"
        + (f", {each * versions / 1e6:.1f} MB in {versions} versions" if bounded else "; no limit on versions is set")
    )
    break_even = each * (versions if bounded else 1) / sizes.image_bytes
    what = f"all {versions} versions" if bounded else "one version"
    lines.append(
        f"less than pooling from {math.ceil(break_even):,} images on ({what}; {sizes.image_bytes:,.0f} bytes an image, "
        f"{sizes.image_source})"
    )
    return lines

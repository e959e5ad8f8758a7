"""How a run is judged and how it ends: versions are scored, the newest one once more at the end."""

from __future__ import annotations

import math

from raypipe.coordinator import actions as do
from raypipe.coordinator import rotation
from raypipe.coordinator.run import Run
from raypipe.coordinator.state import Phase
from raypipe.tasks.metrics import derived

NAMED = 5  # stores in one line


def end(run: Run, reason: str, at: float) -> list[do.Action]:
    """Begin to end: nothing is given out any more, what is open is over."""
    if run.ending is not None:
        return []
    run.ending = (reason, at)
    cancels: list[do.Action] = [do.Cancel(t.store, t.id) for t in run.training()]
    open_ones = [t for t in run.tickets.values() if t.phase is not Phase.PUBLISHED]
    for ticket in open_ones:  # it is over for good, though its answer is on its way, or the run goes on after all
        if ticket.phase is Phase.TRAINING and run.late(ticket):
            run.members[ticket.store].stuck = True
        if run.away(ticket):
            why = "the run ended, before its update was handed over"
            cancels.append(do.Record("update_rejected", {"store": ticket.store, "ticket": ticket.id, "reason": why}))
        del run.tickets[ticket.id]
    return cancels + [do.Settle(t.store, t.id, None, "the run ended") for t in open_ones]


def reason_to_end(run: Run, at: float) -> str:
    """Why it should end now, in words for its user; empty: it goes on."""
    policy = run.policy
    if run.started_at is None:
        if at < run.created_at + run.patience_s:
            return ""
        missing = [m.id for m in run.members.values() if not m.present or m.aside]
        there = len(run.members) - len(missing)
        came = f"{there} of {len(run.members)} stores are there, {policy.quorum} have to be"
        return f"no quorum after {run.patience_s:.0f} s: {came}; missing: {_few(missing)}"
    if policy.max_versions is not None and run.version >= policy.max_versions:
        return f"{run.version} versions"
    limit = math.inf if policy.max_seconds is None else run.started_at + policy.max_seconds
    # Sums as in `wake_at`: a difference may be a bit short at the Tick, and there is no other one.
    if at >= limit and (not run.expected() or at >= limit + 0.5 * (run.budget_s or 0.0)):
        return f"{policy.max_seconds:.0f} s"
    if policy.target is not None and run.scores.reached(policy.target):
        return f"{run.scores.metric} reached {policy.target}"
    if policy.patience is not None and run.scores.stale_for(policy.patience):
        return f"no better version in {policy.patience}"
    if run.members and all(m.aside for m in run.members.values()):
        return "every store is set aside"
    if run.empty_since is not None and at >= run.empty_since + run.patience_s:
        return f"no store was left for {run.patience_s:.0f} s"
    return ""


def _few(names: list[str]) -> str:
    """Some of many, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def note_emptiness(run: Run, at: float) -> None:
    """Since when no store can be given work, none even later today; whoever comes back in time ends it."""
    there = [m for m in run.members.values() if not m.aside]
    usable = any(m.present or max(m.returning, m.closed_until) > at for m in there)
    usable = usable or any(not m.asked and rotation.rests_until(m, run.policy) > at for m in there)
    run.empty_since = None if usable or run.started_at is None else (run.empty_since or at)


def finish(run: Run, at: float) -> list[do.Action]:
    """Once the end has begun: have the newest version judged, then finish."""
    actions: list[do.Action] = []
    if run.ending is None or run.publishing is not None:
        return actions
    reason, since = run.ending
    if run.awaited is None and any(m.returning > at for m in run.members.values()):
        return actions
    if run.policy.settle_first and run.unkept:  # stores judge with what its tickets left there
        return actions
    if run.awaited is None:
        actions += _judge_last(run)
    if run.unkept:
        return actions
    if not run.awaited or at >= since + run.closing_s:
        for version in sorted(set(run.scores.judged) - run.scores.closed):
            actions += _score(run, version)
        run.finished = True
        best = run.scores.best[0] if run.scores.best else run.version
        actions.append(do.Finish(reason, best, failed=run.started_at is None))
    return actions


def _judge_last(run: Run) -> list[do.Action]:
    """Ask all who can answer for their word on the newest version."""
    there = [s for s, m in run.members.items() if m.present and not m.aside and not m.stuck]
    if run.scores.central is not None:
        there = [run.scores.central]
    done = run.scores.judged.get(run.version, {})
    run.central_busy = False
    run.awaited = {s for s in there if s not in done} if run.started_at is not None else set()
    run.tickets = {t.id: t for t in run.tickets.values() if t.phase is Phase.PUBLISHED}
    return [do.Evaluate(run.version, s) for s in sorted(run.awaited)]


def judge_centrally(run: Run) -> list[do.Action]:
    """Have the newest version judged where there is a central validation set."""
    central = run.scores.central
    if central is None or run.central_busy or run.version % run.policy.evaluate_every:
        return []
    run.central_busy = True
    return [do.Evaluate(run.version, central)]


def heard(run: Run, version: int, store: str) -> None:
    """One judgement less to wait for."""
    if store == run.scores.central:
        run.central_busy = False
    if run.awaited is not None and version == run.version:
        run.awaited.discard(store)


def close_scores(run: Run) -> list[do.Action]:
    """Score versions that all who judge have judged, and those two behind the newest."""
    there = {s for s, m in run.members.items() if m.counts(run.now)}
    judges = there if run.scores.central is None else {run.scores.central}
    actions: list[do.Action] = []
    for version in sorted(v for v in run.scores.judged if v not in run.scores.closed):
        if version <= run.version - 2 or judges <= set(run.scores.judged[version]):
            actions += _score(run, version)
    return actions


def _score(run: Run, version: int) -> list[do.Action]:
    mean = run.scores.close(version)
    if mean is None:
        return []
    rows = run.scores.judged.get(version, {})
    best = run.scores.best is not None and run.scores.best[0] == version
    stores = {s: {**derived(mean), "num_examples": n} for s, (mean, n) in sorted(rows.items())}
    total = sum(n for _, n in rows.values())
    body = {"version": version, "split": "validation", "metrics": mean, "stores": stores, "best": best}
    return [do.Record("evaluated", {**body, "num_examples": total})]

"""Which event met a ticket in which phase, of all pairs that there are; and why some of them cannot be."""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias, get_args

from chaos_checks import patient

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.machine import Coordinator
from raypipe.coordinator.state import Phase

Seen: TypeAlias = Counter[tuple[str, str]]  # (phase of a ticket that the event met, event)
PHASES = [phase.name for phase in Phase] + ["none"]
EVENTS = [kind.__name__ for kind in get_args(ev.Event)]

_WHY = {
    (
        "StoreHung StorePaused StoreWentOn",
        "waiting",
    ): "a store is watched once it joined, and then its tickets are asked for",
    (
        "Trained TrainingFailed Deferred UpdateArrived UpdateRefused",
        "waiting",
    ): "what was in flight died with the coordinator; it is asked for when the store joins",
    ("StoreJoined", "training collecting"): "a store joins again only after it left, which ends the first of these, "
    "and has the second wait at its store",
    ("UpdateArrived UpdateRefused", "training"): "an update is fetched once it is asked for, never before",
    ("Folded", "waiting training trained collecting arrived"): "only a fold makes a ticket `folding`, and only its "
    "answer or the coordinator's death changes that; the thread that folds dies with the coordinator",
    ("Folded", "folded published"): "a fold is answered once, by a thread of the same process",
    (
        "Deferred UpdateRefused",
        "arrived folding folded published",
    ): "a fetch is answered once: what arrived is not refused, and of what is refused there is no ticket any more",
    ("Published", "none"): "the tickets of the version that is made are there until it is kept",
    ("Kept", "none"): "the tickets of a version stay until it is kept",
}
IMPOSSIBLE = {
    (phase.upper() if phase != "none" else phase, event): why
    for (events, phases), why in _WHY.items()
    for event in events.split()
    for phase in phases.split()
}


class Watched(Coordinator):
    """The machine; counts which event met a ticket in which phase, and looks at what it decides."""

    seen: Seen

    def handle(self, event: ev.Event) -> list[do.Action]:
        for phase in _meets(self, event):
            self.seen[phase, type(event).__name__] += 1
        actions = super().handle(event)
        patient(event, actions)
        return actions


def _meets(m: Coordinator, event: ev.Event) -> set[str]:
    """Phases of the tickets that an event is about; `none` where there is no such ticket."""
    match event:
        case ev.Trained() | ev.TrainingFailed() | ev.Deferred() | ev.UpdateArrived() | ev.UpdateRefused():
            about = [t for t in m.tickets.values() if t.id == event.ticket]
        case ev.Folded(tickets=good, rejected=bad):
            names = {*good, *(ticket for ticket, _ in bad)}
            about = [t for t in m.tickets.values() if t.id in names]
        case (
            ev.StoreJoined(store=store)
            | ev.StoreAdded(store=store)
            | ev.StoreLeft(store=store)
            | ev.StoreHung(store=store)
            | ev.StorePaused(store=store)
            | ev.StoreWentOn(store=store)
        ):
            about = [t for t in m.tickets.values() if t.store == store]
        case _:
            about = list(m.tickets.values())
    return {t.phase.name for t in about} or {"none"}


def table(seen: Seen) -> bool:
    """Print how often each pair was seen; False when one that can be was never seen, or one that cannot was."""
    width = max(map(len, EVENTS))
    print(f"  {'':{width}}" + "".join(f"{phase.lower():>11}" for phase in PHASES))
    for event in EVENTS:
        cells = [str(seen[phase, event] or ("-" if (phase, event) in IMPOSSIBLE else "NEVER")) for phase in PHASES]
        print(f"  {event:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    pairs = [(phase, event) for phase in PHASES for event in EVENTS]
    never = [pair for pair in pairs if not seen[pair] and pair not in IMPOSSIBLE]
    wrong = [pair for pair in pairs if seen[pair] and pair in IMPOSSIBLE]
    there = sum(seen[pair] > 0 for pair in pairs)
    print(f"  {there} of {len(pairs)} pairs seen, {len(IMPOSSIBLE)} cannot be:")
    for (events, phases), why in _WHY.items():
        print(f"  - {', '.join(events.split())} while {', '.join(phases.split())}: {why}")
    for phase, event in never:
        print(f"  NEVER SEEN: {event} while a ticket is {phase.lower()}")
    for phase, event in wrong:
        print(f"  SEEN, but said to be impossible: {event} while a ticket is {phase.lower()}")
    return not never and not wrong

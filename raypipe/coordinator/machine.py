"""The coordinator's decisions: who trains, what is folded with which weight, when a version is made.

`handle(event) -> actions` is the only way in, and what it calls in stores.py, tickets.py, versions.py and ending.py is
all that changes the run's state (run.py). No clock, network, Ray or tensor is in here: time comes with events, chance
as an argument. Rules:

* A store holds at most one ticket in training. A ticket past its due time holds no slot and nobody waits for it,
  but its work is folded when it comes, with its staleness weight.
* *Expected* are the stores that can still bring something to the open version in time: those with a ticket not
  past due, and those that will be given one. A version is due when the stores in its sum are as many as K, or as
  many as can still come (`buffer_size` None: as can still come).
* Staleness is measured at the fold: newest version minus base version. Its limit is relative,
  `stale_limit * concurrency / K`, since a store s times slower sees s times the mean staleness.
* A store that is closed by its own policy is in no cohort until it opens. One that pauses, since who owns its machine
  needs it, is not hung; after `hung_s` nobody waits for it either.
* A version being written down blocks new tickets (they would be a version behind), never folds.
* An update is settled when the weights that hold it are on the disk: until then its store could be asked again.
* The end: cancel what is in flight, judge the newest version where it can be judged, finish.
"""

from __future__ import annotations

from dataclasses import replace

from raypipe.coordinator import actions as do
from raypipe.coordinator import ending, stores, tickets, versions
from raypipe.coordinator import events as ev
from raypipe.coordinator.run import STOPPED_S, Run


class Coordinator(Run):
    """The machine of one run. Version 0 exists when it is made."""

    def handle(self, event: ev.Event) -> list[do.Action]:
        """Take an event, change state, say what is to be done."""
        if self.finished and not isinstance(event, ev.Withdrawn):
            return []
        self.now = at = max(self.now, event.at)
        actions: list[do.Action] = []
        match event:
            case ev.StoreJoined():
                actions += stores.joined(self, event, at)
            case ev.Resumed():
                actions += stores.resumed(self, event, at)
            case ev.StoreAdded(store=store):
                stores.added(self, store)
            case ev.StoreLeft(store=store, reason=reason):
                actions += stores.left(self, store, reason, for_good=event.for_good)
            case ev.StoreHung(store=store, reason=reason):
                actions += stores.restart(self, store, reason, at)
            case ev.Trained():
                actions += tickets.trained(self, event)
            case ev.TrainingFailed():
                actions += tickets.failed(self, event, at)
            case ev.Deferred():
                actions += tickets.deferred(self, event)
            case ev.StorePaused(store=store, reason=reason):
                actions += stores.paused(self, store, reason, at)
            case ev.StoreWentOn(store=store):
                actions += stores.went_on(self, store, at)
            case ev.UpdateArrived():
                tickets.arrived(self, event)
            case ev.UpdateRefused():
                actions += tickets.refused(self, event)
            case ev.Folded():
                actions += versions.folded(self, event)
            case ev.Published():
                actions += versions.published(self, event)
            case ev.Kept(version=version):
                actions += versions.kept(self, version)
            case ev.Withdrawn(version=version, reason=reason):
                actions += versions.withdrawn(self, version, reason)
            case ev.Evaluated():
                self.scores.add(event.version, event.store, event.metrics, event.num_examples)
                ending.heard(self, event.version, event.store)
                actions += ending.close_scores(self)
            case ev.EvaluationFailed():
                ending.heard(self, event.version, event.store)
            case ev.StopAsked(reason=reason):
                self.closing_s = STOPPED_S
                actions += ending.end(self, reason, at)
            case ev.ClassesAsked(change=change, version=version):
                actions += versions.classes_asked(self, change, version)
            case ev.Tick():
                pass
        actions += tickets.expire(self, at)
        if self.ending is None and (reason := ending.reason_to_end(self, at)):
            actions += ending.end(self, reason, at)
        actions += tickets.collect(self, at)
        actions += versions.fold(self)
        actions += versions.publish(self)
        actions += stores.rotate(self, at)
        actions += tickets.train(self, at)
        ending.note_emptiness(self, at)
        return self._numbered(actions + ending.finish(self, at))

    def _numbered(self, actions: list[do.Action]) -> list[do.Action]:
        for place, action in enumerate(actions):
            if isinstance(action, do.Record):
                self.told += 1
                actions[place] = replace(action, number=self.told)
        return actions

"""Bugs to be planted one at a time: a small change of one file each, and the checks that are to find it.

A check is `pure` (random histories, chaos_pure.py) or a test by its place. Its first
violation ends the search.
"""

from __future__ import annotations

from dataclasses import dataclass

RESUME, DIARY = "coordinator/resume.py", "coordinator/diary.py"
STORES, TICKETS, VERSIONS = "coordinator/stores.py", "coordinator/tickets.py", "coordinator/versions.py"
OUTBOX = "tests/test_outbox.py::"
CHAOS = "tests/test_chaos.py::"


@dataclass(frozen=True)
class Bug:
    """`old` is in the file once; `new` stands in its place."""

    name: str
    file: str  # in raypipe/
    old: str
    new: str
    check: str = "pure"


BUGS = (
    Bug(
        "a folded update is left out of its version",
        VERSIONS,
        "tuple(_contribution(t, total) for t in summed)",
        "tuple(_contribution(t, total) for t in summed[1:] or summed)",
    ),
    Bug(
        "a double fold",
        VERSIONS,
        "ticket.phase = Phase.FOLDING\n            steps",
        "ticket.phase = Phase.ARRIVED\n            steps",
    ),
    Bug(
        "folded in the order of arrival where store order is due",
        VERSIONS,
        "arrived = [t for t in arrived if t.store < first_missing]",
        "arrived = sorted(arrived, key=lambda t: t.issued_at)",
    ),
    Bug(
        "settled before its version is kept",
        VERSIONS,
        "return [do.Keep(event.version), *ending.judge_centrally(run)",
        "early = [do.Settle(c.store, c.ticket, event.version) for c in run.unkept[event.version]]\n"
        "    return [do.Keep(event.version), *early, *ending.judge_centrally(run)",
    ),
    Bug(
        "what fell out of a lost version is given up",
        VERSIONS,
        "Phase.WAITING, math.inf  #",
        "Phase.WAITING, run.now  #",
    ),
    Bug(
        "never settled", VERSIONS, "return [do.Settle(c.store, c.ticket, version) for c in contributions]", "return []"
    ),
    Bug(
        "staleness off by one",
        VERSIONS,
        "ticket.staleness = newest - ticket.base",
        "ticket.staleness = newest - ticket.base + 1",
    ),
    Bug(
        "staleness forgets the version that is being made",
        VERSIONS,
        "newest = run.version + (run.publishing is not None)",
        "newest = run.version",
    ),
    Bug("shares that are not normalised", VERSIONS, "share=ticket.weight / total", "share=ticket.weight"),
    Bug("a late update without its floor", VERSIONS, "worth * max(trust, policy.floor_weight)", "worth * trust"),
    Bug(
        "a report that comes twice counts twice",
        TICKETS,
        "if ticket is None or ticket.phase is not Phase.TRAINING:",
        "if ticket is None:",
    ),
    Bug(
        "an update that comes twice counts twice",
        TICKETS,
        "if ticket is None or ticket.phase not in (Phase.TRAINED, Phase.COLLECTING):",
        "if ticket is None:\n        return\n",
    ),
    Bug(
        "work is given out while a version is made",
        TICKETS,
        "if run.ending is not None or run.publishing is not None or not _started(run, at):",
        "if run.ending is not None or not _started(run, at):",
    ),
    Bug("one ticket too many at once", TICKETS, ">= run.policy.concurrency", "> run.policy.concurrency"),
    Bug(
        "the same work is asked for twice",
        TICKETS,
        "repeat = times if base == run.version else 0",
        "repeat = 0",
    ),
    Bug(
        "resumed without asking again",
        STORES,
        "actions.append(ticket.asked)",
        "actions += [ticket.asked] if run.epoch == 1 else []",
    ),
    Bug("resumed, and asks for what is in a version already", STORES, "if ticket.id not in done:", "if ticket.id:"),
    Bug(
        "resumed, and the version in the making is never made",
        STORES,
        "run.publishing, run.awaited = None, None\n    run.central_busy",
        "run.awaited = None\n    run.central_busy",
    ),
    Bug(
        "an update stands behind the next one of its own store, which is given none",
        "coordinator/run.py",
        "if self.members[s].counts(self.now) and s not in over]",
        "if self.members[s].counts(self.now)]",
        CHAOS + "test_an_update_in_order_does_not_stand_behind_the_next_one_of_its_own_store",
    ),
    Bug(
        "lower is better, and the highest is taken for the best",
        "coordinator/state.py",
        "return one < other if self.lower_is_better else one > other",
        "return one > other",
    ),
    Bug(
        "images that are left out are not said",
        TICKETS,
        "if event.skipped <= member.skipped:",
        "if event.skipped <= member.skipped or member.warm:",
    ),
    Bug("a withdrawn version keeps its score", VERSIONS, "    run.scores.withdraw(version)\n", ""),
    Bug(
        "work on a withdrawn version goes on",
        VERSIONS,
        "gone = [t for t in run.tickets.values() if t.base >= version]",
        "gone = [t for t in run.tickets.values() if t.base > version]",
    ),
    Bug(
        "a ticket's name is given a second time by another life of the coordinator",
        TICKETS,
        'name = f"{run.version}.{run.epoch}-{run.issued}.{member.id}"',
        'name = f"{run.version}.{run.issued}.{member.id}"',
    ),
    Bug(
        "resumed, and a version that is a fact is made again",
        RESUME,
        "if machine.publishing is not None and machine.publishing.version == newest:",
        "if machine.publishing is None and newest < 0:",
    ),
    Bug(
        "resumed on weights that are lost",
        RESUME,
        "while machine.version > newest or not intact(machine.version):",
        "while machine.version > newest:",
    ),
    Bug(
        "resumed, and the weights of the newest version are never kept",
        RESUME,
        "for version in sorted(machine.unkept)",
        "for version in sorted(machine.unkept)[:-1]",
    ),
    Bug(
        "what was said and not written down is lost",
        RESUME,
        "counted and a.number > told",
        "not counted",
    ),
    Bug(
        "a lost write: what changes nothing to be seen is not noted",
        DIARY,
        'line = _line({"event"',
        'if not decided:\n            return\n        line = _line({"event"',
    ),
    Bug("half a line is read as a whole one", DIARY, "whole = lines[:-1]", "whole = [line for line in lines if line]"),
    Bug(
        "a field is missing in the checkpoint",
        "coordinator/state.py",
        "    unkept: dict[int, tuple",
        "    # unkept: dict[int, tuple",
    ),
    Bug(
        "a record that is never committed",
        "tracking/journal.py",
        "isolation_level=None",
        'isolation_level="DEFERRED"',
    ),
    Bug(
        "a coordinator that is over goes on writing the record",
        "tracking/journal.py",
        "where ?4 is null or ?4 = ({NEWEST})",
        "where ?4 is null or ?4 <= ({NEWEST})",
        "tests/test_journal.py::test_a_coordinator_that_is_over_adds_nothing",
    ),
    Bug(
        "acted upon before it is noted",
        "coordinator/loop.py",
        "await note(event, actions)\n                for action in actions:",
        "noted = asyncio.create_task(asyncio.sleep(0.05))\n                noted.add_done_callback("
        "lambda _, e=event, a=actions: group.create_task(note(e, a)))\n                for action in actions:",
        CHAOS + "test_nothing_is_done_before_it_is_written",
    ),
    Bug(
        "a record in the journal before the diary is on the disk",
        "coordinator/publisher.py",
        "        self.room.patiently(self.diary.sync)\n",
        "",
        CHAOS + "test_nothing_is_done_before_it_is_written",
    ),
    Bug(
        "a version is kept without being forced to the disk",
        "tracking/versions.py",
        "                os.fsync(file.fileno())\n            final",
        "            final",
        CHAOS + "test_nothing_is_done_before_it_is_written",
    ),
    Bug(
        "a version is kept without the state of the server's transform being forced to the disk",
        "tracking/versions.py",
        "            os.fsync(opened.fileno())\n        sync_folder(folder)\n        with safe_open(file",
        "            pass\n        sync_folder(folder)\n        with safe_open(file",
    ),
    Bug(
        "a version is kept without its control variates being forced to the disk",
        "tracking/variates.py",
        "                _force(self.folder / name)\n",
        "                pass\n",
    ),
    Bug(
        "a version is recorded as kept before its state and its variates are",
        "tracking/book.py",
        "        body = self._forced(version)\n",
        '        body = {"version": version, **asdict(self.versions.keep(version))}\n',
        CHAOS + "test_nothing_is_done_before_it_is_written",
    ),
    Bug(
        "damaged weights pass for a version",
        "tracking/versions.py",
        "if digest(vector) == content_hash:",
        "if content_hash:",
        CHAOS + "test_what_is_damaged_is_not_recovered",
    ),
    Bug(
        "a damaged state of the server's transform passes",
        "tracking/versions.py",
        'return tensors if (opened.metadata() or {}).get("hash") == found and _is(found, expected) else None',
        "return tensors",
        CHAOS + "test_what_is_damaged_is_not_recovered",
    ),
    Bug(
        "a store is told of a version that was withdrawn",
        "tracking/book.py",
        'if v != body["version"]}',
        'if v > body["version"]}',
        CHAOS + "test_an_update_of_a_withdrawn_version_is_in_none",
    ),
    Bug(
        "a forgotten fence",
        "store/outbox.py",
        "if epoch < self.epoch:",
        "if epoch < 0:",
        OUTBOX + "test_an_older_epoch_is_refused_by_every_method_and_after_a_restart",
    ),
    Bug(
        "a fence that a restart forgets",
        "store/outbox.py",
        '                self._write("epoch", str(epoch).encode(), durable=True)\n',
        "",
        OUTBOX + "test_an_older_epoch_is_refused_by_every_method_and_after_a_restart",
    ),
    Bug(
        "a store's state is committed although its update was refused",
        "store/outbox.py",
        "if version is not None and len(held.slots) == 2:",
        "if len(held.slots) == 2:",
        OUTBOX + "test_a_damaged_momentum_is_dropped_and_said",
    ),
    Bug(
        "swapped order: an update is forgotten before the state that came of it is kept",
        "store/outbox.py",
        "                old = self._commit(held)\n            self._remove(ticket)\n",
        "                self._remove(ticket)\n                old = self._commit(held)\n            else:\n"
        "                self._remove(ticket)\n",
        OUTBOX + "test_killed_at_any_step_to_the_disk_a_store_goes_on_with_the_same_bits",
    ),
    Bug(
        "a store trains again what waits in its outbox",
        "store/site.py",
        "report = outbox.report(ticket.id) or self._made(",
        "report = self._made(",
        OUTBOX + "test_after_a_restart_what_waits_is_listed_and_given_again",
    ),
    Bug(
        "a slot is used again before its ticket is settled",
        "store/outbox.py",
        "if not any(slot in held.slots for held in self._waiting.values()):",
        "if slot is not None:",
        OUTBOX + "test_after_a_restart_what_waits_is_listed_and_given_again",
    ),
)

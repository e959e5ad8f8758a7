"""The coordinator's part in the ledger: who may contribute, what is checked before it is folded, what is written down.

Nothing here is on the event loop. The ledger has a thread of its own, in which everything happens in the order asked:
a record is followed before a proof that was asked for after it, so a ticket leaves once its base is sealed. Updates
are hashed in other threads, beside that.

Trouble with the ledger ends no run. It is said once on the board and tried again; tickets wait meanwhile, since
stores train on nothing that is not on the chain. What the ledger lacks when a coordinator dies, the next one
catches up from the journal.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from raypipe.errors import ConfigError, RunError, StoreError, StoreRefused, UpdateRejected
from raypipe.ledger import follow, roster
from raypipe.ledger.chain import Ledger, LedgerBusy
from raypipe.ledger.keys import digest, load_or_make_key
from raypipe.ledger.offline import update_statement
from raypipe.store.messages import Card, Report
from raypipe.tracking.journal import FILE, Journal

KEY = Path("keys") / "coordinator.pem"  # under the run home: one key for all its runs and epochs
AGAIN_S = 2.0  # between two tries to write a ledger that could not be written
MOST = 16  # heads that a store may have kept of tickets that brought no report
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Checked:
    """An update that came: its digest and its store's signature, and why it may not be folded, if so."""

    digest: str | None = None
    signature: str | None = None
    reason: str = ""


class Notary:
    """One run's. `wall` gives seconds since the epoch, `threads` hash an update, `say` takes a line for people."""

    def __init__(
        self,
        folder: Path,
        home: Path,
        run: str,
        *,
        roster_file: Path,
        rule: roster.Rule,
        threads: int | None,
        wall: Callable[[], float],
        say: Callable[[str], None],
    ) -> None:
        """Makes the coordinator's key at first use. Raises ConfigError: others can read it, the roster is damaged."""
        self._folder, self._run, self._roster_file, self._rule = folder, run, roster_file, rule
        self._hint = "" if roster_file.parent == home else f" --roster {roster_file}"
        self._threads, self._wall, self._say_line = threads, wall, say
        self._key = load_or_make_key(home / KEY)
        self._roster = roster.load_roster(roster_file)
        self._roster_seen = 0
        self._ledger: Ledger | None = None
        self._journal: Journal | None = None
        self._said = ""
        self._sizes: dict[str, list[int]] = {}  # store -> heads of which one is its last
        self._reports: dict[str, Report] = {}  # by ticket: what the update that comes has to be
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._checks = ThreadPoolExecutor(2, thread_name_prefix="checks")

    @property
    def public(self) -> str:
        """The coordinator's public key."""
        return self._key.public

    def open(self) -> None:
        """Opens the ledger and takes in what the journal has. Raises RunError for one that is not what was signed.

        One that another process still writes is tried again later: that process has to learn that it is superseded.
        """
        try:
            self._thread.submit(self._open).result()
        except LedgerBusy as error:
            self._say(error.message)
        self.wake()

    def wake(self) -> None:
        """There may be new records. From any thread; nothing is awaited."""
        with suppress(RuntimeError):  # it is closed
            self._thread.submit(self._follow)

    def finish(self) -> None:
        """Everything that is in the journal is in the ledger, if it can be written; then it is closed."""
        self._thread.submit(self._follow).result()
        self.close()

    def close(self) -> None:
        """Idempotent; what was not sealed is caught up by whoever resumes the run."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._checks.shutdown(wait=False, cancel_futures=True)
        if self._ledger is not None:
            self._ledger.close()
        if self._journal is not None:
            self._journal.close()

    # -- stores -----------------------------------------------------------------------------------------------

    def admit(self, store: str, card: Card) -> None:
        """A store comes with its key. Takes the roster's lock. Raises StoreRefused, saying how to accept it."""
        if card.key is None:
            raise StoreRefused(f"store {store} came without a key, and this run keeps a ledger")
        key, now = card.key, self._wall()
        try:
            self._roster = roster.change_roster(
                self._roster_file, lambda before: roster.admit(before, store, key, now, self._rule)
            )
        except StoreRefused as error:
            raise StoreRefused(error.message + self._hint) from None
        except (ConfigError, RunError) as error:
            raise StoreError(error.message) from None
        self._sizes[store] = [card.head_size]

    async def prove(self, store: str, version: int) -> tuple[dict[str, Any], ...]:
        """For a ticket: that its base is on the chain, from each head that may be the store's last.

        Waits for as long as the ledger cannot be written. Raises StoreError: the store saw a longer ledger.
        """
        while True:
            try:
                return await self._in_thread(self._proofs, store, version)
            except RunError as error:
                self._say(error.message)
                await asyncio.sleep(AGAIN_S)
                self.wake()

    def heard(self, store: str, report: Report) -> None:
        """A report came: its co-signature goes into the ledger, its signature waits for the update."""
        if report.digest:
            self._reports[report.ticket] = report
        if report.cosignature is not None:
            self._thread.submit(self._witness, store, report.cosignature)

    def forget(self, ticket: str) -> None:
        """No update of this ticket is awaited any more."""
        self._reports.pop(ticket, None)

    async def checked(self, store: str, ticket: str, update: np.ndarray) -> Checked:
        """Whether an update is what its store signed, and the store may sign."""
        report = self._reports.pop(ticket, None)
        return await asyncio.get_running_loop().run_in_executor(self._checks, self._check, store, report, update)

    # -- in the checks' threads -------------------------------------------------------------------------------

    def _check(self, store: str, report: Report | None, update: np.ndarray) -> Checked:
        try:
            found = digest(update, threads=self._threads)
        except (TypeError, ValueError):
            return Checked(reason=f"an array of {update.dtype} is no update")
        try:
            if report is None:
                raise UpdateRejected(f"store {store} did not sign the update of this ticket")
            self._check_signed(store, report, found)
        except UpdateRejected as error:
            return Checked(found, None, error.message)
        return Checked(found, report.signature)

    def _check_signed(self, store: str, report: Report, found: str) -> None:
        if found != report.digest:
            raise UpdateRejected(f"the update is {found[:15]}, store {store} signed {report.digest[:15]}")
        base = self._ledger.version(report.version) if self._ledger is not None else None
        if base is None:
            raise UpdateRejected(f"its base version {report.version} is not in the ledger")
        said = update_statement(
            run=self._run,
            store=store,
            ticket=report.ticket,
            base_version=report.version,
            base_digest=base.digest,
            update_digest=found,
            steps=report.steps,
            examples=report.examples,
        )
        roster.check_signature(self._current_roster(), store, "update", said, report.signature)

    def _current_roster(self) -> roster.Roster:
        """Read again when its file was replaced: `raypipe ledger revoke` acts on a run that is going on."""
        try:
            seen = self._roster_file.stat().st_mtime_ns
            if seen != self._roster_seen:
                self._roster, self._roster_seen = roster.load_roster(self._roster_file), seen
        except (OSError, ConfigError) as error:
            self._say(f"the roster cannot be read, and stands as it was: {getattr(error, 'message', error)}")
        return self._roster

    # -- in the ledger's thread -------------------------------------------------------------------------------

    def _open(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(self._folder, self._key, self._run)
            if self._ledger.recovered:
                self._say(self._ledger.recovered)
        if self._journal is None:
            self._journal = Journal(self._folder / FILE)
        return self._ledger

    def _follow(self) -> None:
        try:
            ledger = self._open()
            assert self._journal is not None
            follow.record(ledger, self._journal.read(after=ledger.recorded, kinds=follow.KINDS))
            self._said = ""
        except RunError as error:
            self._say(error.message)

    def _proofs(self, store: str, version: int) -> tuple[dict[str, Any], ...]:
        ledger = self._open()
        sizes = self._sizes.setdefault(store, [0])
        made = tuple(ledger.base_proof(version, since) for since in sizes)
        head = ledger.last
        if head is not None and head.size not in sizes:
            sizes.append(head.size)  # the store keeps it even if no report comes
            del sizes[1:-MOST]
        return made

    def _witness(self, store: str, cosignature: dict[str, Any]) -> None:
        assert self._ledger is not None
        try:
            self._ledger.witness({**cosignature, "store": store}, self._roster.key_of(store) or "")
            self._sizes[store] = [int(cosignature["size"])]
        except (StoreError, ValueError, TypeError) as error:
            self._say(f"store {store}'s co-signature is not taken: {getattr(error, 'message', error)}")

    # -- inside -----------------------------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[..., T], *arguments: Any) -> T:
        future: Future[T] = self._thread.submit(work, *arguments)
        return await asyncio.wrap_future(future)

    def _say(self, line: str) -> None:
        """Once for as long as it lasts."""
        if line != self._said:
            self._said = line
            self._say_line(f"ledger: {line}")

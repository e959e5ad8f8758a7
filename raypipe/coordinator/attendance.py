"""Having the stores in the run: each is asked for, joins, is watched, and is taken in again when it returns."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

from raypipe.coordinator import actions as do
from raypipe.coordinator import events as ev
from raypipe.coordinator.bases import Bases
from raypipe.coordinator.notary import Notary
from raypipe.coordinator.ports import Port
from raypipe.errors import StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.store import messages as msg

MAX_RETRY_S = 300.0  # between two tries to have a store in
PATIENCE_S = 20.0  # before a store that does not come is spoken of


class Attendance:
    """Of all stores. `data`: the data set's name; `record` writes a record, `tell` tells the machine."""

    def __init__(
        self,
        data: str,
        bases: Bases,
        *,
        record: Callable[[do.Record], Awaitable[object]],
        tell: Callable[[ev.Event], None],
        clock: Callable[[], float],
        notary: Notary | None,
        asks_all: bool,
    ) -> None:
        self.ports: dict[str, Port] = {}
        self._data, self._bases, self._record, self._tell = data, bases, record, tell
        self._clock, self._notary, self._asks_all = clock, notary, asks_all
        self._asked: dict[str, asyncio.Event] = {}
        self._visits: dict[str, asyncio.Task[None]] = {}

    def ask(self, store: str) -> None:
        """It may join."""
        self._asked.setdefault(store, asyncio.Event()).set()

    def release(self, store: str) -> None:
        """It has no actor until it is asked for again."""
        self._asked[store].clear()
        if (visit := self._visits.get(store)) is not None:
            visit.cancel()

    async def keep(self, store: str, port: Port, heartbeat_s: float, retry_s: float, *, trains: bool = True) -> None:
        """Have a store in the run for as long as the run lasts, and as it is asked for."""
        self.ports[store], asked = port, self._asked.setdefault(store, asyncio.Event())
        if self._asks_all or not trains:
            asked.set()
        while True:
            await asked.wait()
            visit = self._visits[store] = asyncio.ensure_future(
                self._visited(store, port, heartbeat_s, retry_s, trains)
            )
            try:
                await asyncio.wait({visit})
            finally:
                visit.cancel()
            if not visit.cancelled():
                visit.result()
            await port.release()

    async def _visited(self, store: str, port: Port, heartbeat_s: float, retry_s: float, trains: bool) -> None:
        """Join, watch, and take it in again when it returns; until cancelled."""
        said, tries = "", 0
        while True:
            try:
                card = await self._joined(store, port)
            except StoreSuperseded:
                raise
            except StoreError as error:
                refused = isinstance(error, StoreRefused) and not isinstance(error, StoreClosed)
                kind = "store_set_aside" if refused else "store_missing"
                if said != error.message:
                    await self._record(do.Record(kind, {"store": store, "reason": error.message}))
                said = error.message
                port.kill()
                await asyncio.sleep(min(MAX_RETRY_S, retry_s * 2**tries))
                tries = min(tries + 1, 16)
                continue
            said, tries = "", 0
            self._bases.new_process(store)
            counts = card.data.get(self._data, {})
            body = {"store": store, "counts": counts, "cpus": card.cpus, "gpu": card.gpu, "node": card.node}
            body |= {"key": card.key, "limits": card.limits}
            body |= {"data_bytes": card.data_bytes.get(self._data, 0), "hash": card.data_hashes.get(self._data)}
            if card.machine:
                body["machine"] = card.machine
            if card.code:
                body["vault_code"] = card.code
            await self._record(do.Record("store_joined", body))
            if trains:
                rate = card.limits.get("max_upload_bytes_s")
                self._tell(ev.StoreJoined(store, counts.get("train", 0), self._clock(), card.outbox, rate))
            silent, why = await port.watch(heartbeat_s, partial(self._pauses, store, trains))
            event = ev.StoreHung if silent else ev.StoreLeft
            if trains:
                self._tell(event(store, why, self._clock()))
            else:
                port.kill()
            if silent:
                await asyncio.sleep(retry_s)  # the machine has its process ended

    def _pauses(self, store: str, trains: bool, reason: str) -> None:
        """Or goes on, where there is no reason."""
        if trains:
            at = self._clock()
            self._tell(ev.StorePaused(store, reason, at) if reason else ev.StoreWentOn(store, at))

    async def _joined(self, store: str, port: Port) -> msg.Card:
        """The store's card; who waits long is told what for."""
        joining = asyncio.ensure_future(port.join())
        try:
            await asyncio.wait({joining}, timeout=PATIENCE_S)
            if not joining.done():
                reason = port.waiting_for(PATIENCE_S)
                await self._record(do.Record("store_missing", {"store": store, "reason": reason}))
            card = await joining
            if self._notary is not None:
                await asyncio.to_thread(self._notary.admit, store, card)
            return card
        finally:
            joining.cancel()

"""A store whose link is away for so long that its process is given up: what it had finished is in a version yet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_shell import NAMES, SitePort, config, records, run, stores

from raypipe.errors import StoreUnreachable
from raypipe.store import messages as msg
from raypipe.store.site import Site

__all__ = ["stores"]
CUT = "c"


class Cut(SitePort):
    """Its first update never arrives: its link is away, then its process is ended and another one is there."""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.home = home
        self.way, self.ended, self.back = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.first = ""
        self.trained: list[str] = []

    async def join(self) -> msg.Card:
        if self.first:
            self.site = Site(self.home)
        card = await super().join()
        if self.first:
            self.back.set()
        return card

    async def train(self, ticket: msg.Ticket, *more: Any) -> msg.Report:
        self.trained.append(ticket.id)
        return await super().train(ticket, *more)

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        if not self.first:
            self.first = ticket
            self.way.set()
            await self.ended.wait()
            raise StoreUnreachable(f"store {self.store}: its process ended")
        return await super().collect(ticket, how)

    async def watch(self, heartbeat_s: float, pauses: Callable[[str], None]) -> tuple[bool, str]:
        if self.back.is_set():
            return await super().watch(heartbeat_s, pauses)
        await self.way.wait()
        return True, "no heartbeat"

    def kill(self) -> None:
        self.ended.set()
        self.site.close()


class Patient(SitePort):
    """Trains on the second version and later ones once the other store is back."""

    other: Cut

    async def train(self, ticket: msg.Ticket, *more: Any) -> msg.Report:
        if ticket.version >= 1:
            await self.other.back.wait()
        return await super().train(ticket, *more)


@pytest.mark.parametrize("train", [{}, {"control_variates": True}], ids=["plain", "variates"])
def test_an_update_that_was_on_its_way_is_handed_over_when_its_store_is_back(
    train: dict[str, Any], stores: Path, tmp_path: Path
) -> None:
    cut, others = Cut(stores / CUT), [Patient(stores / name) for name in NAMES if name != CUT]
    for port in others:
        port.other = cut
    said = config(stop={"max_versions": 3}, evaluate={"test": False, "alone": False})
    said["train"] |= train
    run(said, tmp_path, {port.store: port for port in [cut, *others]})
    versions = records(tmp_path, "version_published")
    counted = [(body["version"], c) for body in versions for c in body["contributions"] if c["ticket"] == cut.first]
    ((version, contribution),) = counted
    assert version >= 2, "not the one that it would have been in"
    assert contribution["staleness"] == version - 1
    assert cut.trained.count(cut.first) == 1, "it was not trained again"
    assert records(tmp_path, "update_rejected", "ticket_failed") == []

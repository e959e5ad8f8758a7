"""In the coordinator's process: a store client whose messages are doubled, reordered, corrupted and replayed, and a
wall clock that jumps. Run as a script it is the command `raypipe`, with such a coordinator.

What must not happen is written to a file, a line each, for chaos_real.py to read: a ticket sent twice that is answered
in two ways, garbage that is taken for a message, a verdict of a coordinator that is over and is obeyed.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import raypipe.coordinator.actor as coordinator
from raypipe import compose as composing
from raypipe.coordinator.composition import Composition
from raypipe.errors import StoreError
from raypipe.store import messages as msg
from raypipe.store.client import StoreClient

FOLDER = "CHAOS_FOLDER"  # of the environment: where it is said what was done, and where the clock's jump is read
SEED = "CHAOS_SEED"  # of the environment: with the store and the epoch it gives the noise
SHARE = 0.06  # of messages that go wrong in each way
done: Counter[str] = Counter()


class NoisyClient(StoreClient):
    """Does to each message what a bad network does."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._chance = random.Random(f"noise/{os.environ[SEED]}/{self.store.id}/{self._epoch}")
        self._before: deque[msg.Verdict] = deque(maxlen=20)
        self._folder = Path(os.environ[FOLDER])

    def _now(self, what: str, share: float = SHARE) -> bool:
        if self._chance.random() >= share:
            return False
        done[what] += 1
        (self._folder / f"noise-{os.getpid()}").write_text("\n".join(f"{n} {w}" for w, n in sorted(done.items())))
        return True

    def _wrong(self, what: str) -> None:
        with (self._folder / "violations").open("a") as file:
            file.write(f"{self.store.id}: {what}\n")

    async def train(
        self, ticket: msg.Ticket, plan: bytes, weights: Any, how: list[msg.Part] | None = None, correction: Any = None
    ) -> msg.Report:
        if self._now("garbage for a ticket"):
            await self._garbage(plan, weights)
        report = await super().train(ticket, plan, weights, how, correction)
        if ticket.judge is None and self._now("ticket sent twice"):
            again = await super().train(ticket, plan, weights, how, correction)
            settled = any(said.ticket == ticket.id for said in self._before)  # then it was dropped, and trained anew
            if not settled and replace(again, cosignature=None) != replace(report, cosignature=None):
                self._wrong(f"ticket {ticket.id} was sent twice and answered in two ways")
        if self._now("answer corrupted", SHARE / 4):
            raise StoreError(f"store {self.store.id}: not a message of the store protocol")
        if self._now("verdict of an older coordinator"):
            await self._old_verdict(ticket)
        return report

    async def _garbage(self, plan: bytes, weights: Any) -> None:
        raw = self._chance.randbytes(40)
        answer, _ = self._call("train", raw, plan, weights, None, [])
        try:
            self._expect(msg.Report, await self._told("train", answer))
            self._wrong("garbage was taken for a ticket")
        except StoreError:
            pass

    async def _old_verdict(self, ticket: msg.Ticket) -> None:
        """The store has heard of this coordinator: one before it may not make it drop its update."""
        if self._epoch < 2 or self._actor is None:
            return
        verdict = msg.Verdict(ticket.id, None, "forged", run=self._run, epoch=self._epoch - 1)
        await self._told("settle", self._actor.settle.remote([msg.encode(verdict)]))
        card = self._expect(msg.Card, await self._ask("describe", self._run, self._epoch))
        own = {said.ticket for said in self._before}  # at the end of a run this coordinator drops it itself
        if ticket.id not in card.outbox and ticket.id not in own:
            self._wrong(f"a coordinator that is over had ticket {ticket.id} dropped")

    async def collect(self, ticket: str, how: list[msg.Part]) -> np.ndarray:
        update = await super().collect(ticket, how)
        if self._now("update collected twice"):
            again = await super().collect(ticket, how)
            if again.tobytes() != update.tobytes():
                self._wrong(f"the update of ticket {ticket} came in two ways")
        if self._now("update cut short", SHARE / 4):
            return update[:-1]
        if self._now("update not finite", SHARE / 4):
            update = update.copy()
            update[self._chance.randrange(update.size)] = np.nan
        return update

    def settle(self, verdict: msg.Verdict) -> None:
        if self._now("verdict late, after later ones"):
            asyncio.get_running_loop().call_later(self._chance.uniform(0.1, 3), super().settle, verdict)
        else:
            super().settle(verdict)
        if self._now("verdict told twice"):
            super().settle(verdict)
        if self._before and self._now("old verdict replayed"):
            super().settle(self._chance.choice(self._before))
        self._before.append(replace(verdict))


class _Jumping:
    """The `time` module as raypipe.compose sees it: its wall clock jumps by what a file says, in seconds."""

    monotonic = staticmethod(time.monotonic)

    @staticmethod
    def time() -> float:
        try:
            return time.time() + float((Path(os.environ[FOLDER]) / "jump").read_text() or 0)
        except (OSError, ValueError):
            return time.time()


def compose(*arguments: Any, **more: Any) -> Composition:
    """As `raypipe.compose.compose`, in a coordinator's process whose network and clock are bad."""
    vars(coordinator)["StoreClient"] = NoisyClient
    vars(composing)["time"] = _Jumping
    return composing.compose(*arguments, **more)


if __name__ == "__main__":
    import chaos_port  # not __main__: the coordinator's process imports it by this name

    from raypipe import cli, launch

    vars(launch)["compose"] = chaos_port.compose
    sys.exit(cli.main(sys.argv[1:]))

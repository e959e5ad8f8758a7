"""What a thin line must not hold up: a store's process answers while the weights of its ticket are on their way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import ray
from conftest import Place

from raypipe.config.schema import RunConfig, Store
from raypipe.errors import StoreUnreachable
from raypipe.models.flat import initial
from raypipe.store.client import StoreClient
from raypipe.store.going import Going, Pace
from raypipe.store.messages import Plan, Ticket, encode

LATE_S = 4.0


class Slow(StoreClient):
    """Of a store that has three updates and hands them over in pieces; nothing of it is on Ray."""

    def __init__(self) -> None:
        super().__init__(Store(id="mill"), "run", 1, "c0de", "actor")
        self.going: dict[str, Going] = {}
        self.asked: list[str] = []

    async def _ask(self, method: str, *arguments: Any) -> Any:
        self.asked.append(f"{method} {arguments[0]}")
        await asyncio.sleep(0)
        if method == "piece":
            piece, _ = self.going[arguments[0]].piece(arguments[1], 0.0)
            return piece.at, piece.data, piece.check
        self.going[arguments[0]] = Going(np.full(30_000, len(self.going), np.float32), Pace(1e6, 0.0))
        return self.going[arguments[0]].about


def test_a_stores_updates_come_one_after_the_other() -> None:
    """Together each would take as long as all; and a store keeps two for the taking."""

    async def all_three() -> tuple[list[float], list[str]]:
        store = Slow()
        found = await asyncio.gather(*(store.collect(ticket, []) for ticket in ("t1", "t2", "t3")))
        return [float(update[-1]) for update in found], store.asked

    values, asked = asyncio.run(all_three())
    assert values == [0.0, 1.0, 2.0]
    assert [said.split()[1] for said in asked] == sorted(said.split()[1] for said in asked)
    assert asked.count("piece t1") > 0


@ray.remote(num_cpus=0)
def _late(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    time.sleep(LATE_S)
    return vector


@pytest.mark.cluster
def test_a_store_answers_while_its_weights_are_on_their_way(cluster: Place) -> None:
    """Ray keeps calls in order: one that lacks its arguments would hold up those after it, heartbeats too."""
    from raypipe.placement.actor import connect, shut_down

    said = RunConfig.model_validate(cluster.config())
    layout, weights = initial(said.model, 10, 1, 28, 0)
    parts = {"optimizer": said.train.optimizer, "lr": 0.05, "schedule": said.train.schedule, "batch_size": 16}
    plan = encode(
        Plan(run="thin", task=said.task, model=said.model, data=said.data, layout=layout.fingerprint, **parts)
    )

    async def work() -> tuple[float, int, str]:
        client = StoreClient(Store(id="shop-1", cpus=0.2), "thin", 1, "c0dec0dec0de", "actor")
        await client.join()
        began = time.monotonic()
        ticket = Ticket("t1", "shop-1", 1, 0, 5, (0.0, 0.1), max_steps=2)
        training = asyncio.ensure_future(client.train(ticket, plan, _late.remote(weights)))
        await asyncio.sleep(0.1)
        assert await client._actor.heartbeat.remote()
        answered_s = time.monotonic() - began
        steps = (await training).steps
        os.kill((await client.join()).process, signal.SIGKILL)
        with pytest.raises(StoreUnreachable) as gone:
            await client._ask("heartbeat")
        client.kill()
        return answered_s, steps, gone.value.message

    connect(cluster.address)
    try:
        answered_s, steps, gone = asyncio.run(work())
    finally:
        shut_down()
    assert answered_s < LATE_S / 2
    assert steps == 2
    assert gone == "store shop-1: its process ended", "Ray's advice on memory speaks of nodes and death"

"""The follower as a Ray actor: MLflow is imported, spoken to and waited for in a process of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from raypipe.importing import without_collecting

if TYPE_CHECKING:
    from raypipe.tracking.follow import Follower

POLL_S = 0.5
REST_S = 2.0  # between two steps, while a run goes on
COMEBACK_S = 4.0  # for which a run that comes back has the cores for itself
DRAIN_S = 30.0  # how long its end waits


class Following:
    """Sync, with its loop in a thread that `__init__` starts, so that a restarted one goes on from its cursor."""

    def __init__(
        self,
        run_dir: str,
        uri: str | None = None,
        home: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """`run_dir` is absolute; its journal may be missing yet. `uri`, `home`: as in `mlflow_sink.Sink`.

        `environment`: MLFLOW_* settings for this process alone, set before MLflow is imported.
        """
        os.environ.update(environment or {})
        self._where = (Path(run_dir), uri, Path(home) if home else None)
        self._stop, self._hurry = threading.Event(), threading.Event()
        self._trouble = "starting"
        self._follower: Follower | None = None
        self._thread = threading.Thread(target=self._loop, name="mlflow-follower", daemon=True)
        self._thread.start()

    def behind(self) -> int:
        """Records that are not in MLflow yet; -1 while the journal was not opened."""
        return self._follower.behind() if self._follower else -1

    def where(self) -> str:
        """The run's page, or the embedded store's address; empty while the journal was not opened."""
        return self._follower.where() if self._follower else ""

    def trouble(self) -> str:
        """Why nothing moves, in one line; empty when all is well."""
        return self._trouble or (self._follower.trouble if self._follower else "")

    def drain(self, timeout_s: float) -> bool:
        """Wait until MLflow has all that is written now; False when it did not in time."""
        self._hurry.set()
        until = time.monotonic() + timeout_s
        while self.behind() != 0:
            if time.monotonic() >= until:
                return False
            time.sleep(0.05)
        return True

    def stop(self) -> None:
        """End the loop after what it is at."""
        self._stop.set()
        self._hurry.set()
        self._thread.join(timeout=30)

    def _loop(self) -> None:
        with without_collecting():
            from raypipe.tracking.follow import Follower

        while not self._stop.is_set():
            try:
                if self._follower is None:
                    self._follower = Follower(*self._where)
                    self._follower.step()  # imports MLflow, makes its tables: while the stores start
                    os.nice(19)  # on one machine the stores go first; when they end, all of a core is free for this
                self._trouble = ""
                self._follower.run(self._stop, until_done=True, rest=partial(self._hurry.wait, REST_S))
            except Exception as error:  # noqa: BLE001  whatever it is, the next attempt starts from the cursor
                self._trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            self._stop.wait(POLL_S)
        if self._follower:
            self._follower.close()


# No CPU is taken from training; questions are answered while another caller drains. The caller adds the name, the
# lifetime and the node of the run's folder by `.options(...)`.
_options = {"num_cpus": 0, "max_restarts": -1, "max_concurrency": 4}
MlflowFollower = ray.remote(**_options)(Following)  # type: ignore[call-overload]  # the stubs lack max_concurrency


class FollowerClient:
    """The coordinator's side. `environment`: as above, logins too, for the follower alone; no store sees them."""

    def __init__(self, folder: Path, home: Path, environment: dict[str, str]) -> None:
        self._what = (str(folder), None, str(home), environment)
        self._actor: Any = None
        self._later: asyncio.TimerHandle | None = None

    def begin(self, *, again: bool) -> None:
        """It takes a core to start: at first while nobody can do anything yet, else once the stores have work."""
        if again:
            self._later = asyncio.get_running_loop().call_later(COMEBACK_S, self._begin)
        else:
            self._begin()

    def close(self) -> None:
        """It is not begun any more."""
        if self._later is not None:
            self._later.cancel()

    def _begin(self) -> None:
        if self._actor is None:
            self._actor = MlflowFollower.options(**_beside_me()).remote(*self._what)

    async def drain(self) -> dict[str, Any]:
        """Give MLflow a while; what it lacks is in the journal and follows later."""
        self._begin()
        answer: dict[str, Any] = {"done": False, "where": "", "trouble": ""}
        try:
            async with asyncio.timeout(DRAIN_S + 5):
                until = time.monotonic() + DRAIN_S
                while not answer["done"] and time.monotonic() < until and not answer["trouble"]:
                    answer["done"] = await self._actor.drain.remote(4.0)
                    answer["trouble"] = "" if answer["done"] else await self._actor.trouble.remote()
                answer["where"] = await self._actor.where.remote()
        except (TimeoutError, ray.exceptions.RayError) as error:
            answer["trouble"] = type(error).__name__
        return answer


def _beside_me() -> dict[str, Any]:
    """Options that place an actor on this actor's node, where the run's folder is."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}

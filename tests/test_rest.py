"""A run that is stopped for now, as by `ray job stop`: nothing is left on the cluster, and it is not over."""

from __future__ import annotations

import os
import signal
import time

import pytest
from conftest import Place
from test_cluster import Federation, connected

from raypipe.errors import RunError
from raypipe.launch import _StopKey


def test_sigterm_lets_a_run_rest_and_only_ctrl_c_ends_it() -> None:
    done: list[str] = []
    key = _StopKey("run-1", lambda: done.append("ask"), lambda: done.append("rest"))
    with key:
        key.check()
        os.kill(os.getpid(), signal.SIGINT)
        key.check()
        assert done == ["ask"]
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(RunError, match=r"^stopped for now; it goes on with: raypipe train --resume run-1$"):
            key.check()
    assert done == ["ask", "rest"]


@pytest.mark.cluster
def test_a_run_at_rest_holds_no_store_and_is_not_over(cluster: Place) -> None:
    pacing = {"budget_s": 0.5, "heartbeat_s": 1}
    config = cluster.config(pace="paced", pacing=pacing, stop={"max_versions": 5000}, train={"local_steps": None})
    config["stores"], config["track"] = config["stores"][:2], {"mlflow": False}
    import ray

    with connected(cluster):
        federation = Federation(cluster, config)
        federation.until(lambda board: board["version"] >= 2, 120)
        assert len(federation.processes()) == 2
        begun = time.monotonic()
        ray.get(federation.actor.rest.remote())
        assert time.monotonic() - begun < 1.5
        with pytest.raises(ray.exceptions.RayError):
            federation.result(20)
        end = time.monotonic() + 20
        while federation.processes():
            assert time.monotonic() < end, "its stores' processes are still there"
            time.sleep(0.2)
        time.sleep(2)
        assert federation.processes() == {}, "nobody took them in again"
    assert federation.records("run_finished", "store_left", "ticket_failed") == []

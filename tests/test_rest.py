"""A run that is stopped for now, as by `ray job stop`: nothing is left on the cluster, and it is not over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Place
from test_cluster import connected

from raypipe.errors import RunError
from raypipe.launch import _StopKey
from raypipe.tracking.journal import Journal


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
def test_a_job_that_is_stopped_rests_and_submitted_again_goes_on_with_its_run(cluster: Place, tmp_path: Path) -> None:
    pacing = {"budget_s": 0.5, "heartbeat_s": 1}
    config = cluster.config(name="rest", pace="paced", pacing=pacing, stop={"max_versions": 5000})
    config["train"], config["stores"] = {"batch_size": 16}, config["stores"][:2]
    config["track"] = {"mlflow": False}
    (tmp_path / "rest.yaml").write_text(yaml.safe_dump(config))

    def job(*command: str) -> str:
        arguments = [str(ROOT / ".venv/bin/ray"), "job", command[0], "--address", cluster.jobs, *command[1:]]
        end = time.monotonic() + 90
        while True:
            done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
            if done.returncode == 0:
                return done.stdout
            assert "No available agent" in done.stderr, done.stdout + done.stderr  # where the cluster has just begun
            assert time.monotonic() < end
            time.sleep(2)

    def submit(name: str) -> None:
        entry = ["python", "jobs/federate.py", str(tmp_path / "rest.yaml"), "--insecure"]
        job("submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--", *entry)

    def records(*kinds: Any) -> list[dict[str, Any]]:
        folders = list((cluster.home / "runs").glob("rest-*"))
        assert len(folders) <= 1, "a second run began"
        return [r.body for f in folders for r in Journal(f / "journal.sqlite").read(kinds=kinds)]

    def until(what: Callable[[], Any], seconds: float, said: str) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"{said}\n{job('logs', submitted[-1])}"
            time.sleep(0.3)

    submitted = ["rest-1"]
    submit("rest-1")
    until(lambda: len(records("version_published")) > 2, 120, "no version")
    job("stop", submitted[-1])
    stopped = len(records("version_published"))
    with connected(cluster):
        import ray

        def left() -> list[str]:
            named = ray.util.list_named_actors(all_namespaces=True)
            return [str(actor["name"]) for actor in named if "/rest-" in f"/{actor['name']}"]

        until(lambda: not left(), 30, "its stores' processes are still there")
        time.sleep(2)
        assert left() == [], "nobody took them in again"
        assert records("run_finished", "store_left", "ticket_failed") == []
        submitted.append("rest-2")
        submit("rest-2")
        until(lambda: len(records("version_published")) > stopped + 2, 120, "it did not go on")
        (run,) = [folder.name for folder in (cluster.home / "runs").glob("rest-*")]
        assert f"goes on with run {run}, which was not ended" in job("logs", "rest-2")
        ray.get(ray.get_actor(f"coordinator/{run}", namespace="raypipe").stop.remote("seen"))
        until(lambda: records("run_finished"), 60, "no end")
    assert [body["epoch"] for body in records("run_started")] == [1, 2]
    versions = [body["version"] for body in records("version_published")]
    assert versions == list(range(len(versions)))

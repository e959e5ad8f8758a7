"""The README's first command, as it stands there: its configuration, its clock, its screen."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SHORTER = ["--set", "stop.max_seconds=15"]  # of 36: the rest is as a user has it


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path: Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="rp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def first_command() -> list[str]:
    """What `uv run` is told there."""
    (line,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith("jobs/federate.py")]
    return shlex.split(line.partition(".venv/bin/uv run -q ")[2])


def test_the_first_command_ends_with_a_table_that_shows_the_slow_store(home: Path) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAYPIPE_STORES")}
    env |= {"RAYPIPE_HOME": str(home), "RAY_TMPDIR": str(home)}
    command = [sys.executable, *first_command(), *SHORTER]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 30, done.stdout
    (head,) = [number for number, line in enumerate(lines) if line.startswith("store ")]
    names = lines[head].split()
    assert names == ["store", "images", "steps/s", "updates", "steps", "share", "stale", "alone", "shared"]
    rows = {
        row["store"]: row for row in (dict(zip(names, line.split(), strict=True)) for line in lines[head + 1 :][:5])
    }
    assert sorted(rows) == ["city-centre", "harbour", "mall", "outlet", "suburb"]
    slow = rows.pop("harbour")
    assert 0 < int(slow["steps"]) < min(int(row["steps"]) for row in rows.values())
    assert float(slow["steps/s"]) < min(float(row["steps/s"]) for row in rows.values())
    assert float(slow["share"].rstrip("%")) > 0
    assert float(slow["stale"]) >= 0
    assert all(row["alone"].endswith("%") and row["shared"].endswith("%") for row in (slow, *rows.values()))
    assert any(line.startswith("MLflow: sqlite:") for line in lines), done.stdout
    run = next(folder.name for folder in (home / "runs").iterdir() if folder.is_dir())
    assert lines[-1].startswith(f"next: raypipe promote {run} ")

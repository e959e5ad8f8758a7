"""Plants bugs one at a time in a copy of the package and sees whether the checks find them; the list: chaos_bugs.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from chaos_bugs import BUGS, Bug

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = 1200  # after which a bug counts as not found
SEED = 100
PURE = (
    "from chaos_pure import blocks; t, n = blocks({seed}, {histories}, 1, stop=True); print(*t.violations[:1]);"
    " raise SystemExit(bool(t.violations))"
)
PATIENCE_S = 900.0


@dataclass(frozen=True)
class Found:
    """What became of a planted bug: `said` is the check's own word."""

    bug: Bug
    found: bool
    said: str
    seconds: float


def plant(bug: Bug, copy: Path) -> None:
    """Raises ValueError where the patch does not fit."""
    file = copy / "raypipe" / bug.file
    text = file.read_text()
    if (times := text.count(bug.old)) != 1:
        raise ValueError(f"{bug.name}: its place is {times} times in {bug.file}; the patch must be written anew")
    file.write_text(text.replace(bug.old, bug.new))


def copied(to: Path) -> Path:
    """The package, the jobs and the tests; the sample's images are linked."""
    for folder in ("raypipe", "jobs", "tests", "configs"):
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__", "*.parquet"))
    for file in (ROOT / "raypipe").rglob("*.parquet"):
        (to / file.relative_to(ROOT)).symlink_to(file)
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def checked(check: str, copy: Path) -> tuple[int, str]:
    """Exit code (0: nothing found) and the last word of a check in a copy."""
    if check == "pure":
        command = [sys.executable, "-c", PURE.format(seed=SEED, histories=HISTORIES)]
    else:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", check]
    env = {**os.environ, "PYTHONPATH": f"{copy}:{copy / 'jobs'}:{copy / 'tests'}", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"it did not end in {PATIENCE_S:.0f} s"
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("E   ", "seed "))]
    return done.returncode, (told or lines or [""])[0 if told else -1].removeprefix("E ").strip()


def look(bug: Bug) -> Found:
    """Plant a bug and check."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rpb") as folder:
        copy = copied(Path(folder) / "copy")
        plant(bug, copy)
        code, said = checked(bug.check, copy)
    if code not in (0, 1):
        raise RuntimeError(f"{bug.name}: the check {bug.check} did not run: {said}")
    return Found(bug, code == 1, said, time.monotonic() - began)


def sound() -> list[str]:
    """Checks that find something where nothing is planted: there should be none."""
    with tempfile.TemporaryDirectory(prefix="rpb") as folder:
        copy = copied(Path(folder) / "copy")
        wrong = []
        for check in sorted({bug.check for bug in BUGS}):
            code, said = checked(check, copy)
            if code:
                wrong.append(f"{check} finds something where nothing is planted: {said}")
    return wrong


def report(workers: int, names: Sequence[str] = ()) -> bool:
    """Print a table; whether all were found, and nothing where there is nothing."""
    chosen = [bug for bug in BUGS if not names or any(name in bug.name for name in names)]
    with ThreadPoolExecutor(workers) as pool:
        calm = pool.submit(sound)
        results = []
        for result in pool.map(look, chosen):
            results.append(result)
            word = "found" if result.found else "NOT FOUND"
            where = result.bug.check.rpartition("::")[2]
            print(f"{word:9} {result.seconds:4.0f} s  {result.bug.name} ({result.bug.file})", flush=True)
            print(f"                  by {where}: {result.said[:150]}", flush=True)
        wrong = calm.result()
    for line in wrong:
        print(line)
    found = sum(result.found for result in results)
    print(f"planted bugs found: {found} of {len(results)}")
    return found == len(results) and not wrong

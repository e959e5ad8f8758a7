"""Whether others need this machine's GPUs, by what `nvidia-smi pmon` says of each process.

The site's own processes do not count: this one, those that work on other runs of the store, and what they started.
Everybody else does, whichever GPU it is. Process ids have to be the machine's own: a container without them
(`docker run --pid=host`) would take its own training for another's. What cannot be known is taken for a need, since
the GPU is its owner's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from raypipe.errors import ConfigError

LOOK_S = 0.7  # between two looks; the driver's own figures are means of up to a second
FRESH_S = 2.5  # a figure older than that says nothing
QUIET_S = 3.0  # so long nobody needed it before training goes on: a checkout computes in bursts
UNUSED_S = 10.0  # nobody asked for so long: no more looks
ANSWER_S = 5.0
PMON = ("pmon", "-c", "1", "-s", "u")
NEEDED = {"gpu", "pid", "sm"}  # columns; drivers differ in the others


def load_of_others(printed: str, ours: Callable[[int], bool]) -> float:
    """Share of the busiest GPU's time, 0 to 1, that others had. Raises ValueError for what is no table of pmon's."""
    columns: list[str] = []
    shares: defaultdict[str, float] = defaultdict(float)
    for line in printed.splitlines():
        if line.startswith("#"):
            columns = columns or line.lstrip("# ").split()
            continue
        row = dict(zip(columns, line.split(), strict=False))
        if not row.keys() >= NEEDED:
            raise ValueError(line.strip())
        if row["pid"] != "-" and row["sm"] != "-" and not ours(int(row["pid"])):
            shares[row["gpu"]] += float(row["sm"]) / 100
    if not set(columns) >= NEEDED:
        raise ValueError("no table")
    return max(shares.values(), default=0.0)


class GpuWatch:
    """`why` is cheap; a thread looks for as long as somebody asks."""

    def __init__(self, home: Path, most: float) -> None:
        """`most`: the share of a GPU's time above which its owner needs it. Raises ConfigError without nvidia-smi."""
        found = shutil.which("nvidia-smi")
        if found is None:
            raise ConfigError("yield_gpu_load: there is no nvidia-smi on this machine to tell the load of its GPU")
        self._command, self._home, self._most = [found, *PMON], home, most
        self._looked_at = self._needed_at = float("-inf")
        self._asked_at = 0.0
        self._why = ""
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None

    def why(self) -> str:
        """Why nothing may be computed at this moment; empty when it may."""
        self._asked_at = time.monotonic()
        if self._asked_at - self._looked_at > FRESH_S:
            self._look()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._keep_looking, name="gpu", daemon=True)
            self._thread.start()
        return self._why

    def _keep_looking(self) -> None:
        while time.monotonic() - self._asked_at < UNUSED_S:
            time.sleep(LOOK_S)
            self._look()

    def _look(self) -> None:
        with self._looking:
            try:
                load, unknown = self._measured(), ""
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                load, unknown = 1.0, type(error).__name__
            now = self._looked_at = time.monotonic()
            if load >= self._most:
                self._needed_at = now
                unknown = f", which cannot be read: {unknown}" if unknown else ""
                self._why = f"its owner needs the machine (GPU load{unknown})"
            elif now - self._needed_at > QUIET_S:
                self._why = ""

    def _measured(self) -> float:
        done = subprocess.run(self._command, capture_output=True, text=True, timeout=ANSWER_S, check=True)
        own = {os.getpid(), *holders(self._home)}
        return load_of_others(done.stdout, lambda process: not own.isdisjoint(_line(process)))


def holders(home: Path) -> set[int]:
    """Processes that are at work on a run of this store; see runs.py for the file that they hold."""
    found = set()
    for file in home.glob("state/*/lock"):
        with suppress(OSError, ValueError):
            process = int(file.read_text("ascii"))
            if any(_is(handle, file) for handle in Path(f"/proc/{process}/fd").iterdir()):
                found.add(process)
    return found


def _is(handle: Path, file: Path) -> bool:
    with suppress(OSError):  # closed meanwhile
        return handle.samefile(file)
    return False


def _line(process: int) -> list[int]:
    """A process and those that it descends from."""
    line = [process]
    with suppress(OSError, ValueError):
        while line[-1] > 1:
            stat = Path(f"/proc/{line[-1]}/stat").read_text()
            line.append(int(stat.rpartition(")")[2].split()[1]))
    return line

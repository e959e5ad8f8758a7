"""The benchmark: ratios to a floor that is measured side by side with raypipe, in the same run.

python jobs/bench.py [--json] [--only w1,w2,...] [--repeats 3] [--quick]

raypipe runs as a user runs it: RunConfig, coordinator actor, journal, MLflow (embedded), each version judged at each
store. The ledger is a figure of its own: what it costs depends on the model's size alone. The floors are in
bench_floor.py. Ratios are medians of paired repeats, floor and raypipe in turn; a busy machine spoils them, so `load`
says how busy it was before each pair. --quick: one short repeat, no w1_command. Exit code 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_bed import IDS, Bed, configuration
from bench_floor import Job, to_json
from bench_ledger import ledger_seconds
from bench_parts import WARM, coordinator_ms, fold_ratios, fold_single_ratios, record_seconds

from raypipe.config.schema import RunConfig
from raypipe.models.flat import initial
from raypipe.tracking.journal import Journal

STEADY = 2  # versions before this one are start-up
SLEEP_S, SLOW = 0.4, 5.0  # W3: pretended compute of a ticket, and how much slower one store is
IDEAL_S = 8 / (7 / SLEEP_S + 1 / (SLOW * SLEEP_S))  # W3: 8 updates when nobody waits
AT_LEAST = {"fold_ratio", "fold_single_ratio"}  # of these more is better
MUST = {
    "fold_ratio": 0.6,
    "fold_single_ratio": 0.3,
    "coordinator_ms": 5.0,
    "w1_ratio": 1.15,
    "w2_ratio": 1.15,
    "w3_ratio": 1.15,
    "main_job_s": 120.0,
    "w1_command": 1.2,
    "ledger_ratio": 1.2,
    "journal_share": 0.05,
}


@dataclass(frozen=True)
class Line:
    """A figure; `value` None when it could not be measured."""

    figure: str
    value: float | None
    detail: dict[str, Any]

    @property
    def ok(self) -> bool:
        if self.value is None or not self.detail.get("sound", True):
            return False
        must = MUST[self.figure]
        return self.value >= must if self.figure in AT_LEAST else self.value <= must

    def as_json(self) -> str:
        said = {"figure": self.figure, "value": self.value, "must": MUST[self.figure], "ok": self.ok}
        return json.dumps({**said, "detail": self.detail})

    def as_text(self) -> str:
        value = "-" if self.value is None else f"{self.value:.3f}"
        sign = ">=" if self.figure in AT_LEAST else "<="
        detail = ", ".join(f"{key} {_short(said)}" for key, said in self.detail.items())
        return f"{self.figure:18}{value:>9}  {sign} {MUST[self.figure]:<6g}{'ok' if self.ok else 'MISSED':8}{detail}"


def _short(said: Any) -> str:
    if isinstance(said, list):
        return "[" + " ".join(map(_short, said)) + "]"
    return f"{said:.3g}" if isinstance(said, float) else str(said)


class Bench(Bed):
    """The figures, each a method."""

    # -- W1, W2, W3 -------------------------------------------------------------------------------------------

    def w1(self) -> Line:
        return self._steady("w1_ratio", configuration("w1", stop={"max_versions": 5 if self.quick else 10}))

    def w2(self) -> Line:
        return self._steady("w2_ratio", self._w2())

    def _w2(self) -> dict[str, Any]:
        model = {"name": "resnet18", "norm": "group", "small_images": False}
        train = {"lr": 0.01, "batch_size": 32, "local_steps": 1}
        return configuration("w2", model=model, train=train, stop={"max_versions": 4 if self.quick else 20})

    def journal(self) -> Line:
        """What W2's record took, written once more, as a share of the time that the versions took."""
        load, shares = os.getloadavg()[0], list[float]()
        seconds: list[float] = []

        def look(run: Path, config: RunConfig) -> None:
            seconds.append(record_seconds(run, config, self.folder / f"record-{len(seconds)}"))

        for _ in range(self.repeats):
            versions = self.federate(self._w2(), look)["version_published"]
            steady = median(_differences([v["at"] for v in versions if v["version"] >= STEADY]))
            shares.append(seconds[-1] / len(versions) / steady)
        return Line("journal_share", median(shares), {"shares": shares, "seconds": seconds, "load": load})

    def _steady(self, figure: str, said: dict[str, Any]) -> Line:
        """Median seconds from version to version, past the start, over the floor's; beside it, a bare Ray script's."""
        job = self.job(said)
        pairs, load, losses, ray = [], [], [], []
        self.start()
        self.wait_for_quiet()
        for _ in range(self.repeats):
            load.append(os.getloadavg()[0])
            floor, bare = self.floor("processes", job), self.floor("ray", job)
            records = self.federate(said)
            versions = records["version_published"]
            if floor["parameters"] != self._parameters(said) or len(versions[-1]["contributions"]) != len(IDS):
                raise RuntimeError("the floor's model is another one, or a store is missing from a version")
            ours = _differences([v["at"] for v in versions if v["version"] >= STEADY])
            steady, of_bare = (median(_differences(side["at"][STEADY - 1 :])) for side in (floor, bare))
            pairs.append((steady, median(ours)))
            ray.append(of_bare / steady)
            # The floor judges versions 0 to n-1; ours are compared at the same one.
            mine = {r["version"]: r["metrics"]["loss"] for r in records["evaluated"]}
            losses.append((floor["loss"], mine[job.versions - 1]))
        detail = {**_sides(pairs), "bare_ray_ratios": ray, "floor_loss": median(floor for floor, _ in losses)}
        detail |= {"loss": median(ours for _, ours in losses), "versions": job.versions, "load": load}
        detail["sound"] = detail["loss"] <= 1.1 * detail["floor_loss"]  # who drops updates is fast
        return Line(figure, median(ours / floor for floor, ours in pairs), detail)

    def w3(self) -> Line:
        """Seconds per 8 updates in published versions, over the ideal where nobody waits."""
        sleepers = [{"id": store, "slowdown": SLOW if store == IDS[7] else 1.0} for store in IDS[:8]]
        said = configuration("w3", model={"name": "sleepy", "seconds": SLEEP_S}, stores=sleepers)
        said |= {"train": {"local_steps": 1}, "pace": "fedbuff", "pacing": {"buffer_size": 4}}
        said["stop"] = {"max_versions": 25 if self.quick else 60}
        waiting = {**said, "pace": "wait_for_all", "pacing": {}, "stop": {"max_versions": 4}}
        seconds, load = [], []
        for _ in range(self.repeats):
            load.append(os.getloadavg()[0])
            seconds.append(_per_eight(self.federate(said)["version_published"], WARM))
        waited = _per_eight(self.federate(waiting)["version_published"], 1)
        ratios = [s / IDEAL_S for s in seconds]
        detail = {"seconds": median(seconds), "ideal_s": IDEAL_S, "ratios": ratios, "load": load}
        return Line("w3_ratio", median(ratios), {**detail, "wait_for_all": waited / IDEAL_S})

    def job(self, said: Mapping[str, Any]) -> Job:
        """The floor's part in a workload."""
        config = self.load(said)
        train, versions = config.train, config.stop.max_versions or 1
        model = config.model["name"]
        return Job(str(self.stores), IDS, model, train.lr, train.batch_size, train.local_steps, versions)

    def _parameters(self, said: Mapping[str, Any]) -> int:
        layout, _ = initial(self.load(said).model, 10, 3, 32, 0)
        return sum(entry.size for entry in layout.entries)

    def floor(self, way: str, job: Job) -> dict[str, Any]:
        """One floor in a fresh process."""
        printed = self.command(["jobs/bench_floor.py", way, to_json(job)])[1]
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        return found

    # -- whole commands -------------------------------------------------------------------------------------------

    def w1_command(self) -> Line:
        """The whole command over a bare Ray script's, both from a cold start to the end, tests included."""
        self.close()
        said, file = configuration("w1"), str(self.write(configuration("w1")))
        pairs, load = [], []
        for _ in range(self.repeats):
            load.append(os.getloadavg()[0])
            bare = self.command(["jobs/bench_floor.py", "ray", to_json(self.job(said))])[0]
            pairs.append((bare, self.command(["jobs/federate.py", file])[0]))
        return Line("w1_command", median(ours / bare for bare, ours in pairs), {**_sides(pairs), "load": load})

    def main_job(self) -> Line:
        """The default job once, its data made too, as the first command of the README does after installing."""
        self.close()
        home, load = self.folder / "main", os.getloadavg()[0]
        seconds, _ = self.command(["jobs/federate.py", "configs/quickstart.yaml"], home)
        (journal,) = home.glob("runs/*/journal.sqlite")
        (final,) = [record.body for record in Journal(journal).read(kinds=["final"])]
        shared, alone = ([row[who] for row in final["table"] if row[who] is not None] for who in ("shared", "alone"))
        scores = {"shared": sum(shared) / len(shared), "alone": sum(alone) / len(alone)}
        points = 100 * (scores["shared"] - scores["alone"])
        return Line("main_job_s", seconds, {**scores, "points": points, "sound": points >= 10, "load": load})

    # -- parts ----------------------------------------------------------------------------------------------------

    def fold(self) -> Line:
        return self._folded("fold_ratio", fold_ratios)

    def fold_single(self) -> Line:
        self.start()
        return self._folded("fold_single_ratio", fold_single_ratios)

    def _folded(self, figure: str, measure: Callable[[int], list[tuple[float, float]]]) -> Line:
        load, pairs = os.getloadavg()[0], measure(5 if self.quick else 15)
        rates = {"read_gb_s": median(r for r, _ in pairs), "fold_gb_s": median(f for _, f in pairs)}
        value = median(f / r for r, f in pairs)
        # Nothing is folded faster than it is read: above 1 somebody else took the reads' time.
        return Line(figure, value, {**rates, "pairs": len(pairs), "sound": value <= 1, "load": load})

    def coordinator(self) -> Line:
        self.start()
        load, updates = os.getloadavg()[0], 100 if self.quick else 300
        config = {**configuration("coordinator"), "model": {"name": "small_cnn", "hidden": 119}, "pace": "fedbuff"}
        config |= {"pacing": {}, "stop": {"max_versions": updates // 5}}
        times = [coordinator_ms(self.load(config), self.folder) for _ in range(self.repeats)]
        return Line("coordinator_ms", median(times), {"runs": times, "updates": updates, "load": load})

    def ledger(self) -> Line:
        """All but the stores' hash of their base, over hashing every update twice; in the detail with it too."""
        load, found = os.getloadavg()[0], ledger_seconds(self.folder / "ledger", 5 if self.quick else 15)
        whole = [(one["stores"] + one["coordinator"]) / one["twice"] for one in found]
        value = median(all_ - one["bases"] / one["twice"] for all_, one in zip(whole, found, strict=True))
        seconds = {part: median(one[part] for one in found) for part in found[0]}
        return Line("ledger_ratio", value, {"with_base_checks": median(whole), **seconds, "load": load})


def _differences(at: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(at)]


def _per_eight(versions: list[dict[str, Any]], warm: int) -> float:
    """Seconds for 8 updates, of those in versions after `warm`."""
    steady = [v for v in versions if v["version"] >= warm]
    updates = sum(len(v["contributions"]) for v in steady[1:])
    return 8 * float(steady[-1]["at"] - steady[0]["at"]) / updates


def _sides(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    ratios = [ours / floor for floor, ours in pairs]
    return {"seconds": median(o for _, o in pairs), "floor_s": median(f for f, _ in pairs), "ratios": ratios}


# -- the command ----------------------------------------------------------------------------------------------


FIGURES: dict[str, tuple[str, Callable[[Bench], Line]]] = {
    "fold": ("fold_ratio", Bench.fold),
    "fold_single": ("fold_single_ratio", Bench.fold_single),
    "coordinator": ("coordinator_ms", Bench.coordinator),
    "ledger": ("ledger_ratio", Bench.ledger),
    "journal": ("journal_share", Bench.journal),
    "w1": ("w1_ratio", Bench.w1),
    "w2": ("w2_ratio", Bench.w2),
    "w3": ("w3_ratio", Bench.w3),
    "main_job": ("main_job_s", Bench.main_job),
    "w1_command": ("w1_command", Bench.w1_command),
}


def measured(bench: Bench, figure: str, measure: Callable[[Bench], Line]) -> Line:
    """A figure that cannot be had must not hide the others."""
    try:
        return measure(bench)
    except Exception as error:  # noqa: BLE001  reported in the figure's line
        lines = str(error).strip().splitlines() or [""]
        return Line(figure, None, {"error": f"{type(error).__name__}: {lines[-1]}"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="a JSON line a figure")
    parser.add_argument("--only", default=",".join(FIGURES), help=f"of {','.join(FIGURES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one short repeat, without w1_command")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in FIGURES]:
        parser.error(f"no figure {', '.join(unknown)}; there are {', '.join(FIGURES)}")
    if options.quick:
        wanted = [name for name in wanted if name != "w1_command"]
    folder = Path(tempfile.mkdtemp(prefix="rpb", dir="/tmp"))  # short: sockets lie in it
    bench, all_ok = None, True
    try:
        bench = Bench(folder, 1 if options.quick else options.repeats, options.quick)
        for name in (name for name in FIGURES if name in wanted):
            line = measured(bench, *FIGURES[name])
            all_ok &= line.ok
            print(line.as_json() if options.json else line.as_text(), flush=True)
    finally:
        if bench is not None:
            bench.close()
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all_ok else 1


if __name__ == "__main__":
    sys.exit(main())

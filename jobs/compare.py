"""The sceptic's experiment: is it as good as pooled, and at what price? Fashion-MNIST over ten stores.

python jobs/compare.py [--quick] [--seeds 5] [--images 6000] [--seconds 120] [--kept FILE] [--arms ...] [--processes 2]

Ten stores, 1 to 10 times slower than the fastest, on links of 20 Mbit down and 5 up; seconds and bytes are those of a
virtual clock (compare_clock.py), everything else is real. Each arm has the same number of trials of its learning rate,
on a seed of its own and on the validation split; then as many paired seeds as asked for, on the test split. Then the
twin test: two classes at one store alone, once at a fast one, once at one ten times slower: what is lost of their
recall? (--twins-only: this alone.) Prints Markdown. What it will take is said first; with --kept FILE a run that was
cut goes on where it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone or a job's working directory

from compare_arms import ARMS, FEDERATED, Result, Scale, Unit, rates, run, twins
from compare_kept import Kept, plan

from raypipe.tracking.ratio import half_width, ratio

TUNING_SEED = 1000
QUICK = Scale(train=1500, judged=500, seconds=30.0, every_s=3.0)
PART_OF_POOLED = 0.95  # the target, unless another is asked for
HEADER = (
    "arm", "rate", "accuracy", "/ pooled (> 95 %)", "worst store", "worst late", "s to target", "MB to target",
    "MB up", "MB down", "versions", "steps", "images seen",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Tables on stdout, progress on stderr."""
    options = parsed(arguments)
    scale, seeds = _scale(options), list(range(1, _seeds(options) + 1))
    kept, trials = Kept(options.kept), 1 if options.quick else 3
    began, context = time.monotonic(), multiprocessing.get_context("spawn")
    _tell(*plan(_everything(options, scale, seeds, kept, trials), kept, options.processes))
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        tuned = {split: _tuned(pool, kept, options.arms, split, scale, trials=trials) for split in options.splits}
        compared = [] if options.twins_only else options.splits
        units = {split: _units(options.arms, split, seeds, tuned[split], scale) for split in compared}
        found = _all(pool, kept, [unit for split in compared for unit in units[split]])
        for split in compared:
            _say(_title(split, scale, seeds), *_table([found[u] for u in units[split]], options.arms, options.target))
        if "two-labels" in tuned and not options.no_twins:  # its rates
            arms = [arm for arm in options.twin_arms or options.arms if arm in FEDERATED and arm in options.arms]
            _twin_test(pool, kept, arms, tuned["two-labels"], scale, seeds)
    _tell(f"{time.monotonic() - began:.0f} s on {options.processes} processes")
    return 0


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, the twin test's own where it is alone."""
    options = _parser().parse_args(arguments)
    if options.twins_only:
        options.splits = ["two-labels"]
        options.arms = options.twin_arms = [arm for arm in options.twin_arms or options.arms if arm in FEDERATED]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, one seed, one trial")
    parser.add_argument("--seeds", type=int, help="paired seeds; default 5, or 1 with --quick")
    parser.add_argument("--images", type=int, help="of all stores together; default 6,000")
    parser.add_argument("--judged", type=int, help="images that a look is at; default 2,000")
    parser.add_argument("--seconds", type=float, help="of virtual time; default 120")
    parser.add_argument("--splits", nargs="+", choices=("dirichlet", "two-labels"), default=["dirichlet", "two-labels"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--target", type=float, help=f"accuracy; default {PART_OF_POOLED:g} of the pooled arm's")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--no-twins", action="store_true")
    only.add_argument("--twins-only", action="store_true", help="tuned by two-labels; nothing else is compared")
    parser.add_argument("--twin-arms", nargs="+", choices=list(FEDERATED), metavar="ARM", help="default: all of --arms")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kept", type=Path, help="a file that keeps each run that is done; begun again it goes on")
    return parser


def _scale(options: argparse.Namespace) -> Scale:
    scale = QUICK if options.quick else Scale()
    said = {"train": options.images, "judged": options.judged, "seconds": options.seconds}
    changed = replace(scale, **{name: value for name, value in said.items() if value is not None})
    return replace(changed, every_s=changed.seconds * scale.every_s / scale.seconds)  # as many looks


def _seeds(options: argparse.Namespace) -> int:
    return options.seeds or (1 if options.quick else 5)


def _everything(
    options: argparse.Namespace, scale: Scale, seeds: Sequence[int], kept: Kept, trials: int
) -> Iterator[Unit]:
    """All runs, of any rate where the best is not known yet."""
    for split in options.splits:
        trial = _trials(options.arms, split, scale) if trials > 1 else []
        yield from trial
        best = _best(options.arms, split, scale, kept, trials) or _middle(options.arms)
        if not options.twins_only:
            yield from _units(options.arms, split, seeds, best, scale)
        if split == "two-labels" and not options.no_twins:
            arms = [arm for arm in options.twin_arms or options.arms if arm in FEDERATED and arm in options.arms]
            yield from _twin_units(arms, seeds, best, scale)


def _all(pool: ProcessPoolExecutor, kept: Kept, units: Sequence[Unit]) -> dict[Unit, Result]:
    """Of each its result; those that are done are not run again."""
    missing = [unit for unit in units if kept.get(unit) is None]
    for number, done in enumerate(as_completed([pool.submit(run, unit) for unit in missing]), 1):
        kept.add(result := done.result())
        unit = result.unit
        what = f"{unit.split}, seed {unit.seed}, {unit.arm} at {unit.rate:g}: {result.quality:.3f}"
        _tell(f"{number} of {len(missing)}  {what}, {result.cpu_s:.0f} s")
    found = {unit: kept.get(unit) for unit in units}
    return {unit: result for unit, result in found.items() if result is not None}


def _units(arms: Sequence[str], split: str, seeds: Sequence[int], best: dict[str, float], scale: Scale) -> list[Unit]:
    return [Unit(arm, split, seed, best[arm], scale) for seed in seeds for arm in arms]


def _trials(arms: Sequence[str], split: str, scale: Scale) -> list[Unit]:
    return [Unit(arm, split, TUNING_SEED, rate, scale, "validation") for arm in arms for rate in rates(arm)]


def _middle(arms: Sequence[str]) -> dict[str, float]:
    return {arm: rates(arm)[len(rates(arm)) // 2] for arm in arms}


def _best(arms: Sequence[str], split: str, scale: Scale, kept: Kept, trials: int) -> dict[str, float] | None:
    """The best of each arm's rates, the middle one untried with one trial; None while there are trials to be run."""
    if trials == 1:
        return _middle(arms)
    found = [result for unit in _trials(arms, split, scale) if (result := kept.get(unit)) is not None]
    if len(found) < len(_trials(arms, split, scale)):
        return None
    return {arm: max((r for r in found if r.unit.arm == arm), key=lambda r: r.quality).unit.rate for arm in arms}


def _tuned(
    pool: ProcessPoolExecutor, kept: Kept, arms: Sequence[str], split: str, scale: Scale, *, trials: int
) -> dict[str, float]:
    if trials > 1:
        _all(pool, kept, _trials(arms, split, scale))
    best = _best(arms, split, scale, kept, trials)
    assert best is not None
    return best


def _title(split: str, scale: Scale, seeds: Sequence[int]) -> str:
    mix = {"dirichlet": "Dirichlet 0.1", "two-labels": "2 labels a store"}[split]
    return (
        f"\n### {mix}: 10 stores, speeds 1 to 10x, {scale.train:,} images, {scale.seconds:g} s of virtual time, "
        f"{len(seeds)} paired seed{'s' if len(seeds) > 1 else ''}\n"
    )


def _table(found: Sequence[Result], arms: Sequence[str], target: float | None) -> list[str]:
    by_arm = {arm: [result for result in found if result.unit.arm == arm] for arm in arms}
    pooled = {r.unit.seed: r.quality for r in by_arm.get("pooled", [])}
    if target is None and pooled:
        target = PART_OF_POOLED * fmean(pooled.values())
    lines = [_row(HEADER), _row(["---"] * len(HEADER))]
    lines += [_row(_cells(arm, results, pooled, target)) for arm, results in by_arm.items()]
    if target is not None:
        lines += ["", f"target: accuracy {target:.3f}; its seconds and bytes are means over the seeds that reached it"]
    return lines


def _cells(arm: str, results: Sequence[Result], pooled: dict[int, float], target: float | None) -> list[str]:
    def mean(values: Sequence[float], form: str) -> str:
        return format(fmean(values), form)

    spread = f" ± {100 * stdev(r.quality for r in results):.1f}" if len(results) > 1 else ""
    against = None if arm == "pooled" else ratio({r.unit.seed: r.quality for r in results}, pooled)
    low = f" ({against.low:.3f})" if against and against.bound is not None else ""
    reached = [] if target is None else [look for r in results if (look := r.reached(target))]
    times = mean([look.at for look in reached], ".0f") if reached else "never"
    moved = mean([(look.up + look.down) / 1e6 for look in reached], ".1f") if reached else "-"
    some = f" ({len(reached)} of {len(results)})" if 0 < len(reached) < len(results) else ""
    last = [r.trace.looks[-1] for r in results]
    return [
        arm,
        f"{results[0].unit.rate:g}",
        f"{100 * fmean(r.quality for r in results):.1f} %{spread}",
        "-" if against is None else f"{against.mean:.3f}{low}",
        f"{100 * fmean(r.worst_store for r in results):.1f} %",
        f"{100 * min(r.worst_late for r in results):.1f} %",
        times + some,
        moved,
        mean([look.up / 1e6 for look in last], ".1f"),
        mean([look.down / 1e6 for look in last], ".1f"),
        *(mean([getattr(r.trace, name) for r in results], ",.0f") for name in ("versions", "steps", "images")),
    ]


def _twin_units(arms: Sequence[str], seeds: Sequence[int], best: dict[str, float], scale: Scale) -> list[Unit]:
    return [u for s in seeds for arm in arms for u in twins(Unit(arm, "twin", s, best[arm], scale))]


def _twin_test(
    pool: ProcessPoolExecutor, kept: Kept, arms: Sequence[str], best: dict[str, float], scale: Scale,
    seeds: Sequence[int],
) -> None:  # fmt: skip
    """What a store's classes lose when it is ten times slower."""
    found = list(_all(pool, kept, _twin_units(arms, seeds, best, scale)).values())
    head = ("arm", "recall, at a fast store", "10x slower", "points lost", "95 % interval")
    lines = [_row(head), _row(["---"] * len(head))]
    for arm in arms:
        fast, slow = (
            {r.unit.seed: r.own_recall for r in found if r.unit.arm == arm and r.unit.twin_slowness == slowness}
            for slowness in (1.0, 10.0)
        )
        lost = [100 * (fast[seed] - slow[seed]) for seed in fast]
        spread, cells = "", [f"{100 * fmean(side.values()):.1f} %" for side in (fast, slow)]
        if len(lost) > 1:
            spread, half = f" ± {stdev(lost):.1f}", half_width(lost)
        between = f"{fmean(lost) - half:.1f} to {fmean(lost) + half:.1f}" if spread else "-"
        lines.append(_row([arm, *cells, f"{fmean(lost):.1f}{spread}", between]))
    _say(
        "\n### Twin test: two classes that one store alone has, the same data at a fast store and at a slow one\n",
        *lines,
    )


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def _tell(*lines: str) -> None:
    print("\n".join(lines), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""The sceptic's experiment: is it as good as pooled, and at what price? Fashion-MNIST over ten stores.

python jobs/compare.py [--quick] [--seeds 5] [--splits dirichlet two-labels] [--arms ...] [--processes 2] [--json FILE]

Ten stores, 1 to 10 times slower than the fastest, on links of 20 Mbit down and 5 up; seconds and bytes are those of a
virtual clock (compare_clock.py), everything else is real. Each arm has the same number of trials of its learning rate,
on a seed of its own and on the validation split; then as many paired seeds as asked for, on the test split. Then the
twin test: two classes at one store alone, once at a fast one, once at one ten times slower: what is lost of their
recall? Prints Markdown. Not here: control variates, which raypipe does not have yet.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a clone or a job's working directory

from compare_arms import ARMS, FEDERATED, Result, Scale, Unit, rates, run, twins

from raypipe.tracking.compare import ratio

TUNING_SEED = 1000
QUICK = Scale(train=1500, judged=500, seconds=30.0, every_s=3.0)
PART_OF_POOLED = 0.95  # the target, unless another is asked for
HEADER = (
    "arm", "rate", "accuracy", "/ pooled (> 95 %)", "worst store", "worst late", "s to target", "MB to target",
    "MB up", "MB down", "versions", "steps", "images seen",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Tables on stdout, progress on stderr."""
    options = _parser().parse_args(arguments)
    scale = QUICK if options.quick else Scale()
    seeds = (
        list(range(1, (1 if options.quick else 5) + 1)) if options.seeds is None else list(range(1, options.seeds + 1))
    )
    began, kept, tuned = time.monotonic(), list[Result](), dict[str, dict[str, float]]()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, mp_context=context) as pool:
        for split in options.splits:
            best = tuned[split] = _tuned(pool, options.arms, split, scale, trials=1 if options.quick else 3)
            units = [Unit(arm, split, seed, best[arm], scale) for seed in seeds for arm in options.arms]
            found = list(_all(pool, units))
            kept += found
            _say(_title(split, scale, seeds), *_table(found, options.arms, options.target))
        arms = [arm for arm in options.arms if arm in FEDERATED]
        if arms and "two-labels" in tuned and not options.no_twins:  # its rates
            kept += _twin_test(pool, arms, tuned["two-labels"], scale, seeds)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in kept]) + "\n")
    print(f"{time.monotonic() - began:.0f} s on {options.processes} processes", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, one seed, one trial")
    parser.add_argument("--seeds", type=int, help="paired seeds; default 5, or 1 with --quick")
    parser.add_argument("--splits", nargs="+", choices=("dirichlet", "two-labels"), default=["dirichlet", "two-labels"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--target", type=float, help=f"accuracy; default {PART_OF_POOLED:g} of the pooled arm's")
    parser.add_argument("--no-twins", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="all results, with each look, into this file")
    return parser


def _all(pool: ProcessPoolExecutor, units: Sequence[Unit]) -> Iterator[Result]:
    for number, result in enumerate(pool.map(run, units), 1):
        unit = result.unit
        what = f"{unit.split}, seed {unit.seed}, {unit.arm} at {unit.rate:g}: {result.quality:.3f}"
        print(f"{number} of {len(units)}  {what}", file=sys.stderr, flush=True)
        yield result


def _tuned(
    pool: ProcessPoolExecutor, arms: Sequence[str], split: str, scale: Scale, *, trials: int
) -> dict[str, float]:
    """The best of each arm's rates; with one trial the middle one, untried."""
    if trials == 1:
        return {arm: rates(arm)[len(rates(arm)) // 2] for arm in arms}
    units = [Unit(arm, split, TUNING_SEED, rate, scale, "validation") for arm in arms for rate in rates(arm)]
    found = list(_all(pool, units))
    return {arm: max((r for r in found if r.unit.arm == arm), key=lambda r: r.quality).unit.rate for arm in arms}


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
    low = f" ({against[1]:.3f})" if against and len(results) > 1 else ""
    reached = [] if target is None else [look for r in results if (look := r.reached(target))]
    times = mean([look.at for look in reached], ".0f") if reached else "never"
    moved = mean([(look.up + look.down) / 1e6 for look in reached], ".1f") if reached else "-"
    some = f" ({len(reached)} of {len(results)})" if 0 < len(reached) < len(results) else ""
    last = [r.trace.looks[-1] for r in results]
    return [
        arm,
        f"{results[0].unit.rate:g}",
        f"{100 * fmean(r.quality for r in results):.1f} %{spread}",
        "-" if against is None else f"{against[0]:.3f}{low}",
        f"{100 * fmean(r.worst_store for r in results):.1f} %",
        f"{100 * min(r.worst_late for r in results):.1f} %",
        times + some,
        moved,
        mean([look.up / 1e6 for look in last], ".1f"),
        mean([look.down / 1e6 for look in last], ".1f"),
        *(mean([getattr(r.trace, name) for r in results], ",.0f") for name in ("versions", "steps", "images")),
    ]


def _twin_test(
    pool: ProcessPoolExecutor, arms: Sequence[str], best: dict[str, float], scale: Scale, seeds: Sequence[int]
) -> list[Result]:
    """What a store's classes lose when it is ten times slower."""
    units = [u for arm in arms for s in seeds for u in twins(Unit(arm, "twin", s, best[arm], scale))]
    found = list(_all(pool, units))
    head = ("arm", "recall, at a fast store", "10x slower", "points lost")
    lines = [_row(head), _row(["---"] * len(head))]
    for arm in arms:
        fast, slow = (
            {r.unit.seed: r.own_recall for r in found if r.unit.arm == arm and r.unit.twin_slowness == slowness}
            for slowness in (1.0, 10.0)
        )
        lost = [100 * (fast[seed] - slow[seed]) for seed in fast]
        spread = f" ± {stdev(lost):.1f}" if len(lost) > 1 else ""
        cells = [f"{100 * fmean(side.values()):.1f} %" for side in (fast, slow)]
        lines.append(_row([arm, *cells, f"{fmean(lost):.1f}{spread}"]))
    _say(
        "\n### Twin test: two classes that one store alone has, the same data at a fast store and at a slow one\n",
        *lines,
    )
    return found


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())

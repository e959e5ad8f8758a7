"""Console verbs about runs' records: compare, replay, backup, restore, forget. Thin; see cli.py."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from rich.console import Console

from raypipe.errors import RunError
from raypipe.placement.homes import raypipe_home, stores_home

SAY_S = 10.0  # between two lines of a long replay
Verb = Callable[[str, Callable[[argparse.Namespace, Console], int], str], argparse.ArgumentParser]


def add(verb: Verb) -> None:
    """The verbs of this file."""
    compared = verb("compare", _compare, "runs side by side: quality, time, bytes, work; also into MLflow")
    compared.add_argument("which", metavar="RUN", nargs="+", help="ids of runs, pooled ones too; or 'last'")
    replay = verb("replay", _replay, "make a run's versions again from its record, at the stores' data")
    replay.add_argument("which", metavar="RUN", help="a run's id, or 'last'")
    replay.add_argument("--verify", action="store_true", help="write nothing; stop at the first version that differs")
    replay.add_argument("--stores", type=Path, help="the stores' folders; default: where this machine has them")
    replay.add_argument("--out", type=Path, help="where the weights go; default: RUN-replayed, here")
    saved = verb("backup", _backup, "put a run into one file, also while it goes on; not what its stores keep")
    saved.add_argument("which", metavar="RUN", help="a run's id, or 'last'")
    saved.add_argument("target", metavar="FILE", type=Path, help="a new file, or a folder for RUN.tar")
    restored = verb("restore", _restore, "put a run back from a backup; then: raypipe train --resume RUN")
    restored.add_argument("file", metavar="FILE", type=Path)
    forgotten = verb("forget", _forget, "make a run's closed-form head again without a store; its sums are deleted")
    forgotten.add_argument("which", metavar="RUN", help="a run's id, or 'last'")
    forgotten.add_argument("stores", metavar="STORE", nargs="+")
    forgotten.add_argument("--out", type=Path, metavar="FILE", help="default: RUN-without-STORE.safetensors, here")


def _compare(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.compare import account_of, compare
    from raypipe.tracking.comparisons import log_comparison
    from raypipe.tracking.console import comparison_table, ratios_table
    from raypipe.tracking.lineage import read_history

    accounts = [account_of(read_history(run_folder(which))) for which in options.which]
    found = compare(accounts)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a file has no edge
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    console.print(comparison_table(found))
    say(
        f"({found.metric} on the {accounts[0].split} split, mean ± deviation over runs; worst of any store; "
        "time of the run; pooling: the training data once; seen: examples trained on)"
    )
    if (ratios := ratios_table(found)) is not None:
        console.print(ratios)
        say(
            "(/ pooled: mean ratio over pairs of equal seeds, and the lower end of its one-sided 95 % interval; worst "
            "store: the run's worst over the pooled run's worst; of loss and rmse pooled / own)"
        )
    for line in [*(f"note: {note}" for note in found.notes), f"MLflow: {log_comparison(found, accounts)}"]:
        say(line)
    return 0


def _backup(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.backup import backup
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.console import megabytes

    done = backup(run_folder(options.which), options.target)
    console.print(
        f"{done.run} up to version {done.version}: {done.path}, {megabytes(done.num_bytes)}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if done.left_out:
        line = f"not in it, as of all runs here: {', '.join(done.left_out)}; keep a copy where only you can read it"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _restore(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.backup import restore

    done = restore(options.file, raypipe_home())
    console.print(f"{done.run} is back, at version {done.version}: {done.path}", highlight=False, soft_wrap=True)
    console.print(f"next: raypipe train --resume {done.run}", highlight=False, soft_wrap=True)
    return 0


def _forget(options: argparse.Namespace, console: Console) -> int:
    from raypipe.prelude import forget
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.lineage import read_history

    folder = run_folder(options.which)
    out = options.out or Path(f"{folder.name}-without-{'-'.join(options.stores)}.safetensors")
    left, num_examples = forget(folder, options.stores, out)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{out}: the head of {num_examples:,} examples at {', '.join(left)}")
    if max(read_history(folder).versions, default=0) > 0:
        say("later versions of the run were trained with who is forgotten, and stay as they are; to train without:")
    say(f"raypipe train CONFIG --set warm_start={out} closed_form=null    # in CONFIG the stores that are left")
    return 0


def _replay(options: argparse.Namespace, console: Console) -> int:
    from raypipe.replay import Replay
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.lineage import model_card
    from raypipe.tracking.versions import VersionStore

    folder = run_folder(options.which)
    replay = Replay(folder, options.stores or stores_of(folder))
    if (other := replay.other_environment()) and not other.items() <= os.environ.items():
        return _replay_by(options, other, console)
    out = None if options.verify else VersionStore(options.out or Path(f"{replay.run}-replayed"))
    differ, said = list[str](), time.monotonic()
    for line in replay.strange():
        console.print(f"note: {line}; bits may differ", highlight=False, markup=False, soft_wrap=True)
    for done, made in enumerate(replay.versions(), 1):
        if out is not None:
            out.write(made.version, made.vector, replay.layout, model_card(replay.started, made.version, replay.task))
            out.keep(made.version)
        if not made.same:
            what = f"version {made.version} differs: made again it is {made.found}, by the record {made.recorded}"
            differ += [what, *made.hints, *replay.strange()] if not differ else []
        if differ and options.verify:
            raise RunError("\n".join(differ))
        if time.monotonic() > said + SAY_S:
            said = time.monotonic()
            console.print(f"version {made.version}, {done} of {replay.num_versions}", highlight=False)
    where = "" if out is None else f" in {out.folder}"
    if differ:
        raise RunError("\n".join([*differ, f"all {replay.num_versions} versions are{where}"]))
    line = f"{replay.run}: {replay.num_versions} versions made again{where}, each with the bytes that the record says"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _replay_by(options: argparse.Namespace, environment: Mapping[str, str], console: Console) -> int:
    """In a process of its own: torch looks at its environment once."""
    said = " ".join(f"{name}={value}" for name, value in environment.items())
    line = f"note: the run's processors had fewer instructions than this one, which goes without the others: {said}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    asked = [options.which, *(["--verify"] if options.verify else [])]
    for name, value in (("--stores", options.stores), ("--out", options.out)):
        asked += [name, str(value)] if value is not None else []
    command = [sys.executable, "-m", "raypipe", "replay", *asked]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def stores_of(folder: Path) -> Path:
    """Where this machine has a run's stores: those of a local run are made beside it."""
    from raypipe.tracking.lineage import read_history

    demo = raypipe_home() / "demo" / str(read_history(folder).run()["name"])
    return demo if demo.is_dir() and "RAYPIPE_STORES" not in os.environ else stores_home()

"""Console verbs about a run's versions: versions, promote, rollback, predict, track. Thin; see cli.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from raypipe.errors import ConfigError, RunError
from raypipe.record_verbs import Verb


def add(verb: Verb) -> None:
    """The verbs of this file."""
    versions = verb("versions", _versions, "list a run's versions")
    versions.add_argument("which", metavar="RUN", help="a run's id, or 'last'")
    versions.add_argument("--quick", action="store_true", help="do not check that kept weights are whole")
    promote = verb("promote", _promote, "register a version and give it an alias")
    promote.add_argument("which", metavar="RUN")
    promote.add_argument("version", type=_version, help="a number, or best")
    promote.add_argument("--as", dest="alias", default="champion")
    rollback = verb("rollback", _rollback, "give an alias back to the version that had it before")
    rollback.add_argument("model", metavar="MODEL", help="a registered model's name")
    rollback.add_argument("--as", dest="alias", default="champion")
    predict = verb("predict", _predict, "print a label for each image")
    predict.add_argument("model", metavar="MODEL", help="models:/NAME@champion, RUN, or RUN:VERSION")
    predict.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    track = verb("track", _track, "bring MLflow up to date with a run's record")
    track.add_argument("which", metavar="RUN")


def _versions(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.console import PLAIN_ROWS, show_stores, versions_table
    from raypipe.tracking.lineage import list_versions, metric_of, read_history

    folder = run_folder(options.which)
    console.print(folder.name, highlight=False)
    history = read_history(folder)
    rows = list_versions(folder, check=not options.quick)
    console.print(versions_table(rows, metric_of(history)))
    stores = history.final["table"] if history.final and not history.run().get("pooled") else []
    if len(stores) > PLAIN_ROWS:  # not all of them were in the table at the end
        show_stores(console, stores, metric_of(history))
    if damaged := [str(row.version) for row in rows if row.kept and not row.whole]:
        raise RunError(f"the weights of version {', '.join(damaged)} are damaged; the others can be used")
    return 0


def _promote(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.lineage import read_history
    from raypipe.tracking.registry import promote

    folder = run_folder(options.which)
    version = read_history(folder).best if options.version is None else options.version
    if version is None:
        raise ConfigError(f"{folder.name} has no best version yet: say which by its number")
    done = promote(folder, version, alias=options.alias)
    before = f" (before: version {done.previous})" if done.previous else ""
    line = f"{done.uri} is now version {done.number} of {done.name}{before}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _version(said: str) -> int | None:
    """A version's number; None: the best."""
    if said != "best" and not said.isdecimal():
        raise argparse.ArgumentTypeError(f"{said!r} is neither a version's number nor best")
    return None if said == "best" else int(said)


def _rollback(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.registry import rollback

    done = rollback(options.model, alias=options.alias)
    line = f"{done.uri} is version {done.number} again (it was {done.previous})"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _predict(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.registry import predict

    source, version = options.model, None
    if not source.startswith("models:/") and not Path(source).is_file():
        run, _, number = source.partition(":")
        if number and not number.isdigit():
            raise ConfigError(f"{source}: write RUN, RUN:VERSION with a number, models:/NAME@alias, or a file")
        source, version = str(run_folder(run)), int(number) if number else None
    for found in predict(source, options.images, version=version):
        line = f"{found.path}  {found.label}  {found.probability:.1%}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _track(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.follow import follow

    console.print(follow(run_folder(options.which), patience_s=30), highlight=False, markup=False, soft_wrap=True)
    return 0

"""Console verbs about a run's versions: versions, promote, rollback, predict, adapt, track. Thin; see cli.py."""

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
    promote.add_argument("version", metavar="VERSION", type=_version, help="a number, or best")
    promote.add_argument("--as", dest="alias", default="champion")
    rollback = verb("rollback", _rollback, "give an alias back to the version that had it before")
    rollback.add_argument("model", metavar="MODEL", help="a registered model's name")
    rollback.add_argument("--as", dest="alias", default="champion")
    model = "models:/NAME@champion, RUN, RUN:VERSION, or a .safetensors file"
    predict = verb("predict", _predict, "print a label for each image, or the boxes found in it, in its own pixels")
    predict.add_argument("model", metavar="MODEL", help=model)
    predict.add_argument("images", metavar="IMAGE", nargs="+", type=Path)
    predict.add_argument("--score", type=float, help="leave out boxes that are less probable; default: 0.25")
    own = "with BatchNorm's statistics of a data set's training images, STORE/data/NAME"
    predict.add_argument("--statistics-of", type=Path, metavar="FOLDER", help=own)
    adapt = verb("adapt", _adapt, "write a version with BatchNorm's statistics of one store's images into a file")
    adapt.add_argument("model", metavar="MODEL", help=model)
    adapt.add_argument("--statistics-of", type=Path, metavar="FOLDER", required=True, help="STORE/data/NAME")
    adapt.add_argument("--to", type=Path, metavar="FILE.safetensors", required=True, help="a new file")
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
    from raypipe.use import predict

    source, version = _model(options.model)
    own, score = options.statistics_of, options.score
    for found in predict(source, options.images, version=version, statistics_of=own, score=score):
        line = f"{found.path}  nothing found"
        if found.label is not None:
            line = f"{found.path}  {found.label}  {found.probability:.1%}"
        if found.box is not None:
            line += "  " + ",".join(f"{side:.0f}" for side in found.box)
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _adapt(options: argparse.Namespace, console: Console) -> int:
    from raypipe.use import adapt

    source, version = _model(options.model)
    adapt(source, options.statistics_of, options.to, version=version)
    line = f"{options.to}: {options.model} with BatchNorm's statistics of {options.statistics_of}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _model(said: str) -> tuple[str, int | None]:
    """MODEL as a source of weights, and the version where a run is named with one."""
    from raypipe.tracking.book import run_folder

    if said.startswith("models:/") or Path(said).is_file() or ("/" in said and Path(said).is_dir()):
        return said, None
    if "/" in said or said.endswith(".safetensors"):
        raise ConfigError(f"{said}: no such file")
    run, _, number = said.partition(":")
    if number and not number.isdigit():
        raise ConfigError(f"{said}: write RUN, RUN:VERSION with a number, models:/NAME@alias, or a file")
    return str(run_folder(run)), int(number) if number else None


def _track(options: argparse.Namespace, console: Console) -> int:
    from raypipe.tracking.book import run_folder
    from raypipe.tracking.follow import follow

    console.print(follow(run_folder(options.which), patience_s=30), highlight=False, markup=False, soft_wrap=True)
    return 0

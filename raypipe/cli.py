"""The console command `raypipe`: thin verbs over the rooms. Errors are one line each; exit code 2 for bad input."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # before anything imports Ray

from rich.console import Console

from raypipe import class_verbs, data_verbs, record_verbs
from raypipe.config.shipped import DEFAULT
from raypipe.errors import ConfigError, RaypipeError, RunError
from raypipe.ledger import commands as ledger


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; the exit code."""
    options = _parser().parse_args(arguments)
    console = Console()
    _warn_in_one_line()
    try:
        return int(options.run(options, console) or 0)
    except RaypipeError as error:
        for line in error.message.splitlines():
            print(f"raypipe: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("raypipe: stopped", file=sys.stderr)
        return 130


def _warn_in_one_line() -> None:
    """What raypipe warns of goes where its errors go, and looks like them; other libraries' warnings do not."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("raypipe: %(message)s"))
    log = logging.getLogger("raypipe")
    log.handlers, log.propagate = [handler], False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="raypipe", description=__doc__, allow_abbrev=False)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace, Console], int], help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    def configured(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", nargs="?", type=Path, help="default: raypipe's own configs/quickstart.yaml")
        sub.add_argument("--config", dest="config_option", type=Path, help=argparse.SUPPRESS)
        sub.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="train.lr=0.1 ...")

    train = verb("train", _train, "train one model across the stores of a configuration")
    configured(train)
    train.add_argument("--resume", metavar="RUN", help="take up a run that died, by its id or 'last'")
    train.add_argument("--new", action="store_true", help="on a cluster: a new run, though one like it was not ended")
    train.add_argument("--accept-changes", action="store_true", help="with --resume CONFIG: what may change, changes")
    train.add_argument("--address", help="a running Ray cluster, e.g. 10.0.0.1:6379; default: RAY_ADDRESS, else here")
    resume = verb("resume", _resume, "take up every run of this cluster's head that died; see cluster/head-node")
    resume.add_argument("--address", help="the Ray cluster; default: RAY_ADDRESS, else the one on this machine")
    for sub in (train, resume):
        sub.add_argument("--insecure", action="store_true", help="on a cluster that lets strangers run code, too")
    check = verb("check", _check, "say what would run where and what it would move; start nothing")
    configured(check)
    data_verbs.add(verb, configured)
    bring = verb("import", _import, "at a store: bring images and their labels into a data set; again: what is new")
    bring.add_argument("kind", metavar="KIND", help="folders, yolo, coco, voc or csv")
    bring.add_argument("folder", metavar="FOLDER", type=Path, help="where they lie")
    bring.add_argument(
        "--to", required=True, type=Path, metavar="DATA_SET", help="the data set's folder, e.g. data/products"
    )
    bring.add_argument("--annotations", type=Path, metavar="FILE", help="of coco and csv, where there are several")
    bring.add_argument("--classes", metavar="NAME,NAME", help="these alone, in this order; default: all that are found")
    bring.add_argument(
        "--held-out", default="0.1,0.1", metavar="VALIDATION,TEST", help="shares, where no split is said"
    )
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
    from raypipe.vault.commands import add_parsers as add_vault

    add_vault(verbs)
    track = verb("track", _track, "bring MLflow up to date with a run's record")
    track.add_argument("which", metavar="RUN")
    from raypipe.doctor import commands as doctored
    from raypipe.placement import commands as placed
    from raypipe.security import commands as secured

    placed.add_parsers(verbs)
    doctored.add_parsers(verbs)
    secured.add_parsers(verbs)
    record_verbs.add(verb)
    class_verbs.add(verb)
    for name, help in (
        ("join", "take a store into a run that is going on"),
        ("leave", "let a store go; what it has contributed stays"),
        ("stop", "end a run that is going on; what was published is kept"),
    ):
        sub = verb(name, _ask, help)
        sub.set_defaults(verb=name)
        sub.add_argument("which", metavar="RUN")
        sub.add_argument("--address", help="the Ray cluster; default: RAY_ADDRESS, else the one on this machine")
        if name != "stop":
            sub.add_argument("store", metavar="STORE")
        if name == "join":
            sub.add_argument("--cpus", type=float, default=1.0)
            sub.add_argument("--gpus", type=float, default=0.0)
    ledger.add_parsers(verbs)
    return parser


def _train(options: argparse.Namespace, console: Console) -> int:
    from raypipe.comeback import left_of
    from raypipe.launch import federate
    from raypipe.run import load_resumed, load_run
    from raypipe.tracking.console import Screen, show_summary

    path, run = options.config_option or options.config, None
    if options.resume:
        run, config = load_resumed(options.resume, path, options.set, accept=options.accept_changes)
    else:
        config = load_run(path or DEFAULT, options.set)
        if (options.address or os.environ.get("RAY_ADDRESS")) and not options.new:
            run = left_of(config)
    title = f"{config.name}: {len(config.stores)} stores, {config.model['name']}, {config.pace}"
    with Screen(console, title, config.stop.max_seconds, config.stop.max_versions) as screen:
        screen.say(title)
        if run and not options.resume:
            screen.say(f"goes on with run {run}, which was not ended; --new begins another")
        summary = federate(config, options.address, screen, run, insecure=options.insecure)
    show_summary(console, summary, f"raypipe promote {summary['run']} {summary['best_version']} --as champion")
    return 1 if summary["status"] == "failed" else 0


def _resume(options: argparse.Namespace, console: Console) -> int:
    from raypipe.launch import take_up

    address = options.address or os.environ.get("RAY_ADDRESS") or "auto"
    take_up(address, lambda line: print(f"raypipe: {line}", flush=True), insecure=options.insecure)
    return 0


def _ask(options: argparse.Namespace, console: Console) -> int:
    from raypipe.launch import ask
    from raypipe.tracking.book import run_folder

    run = run_folder("last").name if options.which == "last" else options.which
    what: tuple[object, ...] = ("stopped by hand",)
    if options.verb == "leave":
        what = (options.store,)
    elif options.verb == "join":
        what = ({"id": options.store, "cpus": options.cpus, "gpus": options.gpus},)
    ask(run, options.address, options.verb, *what)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    from raypipe.run import check, load_run

    config = load_run(options.config_option or options.config or DEFAULT, options.set)
    console.print(check(config), highlight=False, markup=False, soft_wrap=True)
    return 0


def _import(options: argparse.Namespace, console: Console) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from raypipe.data.importers.ingest import held_out, ingest
    from raypipe.data.importers.sources import open_source

    shares, source = held_out(options.held_out), open_source(options.kind, options.folder, options.annotations)
    classes = [name.strip() for name in options.classes.split(",") if name.strip()] if options.classes else None
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        total = len(source)
        bar = progress.add_task("images", total=total)
        report = ingest(
            *(options.folder, source, options.to),
            classes=classes,
            shares=shares,
            see=lambda done: progress.update(bar, completed=min(done, total)),  # labels without image are seen too
        )
    for line in report.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


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

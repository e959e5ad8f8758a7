"""Console verbs about runs: train, resume, check; and of one that is going on: join, leave, stop. Thin; see cli.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import ExitStack

from rich.console import Console

from raypipe.config.shipped import DEFAULT
from raypipe.importing import without_collecting
from raypipe.record_verbs import Verb


def add(verb: Verb, configured: Callable[[argparse.ArgumentParser], None]) -> None:
    """What begins a run, or says what it would be; `configured` gives a verb a configuration and --set."""
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


def add_asking(verb: Verb) -> None:
    """What is asked of a run that is going on."""
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


def _train(options: argparse.Namespace, console: Console) -> int:
    with without_collecting():
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
    with ExitStack() as ends:
        with Screen(console, title, config.stop.max_seconds, config.stop.max_versions) as screen:
            screen.say(title)
            if run and not options.resume:
                screen.say(f"goes on with run {run}, which was not ended; --new begins another")
            summary = federate(config, options.address, screen, ends, run, insecure=options.insecure)
        show_summary(console, summary, f"raypipe promote {summary['run']} {summary['best_version']} --as champion")
    return 1 if summary["status"] == "failed" else 0


def _resume(options: argparse.Namespace, console: Console) -> int:
    from raypipe.launch import take_up

    address = options.address or os.environ.get("RAY_ADDRESS") or "auto"
    take_up(address, lambda line: print(f"raypipe: {line}", flush=True), insecure=options.insecure)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    from raypipe.run import check, load_run

    config = load_run(options.config_option or options.config or DEFAULT, options.set)
    console.print(check(config), highlight=False, markup=False, soft_wrap=True)
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

"""The console verb `raypipe classes`: a run's class list, and changes to it while the run goes on. Thin; see cli.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from raypipe.errors import ConfigError
from raypipe.record_verbs import Verb
from raypipe.tasks.class_list import Change, ClassList


def add(verb: Verb) -> None:
    """The verb of this file."""
    classes = verb("classes", _classes, "a run's class list; with options: change it while the run goes on")
    classes.add_argument("which", metavar="RUN", help="a run's id, or 'last'")
    classes.add_argument("--add", nargs="+", default=[], metavar="NAME", help="the head grows by these")
    classes.add_argument("--merge", nargs="+", default=[], metavar="OLD=NEW", help="OLD's images count as NEW's")
    classes.add_argument("--retire", nargs="+", default=[], metavar="NAME", help="its images are left out")
    classes.add_argument("--at-version", type=int, metavar="N", help="the first with the new list; default: the next")
    classes.add_argument("--address", help="the Ray cluster; default: RAY_ADDRESS, else the one on this machine")


def change_of(add: Sequence[str], merge: Sequence[str], retire: Sequence[str]) -> Change:
    """As it is said on the command line. Raises ConfigError."""
    pairs = [tuple(part.strip() for part in said.split("=", 1)) for said in merge]
    if wrong := [said for said, pair in zip(merge, pairs, strict=True) if len(pair) != 2 or not all(pair)]:
        raise ConfigError(f"--merge {wrong[0]}: write OLD=NEW")
    return Change(tuple(add), tuple((old, new) for old, new in pairs), tuple(retire))


def _classes(options: argparse.Namespace, console: Console) -> int:
    change = change_of(options.add, options.merge, options.retire)
    if change != Change():
        from raypipe.launch import ask

        version = ask(options.which, options.address, "classes", asdict(change), options.at_version)
        console.print(f"from version {version} on: {change.line}", highlight=False, markup=False, soft_wrap=True)
        return 0
    if options.at_version is not None:
        raise ConfigError("--at-version: say what changes then: --add, --merge or --retire")
    from raypipe.tracking.book import run_folder

    for line in listing(run_folder(options.which)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def listing(folder: Path) -> list[str]:
    """A line a class: its number, its name, since which version, and what became of it."""
    from raypipe.tracking.lineage import read_history

    history = read_history(folder)
    newest = max(history.versions, default=0)
    changed = [v for v, body in sorted(history.versions.items()) if v == 0 or body.get("classes")]
    lists = [(v, ClassList.of(history.task(v))) for v in changed]
    lists = lists or [(0, ClassList.of(history.run()["config"]["task"]))]
    last = lists[-1][1]
    lines = [f"{folder.name}, version {newest}: {len(last.live)} classes"]
    for place, name in enumerate(last.names):
        since = next(version for version, one in lists if name in one.names)
        state = last.state(name)
        until = next((v for v, one in lists if one.state(name) == state), 0) if state else 0
        said = f", since version {since}" if since else ""
        lines.append(f"{place:5}  {name}{said}{f'; {state} since version {until}' if state else ''}")
    return lines

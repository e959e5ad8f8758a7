"""`raypipe doctor`: one screen about a cluster, and an exit code. `raypipe down`: ends what dead runs left on it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from raypipe.doctor.findings import Finding, Seen

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_parsers(subparsers: Parsers) -> None:
    """The verbs `doctor` and `down`; handlers raise RaypipeError and return an exit code."""
    help = "look a cluster over: versions, clocks, GPUs, data, links, doors; exit code 1 if something is wrong"
    doctor = subparsers.add_parser("doctor", help=help, description=help, allow_abbrev=False)
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument("config", nargs="?", type=Path, help="its stores are looked for, too")
    doctor.add_argument("--json", action="store_true", help="all that was seen, for machines")
    doctor.add_argument("--megabytes", type=float, default=8, help="sent each way to each node; default: 8")
    help = "end the store actors that dead runs left on a cluster, or a whole run"
    down = subparsers.add_parser("down", help=help, description=help, allow_abbrev=False)
    down.set_defaults(run=run_down)
    down.add_argument("which", nargs="?", metavar="RUN", help="this run, alive or not; default: those that are dead")
    for sub in (doctor, down):
        sub.add_argument("--address", help="the Ray cluster; default: RAY_ADDRESS, else the one on this machine")


def run_doctor(options: argparse.Namespace, console: Console) -> int:
    """The table, a line for each finding, the verdict."""
    address = _address(options)
    from raypipe.config.load import load
    from raypipe.doctor.actor import see_all
    from raypipe.doctor.findings import findings
    from raypipe.placement import actor as cluster
    from raypipe.placement.book import troubles

    wanted = [store.id for store in load(options.config, (), lambda _: []).stores] if options.config else []
    cluster.connect(address)
    try:
        here = cluster.address()
        seen = see_all(num_bytes=max(1, int(options.megabytes * 2**20)))
    finally:
        cluster.shut_down()
    found = findings(seen, wanted, loopback=here.startswith("127."), troubles=troubles())
    found += _mlflow(os.environ.get("MLFLOW_TRACKING_URI"))
    wrong = [one for one in found if one.level == "WRONG"]
    if options.json:
        said = {"nodes": [dataclasses.asdict(one) for one in seen], "findings": [dataclasses.asdict(f) for f in found]}
        print(json.dumps(said, indent=1))
    else:
        console.print(screen(seen))
        for one in found:
            console.print(f"{one.level}: {one.who}: {one.line}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"{len(seen)} nodes, {len(wrong)} things wrong" if wrong else f"{len(seen)} nodes, all well")
    return 1 if wrong else 0


def run_down(options: argparse.Namespace, console: Console) -> int:
    """A line an actor."""
    address = _address(options)
    from raypipe.placement import actor as cluster

    cluster.connect(address)
    try:
        ended = cluster.end_left(options.which)
    finally:
        cluster.shut_down()
    for name in ended:
        console.print(f"ended: {name}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(ended)} actors ended" if ended else "nothing was left")
    return 0


def screen(seen: Sequence[Seen]) -> Table:
    """A row a node."""
    head = next((one.facts for one in seen if one.is_head and one.facts), None)
    about = ", ".join(f"{name} {version}" for name, version in head.versions.items()) if head else "no head"
    code = f"raypipe {head.code[:8]}, " if head else ""
    caption = f"{code}{about}\nGPU: offered/seen; MB/s: to the node/from it; data: images, hash"
    table = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    columns = ("node", "store", "GPU", "disk", "clock", "ping", "MB/s", "data")
    for name in columns:
        table.add_column(name, no_wrap=name not in ("store", "data"), overflow="fold")
    for one in sorted(seen, key=lambda one: (not one.is_head, one.stores, one.address)):
        stores = ", ".join(one.stores) or ("head" if one.is_head else "-")
        if one.facts is None:
            table.add_row(one.address, stores, "no answer")
            continue
        facts = one.facts
        behind = dict(facts.vaults)
        sets = [(f"{d.name} {sum(d.counts.values()):,} {d.digest[:8]}", d.store in behind) for d in facts.data]
        data = "; ".join(f"{said} (vault)" if hidden else said for said, hidden in sets) or "-"
        table.add_row(
            one.address,
            stores,
            f"{one.offered.get('GPU', 0):g}/{len(facts.gpus)}",
            f"{facts.free_bytes / 2**30:.0f} GiB",
            f"{one.skew_s:+.1f} s",
            f"{one.ping_ms:.0f} ms",
            f"{one.down_mbs:.3g}/{one.up_mbs:.3g}",
            data,
        )
    return table


def _mlflow(uri: str | None) -> list[Finding]:
    """Whether its server answers; without one there is nothing to reach."""
    from raypipe.doctor.findings import Finding

    if not uri or not uri.startswith("http"):
        return [Finding("note", "MLflow", f"no server is set (MLFLOW_TRACKING_URI); runs go to {uri or 'a file here'}")]
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            status = answer.status
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError) as error:
        return [Finding("WRONG", "MLflow", f"{uri} does not answer: {getattr(error, 'reason', error)}")]
    return [] if status == 200 else [Finding("WRONG", "MLflow", f"{uri}/health answers HTTP {status}")]


def _address(options: argparse.Namespace) -> str:
    """Where to look; called before Ray is imported."""
    from raypipe.security.own import show_local_token

    address = options.address or os.environ.get("RAY_ADDRESS")
    if not address:
        show_local_token(make=False)
    return address or "auto"

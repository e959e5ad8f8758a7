"""`stores.csv`: which store trains on which machine. Every mistake is said at once, a line each.

    id,host,gpus,region,hours
    harbour,10.1.0.7,1,north,22:00-06:00 Europe/Berlin

`hours`: when the machine may train, HH:MM-HH:MM and a time zone (default UTC); empty: always. Optional columns: `cpus`
(default 2), `wake`, a command that the head runs to wake the machine before ssh (`wakeonlan 3c:ec:ef:00:00:07`).
"""

from __future__ import annotations

import csv
import datetime
import re
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raypipe.config.schema import NAME, repeated
from raypipe.errors import ConfigError, did_you_mean

REQUIRED = ("id", "host", "gpus", "region", "hours")
OPTIONAL = ("cpus", "wake")
# No leading '-': a host is an argument of ssh, and must never become one of its options.
HOST = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$|^[0-9A-Fa-f:]{2,39}$")
LABEL = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
HOURS = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)(?: ([A-Za-z0-9_+/-]+))?$")
HEAD = "head"  # the node type that is no store
MOST = 1024  # GPUs or CPUs of one machine


@dataclass(frozen=True, slots=True)
class Machine:
    """One store's own machine, as its row says."""

    store: str
    host: str
    gpus: int = 0
    region: str = ""
    hours: str = ""
    cpus: int = 2
    wake: str = ""


def read_machines(path: Path, head: str | None = None) -> list[Machine]:
    """The rows of a file; `head` is a host that no store may be on. Raises ConfigError, a line for each mistake."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} is not a CSV file in UTF-8: {error}") from None
    columns = [name.strip() for name in rows[0]] if rows else []
    problems = list(_column_problems(columns))
    machines, lines = [], []
    for number, row in enumerate(rows[1:], start=2) if not problems else ():
        if not any(field.strip() for field in row):
            continue
        found = _row(columns, [field.strip() for field in row])
        if isinstance(found, Machine):
            machines.append(found)
            lines.append(number)
        else:
            problems += [f"line {number}: {one}" for one in found]
    if not problems:
        problems += _crowded(machines, lines, head) if machines else ["no store in it; its first row names the columns"]
    if problems:
        raise ConfigError([f"{path}: {one}" for one in problems])
    return machines


def open_at(hours: str, at: float) -> bool:
    """Whether a machine may train at this time (Unix seconds). A range past midnight is written 22:00-06:00."""
    found = HOURS.match(hours)
    if not found:
        return True
    zone = zoneinfo.ZoneInfo(found[5] or "UTC")
    now = datetime.datetime.fromtimestamp(at, zone)
    minute = 60 * now.hour + now.minute
    begin, end = 60 * int(found[1]) + int(found[2]), 60 * int(found[3]) + int(found[4])
    return begin <= minute < end if begin < end else minute >= begin or minute < end


def _column_problems(columns: list[str]) -> Iterator[str]:
    unknown = [name for name in columns if name not in (*REQUIRED, *OPTIONAL)]
    for name in unknown:
        yield f"no column {name!r} is known.{did_you_mean(name, (*REQUIRED, *OPTIONAL))}"
    if twice := repeated(columns):
        yield f"column {twice[0]} is there twice"
    lacking = [name for name in REQUIRED if name not in columns]
    if lacking and not unknown:
        yield f"column {lacking[0]} is missing; the first row is: {','.join(REQUIRED)}"


def _row(columns: list[str], fields: list[str]) -> Machine | list[str]:
    if len(fields) != len(columns):
        return [f"{len(fields)} fields where the first row has {len(columns)}"]
    said = dict(zip(columns, fields, strict=True))
    problems = []
    if not NAME.match(said["id"]):
        problems.append(f"id {said['id']!r}: letters, digits, '.', '_' and '-', at most 63, no spaces")
    if said["id"].lower() == HEAD:
        problems.append(f"id {said['id']!r} is the head's name; call the store something else")
    if not HOST.match(said["host"]):
        problems.append(f"host {said['host']!r} is neither a host name nor an address; a user is set in `auth:`")
    if said["region"] and not LABEL.match(said["region"]):
        problems.append(f"region {said['region']!r}: letters, digits, '.', '_' and '-', at most 63, no spaces")
    if said["hours"] and (wrong := _wrong_hours(said["hours"])):
        problems.append(wrong)
    for name in ("gpus", "cpus"):
        text = said.get(name, "")
        if text and not (text.isascii() and text.isdigit() and int(text) <= MOST):
            problems.append(f"{name} {text!r}: a whole number from 0 to {MOST}")
    if not problems and said.get("cpus") == "0":
        problems.append("cpus '0': training needs one at least")
    if problems:
        return problems
    numbers = int(said["gpus"] or 0), int(said.get("cpus") or 2)
    return Machine(
        said["id"], said["host"], numbers[0], said["region"], said["hours"], numbers[1], said.get("wake", "")
    )


def _wrong_hours(hours: str) -> str | None:
    found = HOURS.match(hours)
    if not found:
        return f"hours {hours!r}: HH:MM-HH:MM and a time zone, as in 22:00-06:00 Europe/Berlin"
    try:
        zoneinfo.ZoneInfo(found[5] or "UTC")
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return f"hours {hours!r}: no time zone {found[5]!r}; names are like Europe/Berlin"
    begin, end, *_ = hours.replace("-", " ").split()
    return None if begin != end else f"hours {hours!r} is no time at all; empty means always"


def _crowded(machines: list[Machine], lines: list[int], head: str | None) -> list[str]:
    """Ids and hosts that are there twice, case aside: a host's name has none, and Kubernetes takes none."""
    problems: list[str] = []
    ids: dict[str, int] = {}
    hosts = {head.lower(): "the head"} if head else {}
    for machine, line in zip(machines, lines, strict=True):
        if (first := ids.setdefault(machine.store.lower(), line)) != line:
            problems.append(f"line {line}: store {machine.store} is there already, in line {first}")
        elif (there := hosts.setdefault(machine.host.lower(), machine.store)) != machine.store:
            problems.append(f"line {line}: store {machine.store} is on host {machine.host}, which is {there}'s already")
    return problems

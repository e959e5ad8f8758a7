"""When a store may train: `22:00-06:00`, `22:00-06:00 Europe/Berlin`, or a list of such; none: always.

Without a time zone they are of the store's own local time. A range past midnight belongs to the day it begins on. On
the day when clocks are set forward or back a range is as its wall clock says.
"""

from __future__ import annotations

import re
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

RANGE = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)(?: ([A-Za-z0-9_+/-]+))?$")


@dataclass(frozen=True, slots=True)
class Range:
    """Minutes of the day, `begin` in it, `end` not; `zone` None: local time."""

    begin: int
    end: int
    zone: str | None = None


def parse(text: str) -> Range:
    """Raises ValueError in a few words."""
    found = RANGE.match(text)
    if not found:
        raise ValueError(f"hours {text!r}: HH:MM-HH:MM, and a time zone if it is not the store's own")
    try:
        zone = None if found[5] is None else zoneinfo.ZoneInfo(found[5]).key
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"hours {text!r}: no time zone {found[5]!r}; names are like Europe/Berlin") from None
    begin, end = (60 * int(found[at]) + int(found[at + 1]) for at in (1, 3))
    if begin == end:
        raise ValueError(f"hours {text!r} are no time at all; none means always")
    return Range(begin, end, zone)


def opens(hours: Sequence[Range], now: datetime) -> datetime | None:
    """When they next begin, in the zone of the range that does; None: they go on now.

    `now` is naive, in the store's local time, or aware; the answer is like it for ranges without a zone.
    """
    if not hours or closes(hours, now) is not None:
        return None
    return min((_next(each.begin, _local(each, now)) for each in hours), key=datetime.timestamp)


def closes(hours: Sequence[Range], now: datetime) -> datetime | None:
    """When the last of those that go on now ends; None: it is closed, or there are none."""
    going = [each for each in hours if _goes_on(each, _local(each, now))]
    return max((_next(each.end, _local(each, now)) for each in going), key=datetime.timestamp, default=None)


def _local(one: Range, now: datetime) -> datetime:
    return now if one.zone is None else datetime.fromtimestamp(now.timestamp(), zoneinfo.ZoneInfo(one.zone))


def _goes_on(one: Range, now: datetime) -> bool:
    minute = 60 * now.hour + now.minute
    return one.begin <= minute < one.end if one.begin < one.end else minute >= one.begin or minute < one.end


def _next(minute: int, now: datetime) -> datetime:
    """The next time that the wall clock says so."""
    today = now.replace(hour=minute // 60, minute=minute % 60, second=0, microsecond=0, fold=0)
    return today if today.timestamp() > now.timestamp() else today + timedelta(days=1)

"""A run's class list as a versioned mapping: what a model's outputs mean, and from which version on.

A class's place in the list is its number, for ever: names are only appended, never moved or removed. So the head of a
model only grows, an update of an older version says of the newer classes nothing and of the others what it meant, and
number 7 is the same class in each version's metrics.

    add      the name is appended, or comes back where it was retired
    merge    images of the one count as the other from then on; its place stays, and is no answer any more
    retire   the same, and its images are left out

A change holds from a version on: that version is the first with the new list. Everything that depends on the list
(the plan of a ticket, a version's card, metrics) takes the task's part of that version: its settings `classes`, all
names ever, and `gone`, what became of those that are no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from raypipe.errors import ConfigError, did_you_mean

Part: TypeAlias = Mapping[str, Any]

CHANGING = ("classification", "detection")  # tasks whose class list may change
UNKNOWN, DROPPED = -1, -2  # places of names that are not in the list, and of classes that were retired


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a class list; `merge` holds (old, new)."""

    add: tuple[str, ...] = ()
    merge: tuple[tuple[str, str], ...] = ()
    retire: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """For people."""
        said = [f"{name} is new" for name in self.add] + [f"{old} counts as {new}" for old, new in self.merge]
        return "; ".join(said + [f"{name} is retired" for name in self.retire])


@dataclass(frozen=True)
class ClassList:
    """All names ever, by their numbers; `gone`: those that are no more, and as what they count (None: left out)."""

    names: tuple[str, ...]
    gone: Mapping[str, str | None] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # by `task.merge`: what else stores may call a class

    @classmethod
    def of(cls, task: Part) -> ClassList:
        """The list of a task's part. Raises ConfigError where there is none that could change."""
        names = task.get("classes")
        if task.get("name") not in CHANGING:
            raise ConfigError(
                f"the classes of task {task.get('name')} do not change; those of {' and '.join(CHANGING)} do"
            )
        if not isinstance(names, list | tuple):
            raise ConfigError("task.classes: classes that change have names; write them as a list")
        aliases = {other: name for name, others in task.get("merge", {}).items() for other in others}
        return cls(tuple(names), dict(task.get("gone", {})), aliases)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """By name; a list of ten thousands is looked up in as often."""
        return {name: place for place, name in enumerate(self.names)}

    @property
    def live(self) -> tuple[int, ...]:
        """Numbers of the classes that there are."""
        return tuple(place for place, name in enumerate(self.names) if name not in self.gone)

    def task(self, part: Part) -> dict[str, Any]:
        """The task's part with this list."""
        return {**part, "classes": list(self.names), "gone": dict(self.gone)}

    def place(self, name: str) -> int:
        """The number that images of this name count for; UNKNOWN or DROPPED where they count for none."""
        seen = name
        while seen in self.gone:
            counts_as = self.gone[seen]
            if counts_as is None:
                return DROPPED
            seen = counts_as
        return self.numbers.get(seen, UNKNOWN)

    def state(self, name: str) -> str:
        """For people: "" for a class that there is."""
        if name not in self.gone:
            return ""
        counts = self.gone[name]
        return "retired" if counts is None else f"counts as {counts}"

    def circular(self) -> list[str]:
        """Names that would count as themselves."""
        found = []
        for name in self.gone:
            seen, steps = self.gone[name], 0
            while seen is not None and seen != name and steps <= len(self.gone):
                seen, steps = self.gone.get(seen), steps + 1
            found += [name] if seen == name else []
        return found

    def changed(self, change: Change, where: str = "") -> ClassList:
        """The list after a change. Raises ConfigError with all that is wrong with it, a line each."""
        if problems := [f"{where}{problem}" for problem in self._problems(change)]:
            raise ConfigError(problems)
        gone = {name: as_ for name, as_ in self.gone.items() if name not in change.add}
        gone |= {**dict(change.merge), **dict.fromkeys(change.retire)}
        names = (*self.names, *(name for name in change.add if name not in self.names))
        return ClassList(names, gone, self.aliases)

    def begins(self, change: Change) -> tuple[tuple[int, ...], ...]:
        """For each name that a change appends the numbers of the classes that it is made of; () for one all new."""
        new = [name for name in change.add if name not in self.names]
        return tuple(tuple(self.names.index(old) for old, into in change.merge if into == name) for name in new)

    def _problems(self, change: Change) -> list[str]:
        if not (change.add or change.merge or change.retire):
            return ["a change adds, merges or retires something"]
        live = [self.names[place] for place in self.live]
        merged = [old for old, _ in change.merge]
        problems = [f"add: {name!r} is no name" for name in change.add if not name.strip()]
        problems += [f"add: {name!r} is a class already" for name in change.add if name in live]
        problems += [
            f"add: {name!r} counts as {self.aliases[name]!r} by task.merge; take another name"
            for name in change.add
            if name in self.aliases
        ]
        problems += [
            f"add: {name!r} counts as {self.gone[name]!r} since it was merged; take another name"
            for name in change.add
            if self.gone.get(name) is not None
        ]
        problems += [
            f"{verb}: no class named {name!r}.{did_you_mean(name, live)}"
            for verb, names in (("merge", merged), ("retire", change.retire))
            for name in names
            if name not in live
        ]
        problems += self._merge_problems(change, live)
        problems += [f"{name!r} is named twice" for name in twice([*change.add, *merged, *change.retire])]
        left = len(live) + len(change.add) - len(merged) - len(change.retire)
        return problems or ([] if left >= 2 else [f"{left} classes would be left; at least 2 stay"])

    def _merge_problems(self, change: Change, live: list[str]) -> Iterable[str]:
        into = dict(change.merge)
        for old, new in change.merge:
            path = [old]
            while path[-1] in into and path[-1] not in path[:-1]:
                path.append(into[path[-1]])
            if path[-1] in path[:-1]:
                if old == min(path[path.index(path[-1]) :]):  # of each circle once
                    yield f"merge: goes in a circle: {' -> '.join(path)}"
            elif new in into:
                yield f"merge: {new!r} is merged too: say {old}={path[-1]}"
            elif new in change.retire or new not in (*live, *change.add):
                what = "is retired by the same change" if new in change.retire else "is no class"
                yield f"merge: {old!r} cannot count as {new!r}, which {what}.{did_you_mean(new, live)}"


def twice(names: Iterable[str]) -> list[str]:
    """Each that is there more than once."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def lists(first: ClassList, changes: Mapping[int, Change]) -> dict[int, ClassList]:
    """The list that holds from each version with a change on. Raises ConfigError for a change that cannot be."""
    found, newest = {}, first
    for version, change in sorted(changes.items()):
        newest = found[version] = newest.changed(change, f"classes from version {version} on: ")
    return found


def placed(
    first: ClassList | None, changes: Mapping[int, Change], change: Change, *, soonest: int, wanted: int | None = None
) -> int:
    """The version from which on a new change holds, beside those that are planned: the wanted one, or the soonest.

    Raises ConfigError: it cannot be, or is too late.
    """
    if first is None:
        raise ConfigError("the classes of this run cannot change: its task has no list of names")
    if wanted is not None and wanted < soonest:
        raise ConfigError(f"version {wanted} is made already or being made; the first that can change is {soonest}")
    if wanted in changes:
        raise ConfigError(f"the classes change at version {wanted} already; take another one")
    version = soonest if wanted is None else wanted
    while version in changes:
        version += 1
    lists(first, {**changes, version: change})
    return version

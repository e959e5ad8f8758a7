"""One registry a room: parts by name, their keyword-only arguments are their configuration.

A part is a function. Positional parameters are context that the code passes (a number of classes, a layout);
keyword-only parameters are what may be said in YAML, checked from their annotations by pydantic. A user's own
part comes in by package entry point in the group `raypipe.<kind>`; no dotted path is ever read from YAML.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Generic, TypeAlias, TypeVar, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from raypipe.errors import ConfigError, did_you_mean

Spec: TypeAlias = Mapping[str, Any]  # {"name": ..., keyword: value, ...}, as written in YAML
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Parts of one kind. `modules` are imported at the first look-up, so that naming a part costs no torch."""

    def __init__(self, kind: str, *, modules: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self._modules = modules
        self._parts: dict[str, Callable[..., T]] = {}

    def __call__(self, name: str) -> Callable[[F], F]:
        """Decorator: `@rule("mean")`."""

        def register(part: F) -> F:
            if name in self._parts and self._parts[name] is not part:
                raise ConfigError(f"two {self.kind}s are named {name!r}")
            self._parts[name] = part
            return part

        return register

    def names(self) -> list[str]:
        """Every name that may stand in YAML, entry points included."""
        self._load()
        return sorted({*self._parts, *_entry_points(self.kind)})

    def get(self, name: str) -> Callable[..., T]:
        """The part's factory. Raises ConfigError with the nearest name."""
        self._load()
        if name not in self._parts:
            found = _entry_points(self.kind).get(name)
            if found is None:
                raise ConfigError(f"no {self.kind} named {name!r}.{did_you_mean(name, self.names())}")
            self._parts[name] = found.load()
        return self._parts[name]

    def problems(self, spec: Spec, where: str) -> list[str]:
        """What is wrong with a part's configuration, a line each; empty when nothing is."""
        try:
            self._arguments(spec)
        except ConfigError as error:
            return [f"{where}: {problem}" for problem in error.problems]
        return []

    def build(self, spec: Spec, *context: Any) -> T:
        """The part made from its context and its checked configuration."""
        return self.get(spec["name"])(*context, **self._arguments(spec))

    def _arguments(self, spec: Spec) -> dict[str, Any]:
        part = self.get(spec["name"])
        given = {key: value for key, value in spec.items() if key != "name"}
        allowed = _keywords(part)
        problems = [
            f"{spec['name']} has no setting {key!r}.{did_you_mean(key, allowed)}" for key in given if key not in allowed
        ]
        try:
            known = {key: value for key, value in given.items() if key in allowed}
            checked = _model(part)(**known)
        except ValidationError as error:
            problems += [
                f"{spec['name']}.{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}, found {e['input']!r}"
                for e in error.errors()
            ]
        if problems:
            raise ConfigError(problems)
        return {key: getattr(checked, key) for key in allowed}

    def _load(self) -> None:
        for module in self._modules:
            importlib.import_module(module)


def _keywords(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(part).parameters.values() if p.kind is p.KEYWORD_ONLY}


@lru_cache(maxsize=256)
def _model(part: Callable[..., Any]) -> type[Any]:
    hints = get_type_hints(part, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default) for name, p in _keywords(part).items()
    }
    return create_model("Arguments", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


@lru_cache(maxsize=16)
def _entry_points(kind: str) -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=f"raypipe.{kind}")}

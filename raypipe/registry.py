"""One registry a room: parts by name, their keyword-only arguments are their configuration.

A part is a function. Positional parameters are context that the code passes (a number of classes, a layout);
keyword-only parameters are what may be said in YAML, checked from their annotations by pydantic. A user's own
part comes in by package entry point in the group `raypipe.<kind>`; no dotted path is ever read from YAML.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeAlias, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

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
            self._parts[name] = _loaded(found, self.kind)
        return self._parts[name]

    def problems(self, spec: Spec, where: str) -> list[str]:
        """What is wrong with a part's configuration, a line each, beginning with its dotted key; empty when right."""
        try:
            return self._check(spec, where)[1]
        except ConfigError as error:
            return [f"{where}: {problem}" for problem in error.problems]

    def build(self, spec: Spec, *context: Any) -> T:
        """The part made from its context and its checked configuration. Raises ConfigError with every problem."""
        arguments, problems = self._check(spec, self.kind)
        if problems:
            raise ConfigError(problems)
        return self.get(spec["name"])(*context, **arguments)

    def _check(self, spec: Spec, where: str) -> tuple[dict[str, Any], list[str]]:
        name = spec.get("name")
        if not isinstance(name, str):
            raise ConfigError(f"a {self.kind} needs a name: write it as a word or as {{name: ..., setting: ...}}")
        part = self.get(name)
        given = {key: value for key, value in spec.items() if key != "name"}
        allowed = _keywords(part)
        problems = [
            f"{where}.{key}: {name} has no such setting.{did_you_mean(str(key), allowed)}"
            for key in given
            if key not in allowed
        ]
        try:
            checked = _model(part)(**{key: value for key, value in given.items() if key in allowed})
        except ValidationError as error:
            return {}, problems + [f"{dotted(where, *e['loc'])}: {phrase(e)}" for e in error.errors()]
        return {key: getattr(checked, key) for key in allowed}, problems

    def _load(self) -> None:
        for module in self._modules:
            importlib.import_module(module)


def dotted(*steps: str | int) -> str:
    """A key as it is written in `--set`: `stores.0.cpus`."""
    return ".".join(str(step) for step in steps if step != "")


def phrase(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors in this project's words: what is allowed, what was found, the nearest value."""
    kind, found, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        near = did_you_mean(str(found), allowed)
        return f"{_shown(found)} is not one of {', '.join(allowed)}.{near if near.startswith(' Did') else ''}"
    if kind == "value_error":
        text = str(context["error"])
        return text if isinstance(found, list | dict | BaseModel) else f"{text}; found {_shown(found)}"
    must = _MUST.get(kind)
    text = must.format(**context) if must else str(error["msg"]).lower()
    hint = "; write it in quotes" if kind == "string_type" and not isinstance(found, list | dict) else ""
    return f"{text}, found {_shown(found)}{hint}"


_MUST = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "string_type": "must be text",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a table of keys",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "invalid_key": "a key must be text",
}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _loaded(point: EntryPoint, kind: str) -> Callable[..., Any]:
    try:
        part = point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {kind} {point.name!r} ({point.value}) cannot be imported ({type(error).__name__})"
        ) from error
    if not callable(part):
        raise ConfigError(f"the {kind} {point.name!r} ({point.value}) is not a function")
    return part  # type: ignore[no-any-return]


def _keywords(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {p.name: p for p in inspect.signature(part).parameters.values() if p.kind is p.KEYWORD_ONLY}


@lru_cache(maxsize=256)
def _model(part: Callable[..., Any]) -> type[BaseModel]:
    hints = get_type_hints(part, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if p.default is p.empty else p.default) for name, p in _keywords(part).items()
    }
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    made: type[BaseModel] = create_model("Arguments", __config__=config, **fields)
    return made


@lru_cache(maxsize=64)
def _entry_points(kind: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"raypipe.{kind}")}

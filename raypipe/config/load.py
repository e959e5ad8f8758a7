"""From YAML and `--set` to a RunConfig. Every mistake is found before anything starts, and all are shown together,
a line each: where it was said, the dotted key, what is allowed, what was found, the nearest right word.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from raypipe.config.schema import RunConfig, repeated
from raypipe.errors import ConfigError, did_you_mean
from raypipe.registry import dotted, phrase

MAX_DEPTH = 32  # of nested keys; also what ends an alias that holds itself


def load(
    path: Path | None, overrides: Sequence[str] = (), parts: Callable[[Mapping[str, Any]], list[str]] | None = None
) -> RunConfig:
    """The configuration of a file (None: overrides alone), with `key.key=value` overrides on top.

    An override's value is YAML; a store may be named by its id: `stores.mall.cpus=2`.
    `parts` says what is wrong with the parts named in the plain dict, `key: problem` each; rooms know, this one does
    not. Raises ConfigError with every problem.
    """
    source = path.name if path else "configuration"
    raw, problems = ({}, []) if path is None else _read(path)
    said: set[str] = set()
    for text in overrides:
        key, problem = _override(raw, text)
        if problem:
            problems.append(problem)
        else:
            said.add(key)
    for key, value in raw.items():
        if value is None and _section(key):
            raw[key] = {}  # `train:` with nothing under it
    try:
        config: RunConfig | None = RunConfig.model_validate(raw)
    except ValidationError as error:
        config = None
        found = [(e["loc"], _line(e)) for e in error.errors()]
        if ("stores",) not in [loc for loc, _ in found] and (twice := _twice(raw)):
            found.append((("stores",), f"stores: ids must differ, found twice: {', '.join(twice)}"))
        problems += [f"{'--set' if _was_said(dotted(*loc), said) else source}: {line}" for loc, line in found]
    if parts is not None:
        about = parts(raw)
        problems += [f"{'--set' if _was_said(line.partition(':')[0], said) else source}: {line}" for line in about]
    if problems or config is None:
        raise ConfigError(problems)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Every key with its resolved value, as plain JSON types; `RunConfig.model_validate` takes it back."""
    return config.model_dump(mode="json")


def config_hash(config: RunConfig) -> str:
    """Equal for configurations that mean the same, however they were written."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """Safe; notes keys that are there twice, and reads 1e-3 as a number, as YAML 1.2 does."""

    repeated: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                self.repeated.append(f"line {key.start_mark.line + 1}: key {key.value!r} is there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str) -> tuple[Any, list[str]]:
    loader = _Loader(text)
    loader.repeated = []
    try:
        return _plain(loader.get_single_data()), loader.repeated
    finally:
        loader.dispose()


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy in which nothing is shared, so that an override of one alias does not change the other."""
    if depth > MAX_DEPTH:
        raise yaml.YAMLError(f"keys are nested more than {MAX_DEPTH} deep")
    if isinstance(value, dict):
        return {key: _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    return value


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    try:
        raw, twice = _parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(_missing(path)) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {(error.strerror or str(error)).lower()}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path.name}: {_syntax(error)}") from None
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(f"{path.name}: must be a section of keys, found a {type(raw).__name__}")
    return raw or {}, [f"{path.name}: {line}" for line in twice]


def _missing(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such folder {str(folder)!r}"
    names = [p.name for p in folder.iterdir() if p.suffix in {".yaml", ".yml"}]
    return f"{path}: no such file.{did_you_mean(path.name, names)}"


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _override(raw: dict[str, Any], text: str) -> tuple[str, str | None]:
    """Set one `key=value` in place: (dotted key, what is wrong with it)."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip("."):
        return key, f"--set {text}: write it as key=value"
    try:
        parsed, twice = _parse(value)
    except yaml.YAMLError as error:
        return key, f"--set {text}: {_syntax(error)}"
    if twice:
        return key, f"--set {text}: {twice[0]}"
    steps = key.split(".")
    node: Any = raw
    try:
        for depth, step in enumerate(steps[:-1]):
            node = _down(node, steps[:depth], step)
        steps = [*steps[:-1], str(_place(node, steps[:-1], steps[-1], room=1))]
    except KeyError as error:
        return key, f"--set {key}: {error.args[0]}"
    last = steps[-1]
    if isinstance(node, list):
        node[int(last) : int(last) + 1] = [parsed]
    else:
        node[last] = parsed
    return dotted(*steps), None


def _down(node: Any, above: Sequence[str], step: str) -> Any:
    """What lies under `step`, made from the default where the file is silent. Raises KeyError with a sentence."""
    place = _place(node, above, step)
    if isinstance(node, list):
        if isinstance(node[place], str):
            node[place] = {"name": node[place]}
        return node[place]
    default = _default(above, step)
    if node.get(step) is None:
        node[step] = default if default is not None else {}
    if isinstance(node[step], str) and isinstance(default, dict):
        node[step] = {"name": node[step]}  # a part written as a word
    return node[step]


def _place(node: Any, above: Sequence[str], step: str, room: int = 0) -> Any:
    """The key or index that `step` stands for in `node`."""
    if isinstance(node, dict):
        return step
    where = dotted(*above)
    if not isinstance(node, list):
        raise KeyError(f"{where} is a single value ({node!r}) and holds no keys")
    ids = [str(item.get("id")) for item in node if isinstance(item, dict)]
    if step in ids:
        return ids.index(step)
    if step.isdecimal() and int(step) < len(node) + room:
        return int(step)
    near = did_you_mean(step, {*ids})
    raise KeyError(f"{where} has no {step!r}, only {len(node)} entries counted from 0.{near}")


def _default(above: Sequence[str], step: str) -> Any:
    section = _section(*above)
    field = section.model_fields.get(step) if section else None
    value = deepcopy(field.get_default(call_default_factory=True)) if field and not field.is_required() else None
    return {} if isinstance(value, BaseModel) else value


def _section(*steps: str | int) -> type[BaseModel] | None:
    """The model at these steps of the schema; None where there is none."""
    section: type[BaseModel] | None = RunConfig
    for step in steps:
        if isinstance(step, int) or str(step).isdecimal():
            continue
        field = section.model_fields.get(str(step)) if section else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return section


def _line(error: Any) -> str:
    loc = error["loc"]
    if error["type"] != "extra_forbidden":
        return f"{dotted(*loc)}: {phrase(error)}" if loc else phrase(error)
    section = _section(*loc[:-1])
    siblings = list(section.model_fields) if section else []
    hint = did_you_mean(str(loc[-1]), siblings)
    elsewhere = [key for key in _keys(RunConfig) if key.split(".")[-1] == loc[-1]]
    if not hint.startswith(" Did") and elsewhere:
        hint = f" Did you mean {elsewhere[0]!r}?"
    return f"{dotted(*loc)}: no such key.{hint}"


def _keys(section: type[BaseModel], above: str = "") -> Iterator[str]:
    for name in section.model_fields:
        yield dotted(above, name)
        inner = _section(*dotted(above, name).split("."))
        if inner and inner is not RunConfig:
            yield from _keys(inner, dotted(above, name))


def _was_said(key: str, said: set[str]) -> bool:
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in said)


def _twice(raw: dict[str, Any]) -> list[str]:
    stores = raw.get("stores")
    return repeated(s["id"] for s in stores if isinstance(s, dict) and "id" in s) if isinstance(stores, list) else []

"""Parts by name: what a wrong name, setting or value is told."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

import raypipe.registry as module
from raypipe.errors import ConfigError
from raypipe.registry import Registry


def own_part(*, factor: float = 2.0) -> float:
    """What a user's package would hold."""
    return factor


@pytest.fixture
def scales() -> Registry[float]:
    registry: Registry[float] = Registry("scale")

    @registry("clip")
    def clip(base: float, *, limit: Annotated[float, Field(gt=0)], mode: Literal["hard", "soft"] = "hard") -> float:
        return base * limit

    return registry


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend that a package with these entry points is installed."""

    def points(**values: str) -> None:
        found = [EntryPoint(name, value, "raypipe.scale") for name, value in values.items()]
        monkeypatch.setattr(module, "entry_points", lambda group: found if group == "raypipe.scale" else [])

    module._entry_points.cache_clear()
    yield points
    module._entry_points.cache_clear()


def test_a_part_is_built_from_its_context_and_its_checked_settings(scales: Registry[float]) -> None:
    assert scales.build({"name": "clip", "limit": "3"}, 2.0) == 6.0
    assert scales.problems({"name": "clip", "limit": 3}, "update.0") == []


@pytest.mark.parametrize(
    ("spec", "lines"),
    [
        ({"name": "clp"}, ["update.0: no scale named 'clp'. Did you mean 'clip'?"]),
        ({"limit": 1}, ["update.0: a scale needs a name: write it as a word or as {name: ..., setting: ...}"]),
        ({"name": "clip"}, ["update.0.limit: is missing"]),
        ({"name": "clip", "limit": 0}, ["update.0.limit: must be greater than 0, found 0"]),
        ({"name": "clip", "limit": "far"}, ["update.0.limit: must be a number, found 'far'"]),
        (
            {"name": "clip", "limt": 1, "limit": -1, "mode": "sof"},
            [
                "update.0.limt: clip has no such setting. Did you mean 'limit'?",
                "update.0.limit: must be greater than 0, found -1",
                "update.0.mode: 'sof' is not one of hard, soft. Did you mean 'soft'?",
            ],
        ),
        ({"name": "clip", "limit": 1, "base": 3}, ["update.0.base: clip has no such setting. Allowed: limit, mode."]),
    ],
)
def test_each_mistake_is_one_line_with_its_key(scales: Registry[float], spec: dict[str, Any], lines: list[str]) -> None:
    assert scales.problems(spec, "update.0") == lines
    with pytest.raises(ConfigError):
        scales.build(spec, 1.0)


def test_two_parts_cannot_share_a_name(scales: Registry[float]) -> None:
    with pytest.raises(ConfigError, match="two scales are named 'clip'"):
        scales("clip")(own_part)


def test_modules_are_imported_at_the_first_look_up() -> None:
    registry: Registry[object] = Registry("late", modules=("raypipe.no_such_module",))
    with pytest.raises(ModuleNotFoundError):
        registry.names()


def test_a_part_of_an_installed_package_is_found_and_checked(scales: Registry[float], installed: Any) -> None:
    installed(own=f"{__name__}:own_part")
    assert scales.names() == ["clip", "own"]
    assert scales.build({"name": "own", "factor": 3}) == 3.0
    assert scales.problems({"name": "own", "factr": 3}, "x") == [
        "x.factr: own has no such setting. Did you mean 'factor'?"
    ]


def test_an_entry_point_that_cannot_be_imported_gets_one_line(scales: Registry[float], installed: Any) -> None:
    installed(gone="no_such_package:part", absent=f"{__name__}:none", text=f"{__name__}:__doc__")
    assert scales.problems({"name": "gone"}, "x") == [
        "x: the scale 'gone' (no_such_package:part) cannot be imported (ModuleNotFoundError)"
    ]
    assert "cannot be imported" in scales.problems({"name": "absent"}, "x")[0]
    assert scales.problems({"name": "text"}, "x")[0].endswith("is not a function")

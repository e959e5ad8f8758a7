"""The configurations that come with raypipe: beside the package in a clone, inside it where a wheel was installed."""

from __future__ import annotations

from pathlib import Path

import raypipe


def shipped(name: str) -> Path:
    """One of configs/, whatever the working directory is."""
    package = Path(str(raypipe.__file__)).resolve().parent
    inside = package / "configs"
    return (inside if inside.is_dir() else package.parent / "configs") / name


DEFAULT = shipped("quickstart.yaml")

"""Single fields of what comes through a vault's door, each of its kind or StoreRefused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import StoreError, StoreRefused
from raypipe.store import messages as msg

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Body: TypeAlias = dict[str, Any]


def run_of(body: Body) -> str:
    """That it is about, as far as can be told."""
    if isinstance(run := body.get("run"), str):
        return run
    with suppress(StoreError):
        if isinstance(raw := body.get("plan"), bytes):
            return msg.expect(msg.Plan, raw).run
        if isinstance(raw := body.get("verdict"), bytes):
            return msg.expect(msg.Verdict, raw).run
    return ""


def text(body: Body, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or len(value) > 256:
        raise StoreRefused(f"{name} is a text of at most 256 characters")
    return value


def raw_bytes(body: Body, name: str) -> bytes:
    value = body.get(name)
    if not isinstance(value, bytes):
        raise StoreRefused(f"{name} is not a message")
    return value


def vector(body: Body, name: str) -> Array:
    raw = raw_bytes(body, name)
    if len(raw) % 4:
        raise StoreRefused(f"{name} is not a vector of float32")
    return np.frombuffer(raw, "<f4")


def number(body: Body, name: str, least: int) -> int:
    value = body.get(name)
    if type(value) is not int or value < least:
        raise StoreRefused(f"{name} is a whole number from {least} on")
    return value

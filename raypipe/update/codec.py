"""What an update goes through on its way from the store to the coordinator.

A codec is a pair: `encode` at the store, `decode` at the coordinator. A chain is encoded in the order written and
decoded in reverse. Two flags say what may be combined with it:

    linear   decode(encode(a) + encode(b)) is exactly a + b in the codec's own arithmetic, so that sums may be taken
             before decoding. Rounding is not linear.
    seals    what is under it opens only as a sum over a cohort (a mask, an encryption)

Non-finite values pass through as they are: whoever folds them refuses them, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from raypipe.errors import ConfigError, UpdateRejected
from raypipe.registry import Registry

Array: TypeAlias = npt.NDArray[Any]
Vector: TypeAlias = npt.NDArray[np.float32]
Part: TypeAlias = Mapping[str, Any]

BLOCK = 1 << 18  # values rounded at a time: their temporaries stay in the cache


@dataclass(frozen=True, slots=True)
class Context:
    """What both ends know of an update beside its values: `size` counts its floats."""

    size: int


@dataclass(frozen=True, slots=True)
class Codec:
    """One step of a chain. `takes` and `gives` are little-endian dtypes before and after encoding.

    A finite value x comes back within `relative_error * |x| + absolute_error`. Neither end changes its input.
    """

    name: str
    encode: Callable[[Array, Context], Array]
    decode: Callable[[Array, Context], Array]
    linear: bool
    seals: bool = False
    takes: str = "<f4"
    gives: str = "<f4"
    relative_error: float = 0.0
    absolute_error: float = 0.0

    def num_bytes(self, size: int) -> int:
        """Bytes of an encoded update of this many floats."""
        return size * np.dtype(self.gives).itemsize


codecs: Registry[Codec] = Registry("codec")


@codecs("float32")
def float32() -> Codec:
    """The values as they are; nothing is copied."""
    return Codec("float32", lambda array, ctx: array, lambda array, ctx: array, linear=True)


@codecs("bfloat16")
def bfloat16() -> Codec:
    """The upper half of a float32, rounded to nearest even: half the bytes, the full range, 8 significant bits."""
    return Codec("bfloat16", _round_bfloat16, _widen_bfloat16, False, gives="<u2", relative_error=2.0**-8)


@codecs("float16")
def float16() -> Codec:
    """IEEE half precision: half the bytes, 11 significant bits, nothing beyond 65504 (UpdateRejected)."""
    return Codec(
        "float16",
        _round_float16,
        lambda array, ctx: array.astype("<f4"),
        linear=False,
        gives="<f2",
        relative_error=2.0**-11,
        absolute_error=2.0**-25,
    )


def chain(how: Sequence[Part]) -> list[Codec]:
    """The codecs of a configuration, in encoding order. Raises ConfigError when two do not fit on each other."""
    made = [codecs.build(part) for part in how] or [float32()]
    for below, above in pairwise(made):
        if np.dtype(below.gives) != np.dtype(above.takes):
            raise ConfigError(
                f"{above.name} cannot come after {below.name}: "
                f"it takes {np.dtype(above.takes)}, {below.name} gives {np.dtype(below.gives)}"
            )
    return made


def encoded_bytes(how: Sequence[Part], size: int) -> int:
    """Bytes that travel for an update of `size` floats."""
    return chain(how)[-1].num_bytes(size)


def encode_chain(how: Sequence[Part], vector: Vector) -> Array:
    """A float32 vector (size,) as the array that travels; with float32 alone, the very same array."""
    array: Array = np.ascontiguousarray(vector, dtype="<f4")
    ctx = Context(array.size)
    for codec in chain(how):
        array = codec.encode(array, ctx)
    return array


def decode_chain(how: Sequence[Part], array: Array, size: int) -> Vector:
    """The float32 vector (size,) that was encoded. Raises UpdateRejected when shape or dtype cannot be right."""
    ctx = Context(size)
    for codec in reversed(chain(how)):
        _expect(array, codec, size)
        array = codec.decode(array, ctx)
    return array


def _expect(array: Array, codec: Codec, size: int) -> None:
    found = (array.shape, array.dtype)
    if found != ((size,), np.dtype(codec.gives)):
        raise UpdateRejected(
            f"{codec.name} expects {size} values of {np.dtype(codec.gives)}, "
            f"{math.prod(array.shape)} of {array.dtype} came with shape {array.shape}"
        )


def _round_bfloat16(array: Array, ctx: Context) -> Array:
    out = np.empty(array.shape, "<u2")
    for at in range(0, array.size, BLOCK):
        bits = array[at : at + BLOCK].view("<u4")
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # rounding could carry a NaN into infinity
        rounded[nan] = bits[nan] | np.uint32(0x00400000)
        out[at : at + BLOCK] = rounded >> np.uint32(16)
    return out


def _widen_bfloat16(array: Array, ctx: Context) -> Array:
    out = np.zeros((array.size, 2), "<u2")
    out[:, 1] = array
    return out.view("<f4").reshape(-1)


def _round_float16(array: Array, ctx: Context) -> Array:
    with np.errstate(over="ignore"):
        out = array.astype("<f2")
    if np.isinf(out).sum() != np.isinf(array).sum():
        raise UpdateRejected("the update holds values beyond 65504, which float16 cannot carry; use bfloat16")
    return out

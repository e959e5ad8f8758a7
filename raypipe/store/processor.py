"""What a process computes with: with another torch, architecture or vector instructions, bits differ.

With fewer instructions than the chip has, torch and oneDNN compute as on one that has no more: set before torch is
imported, the variables of `fewer` make sums come out as they did there.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable
from functools import lru_cache
from pathlib import Path

import torch

from raypipe.errors import ConfigError

CPUINFO = Path("/proc/cpuinfo")
# torch's name for them, from the fewest on: what makes it, and oneDNN below it, go without the others.
LEVELS = {
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "AVX512": {},
}
NAMED = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU architecture", "CPU part")  # of x86, of ARM


@lru_cache(maxsize=1)
def machine() -> str:
    """In one line. The library picks its code by the instructions and by who made the chip, so both are in it."""
    chip = chip_of(_cpuinfo())
    what = f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{what}, {chip}" if chip else what


def take_device(store: str, threads: int, gpus: float) -> torch.device:
    """Torch's threads, and its share of the first GPU where it is given one. Raises ConfigError: there is none."""
    torch.set_num_threads(threads)
    if gpus <= 0:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"store {store} is given {gpus:g} GPUs, but torch sees none on this node")
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpus))
    return torch.device("cuda", 0)


def chip_of(lines: Iterable[str]) -> str:
    """Of the first processor that Linux lists: maker, family and model, by number."""
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return " ".join(found[name] for name in NAMED if found.get(name))


def fewer(then: Collection[str], now: str) -> dict[str, str]:
    """The environment in which this machine computes as those of which `machine` said `then`; empty: there is none, or
    none is needed. All of them have to have had the same, and less than is here."""
    try:
        ((torch_then, arch_then, level),) = {_parts(one) for one in then}
        torch_now, arch_now, most = _parts(now)
    except ValueError:  # nothing was recorded; or several, of which one process can be like one only
        return {}
    if (torch_then, arch_then) != (torch_now, arch_now) or not {level, most} <= LEVELS.keys():
        return {}
    return dict(LEVELS[level]) if list(LEVELS).index(level) < list(LEVELS).index(most) else {}


def _parts(said: str) -> tuple[str, str, str]:
    """Torch, architecture, instructions."""
    version, rest = said.split(", ")[:2]
    arch, level = rest.split()
    return version, arch, level


def same(then: str, now: str) -> bool:
    """As far as was recorded: an older raypipe did not name the chip, or nothing."""
    return now == then or now.startswith(f"{then}, ") or not then


def _cpuinfo() -> list[str]:
    try:
        return CPUINFO.read_text("utf-8", "replace").splitlines()[:64]
    except OSError:
        return []

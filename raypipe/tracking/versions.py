"""The weights of a run's versions, one safetensors file each, and which of them are kept.

A file's name holds its version and the first 12 digits of its blake3, so a half-written or altered file cannot
pass for a version. It appears under that name only when it is whole and on the disk; before, it is a `.part` with the
epoch of the coordinator that writes it, so that one which stood still while another took over spoils nothing. What was
removed here is still in the journal: lineage is kept for ever, weights by rule.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from raypipe.errors import ConfigError, RunError
from raypipe.ledger.keys import digest
from raypipe.models.tensors import Array, state_dict_from, vector_from
from raypipe.security.files import sync_folder
from raypipe.tracking import overwrite
from raypipe.types import Layout

FOLDER = "versions"
HEADER = "raypipe"  # the key of our metadata in a file's header
DIGITS = 12
STATE = "state-v{:05d}.safetensors"
SPARE = "spare"  # the file that was removed last, to be written over

Tensors: TypeAlias = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a version's weights lie: `file` is a name within the store, `hash` the blake3 of its content."""

    file: str
    hash: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Retention:
    """Which weights stay. Pinned ones stay too; a follower that lags should find its Nth ones, so name its N here."""

    last: int = 5
    every: tuple[int, ...] = ()  # multiples of each of these
    best: int | None = None
    also: frozenset[int] = frozenset()  # e.g. versions still in use, or not judged yet

    def keeps(self, version: int, first: int, newest: int) -> bool:
        """Whether a version stays, given the first and the newest that there are."""
        by_rule = version == first or version > newest - self.last or any(version % n == 0 for n in self.every)
        return by_rule or version == self.best or version in self.also


class VersionStore:
    """One folder; one writer, readers in any process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.life = 0  # the writer's epoch
        self._writes = True  # until `tidy`: a file is left to be written over

    def write(self, version: int, vector: Array, layout: Layout, metadata: Mapping[str, object]) -> None:
        """Outlives this process when it returns, and the machine after `keep`. `metadata` goes into the header.

        Straight from the vector: one pass, no copy. Raises RunError when the disk is full.
        """
        part, tensors = self._part(version), state_dict_from(layout, vector)
        header = {HEADER: json.dumps(metadata, sort_keys=True)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            spare = overwrite.take_over(self.folder / SPARE, part) if overwrite.can_write(tensors) else None
            if spare is None:
                save_file(tensors, part, metadata=header)
            else:
                with spare:
                    overwrite.write(spare, tensors, header)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise RunError(f"version {version} could not be written: {_reason(error)}") from None

    def keep(self, version: int) -> Stored:
        """Durable when it returns, under its final name; what was written of this version before is replaced.

        It may be repeated. Raises RunError.
        """
        parts, there = self._parts(version), self._files(version)
        part = parts[0] if parts else self._part(version)
        try:
            if not parts and len(there) == 1:
                return Stored(there[0].name, _digest(there[0]), there[0].stat().st_size)
            found = _digest(part)
            with part.open("rb") as file:
                num_bytes = os.fstat(file.fileno()).st_size
                os.fsync(file.fileno())
            final = self.folder / f"v{version:05d}-{found[:DIGITS]}.safetensors"
            part.rename(final)
            for stale in (*there, *parts):
                if stale != final:
                    stale.unlink(missing_ok=True)
            sync_folder(self.folder)
        except OSError as error:
            raise RunError(f"version {version} could not be kept: {_reason(error)}") from None
        return Stored(final.name, found, num_bytes)

    def recover(self, version: int, layout: Layout, content_hash: str) -> Array | None:
        """A version's vector, also of one that was written and not kept yet; None where it is lost or damaged."""
        for file in (*self._files(version), *self._parts(version)):
            try:
                vector = vector_from(layout, load_file(file))
            except (OSError, SafetensorError, ConfigError):
                continue
            if digest(vector) == content_hash:
                return vector
        return None

    def path(self, version: int) -> Path:
        """The file of a version. Raises ConfigError naming the nearest kept ones when its weights are gone."""
        for file in self._files(version):
            return file
        near = sorted(sorted(self.kept(), key=lambda v: abs(v - version))[:3])
        there = f"the nearest kept are {', '.join(map(str, near))}" if near else "no version's weights are kept"
        raise ConfigError(f"the weights of version {version} are not kept; {there}")

    def read(self, version: int, expected: str | None = None) -> Tensors:
        """The tensors by name; the content is checked against its name, and against `expected` (a blake3) if given.

        Raises ConfigError when the weights are gone, RunError when the file was altered.
        """
        file = self.path(version)
        if not _is_whole(file, expected):
            near = sorted(set(self.kept()) - {version}, key=lambda v: abs(v - version))
            whole = next((v for v in near if self.is_whole(v)), None)
            there = "no other is whole" if whole is None else f"the nearest whole one is {whole}"
            raise RunError(f"the weights of version {version} are damaged ({file.name}); {there}")
        return dict(load_file(file))

    def is_whole(self, version: int) -> bool:
        """Whether a version's weights are here and unaltered."""
        return any(_is_whole(file, None) for file in self._files(version))

    def kept(self) -> list[int]:
        """Versions whose weights are here, ascending."""
        return sorted({int(file.name[1:].partition("-")[0]) for file in self.folder.glob("v*-*.safetensors")})

    def pin(self, version: int) -> None:
        """Keep this one whatever the rule says; any process may ask. Raises ConfigError when it is gone."""
        self.path(version)
        (self.folder / f"v{version:05d}.pin").touch()
        self.path(version)

    def pinned(self) -> set[int]:
        """Versions kept by name, e.g. promoted ones."""
        return {int(file.stem[1:]) for file in self.folder.glob("v*.pin")}

    def prune(self, keep: Retention) -> list[int]:
        """Remove what the rule does not keep; the versions removed, ascending. One file is left to be written over."""
        kept = self.kept()
        gone = [v for v in kept if not keep.keeps(v, kept[0], kept[-1])]
        removed = []
        for version in gone:
            if version not in self.pinned():
                removed.append(version)
                for file in self._files(version):
                    with suppress(FileNotFoundError):
                        file.replace(self.folder / SPARE)
        if not self._writes:
            self.tidy()
        elif kept and not (self.folder / SPARE).exists():
            overwrite.lay_by(self.folder / SPARE, self.path(kept[-1]).stat().st_size)
        return removed

    def tidy(self) -> None:
        """When no more is written."""
        self._writes = False
        (self.folder / SPARE).unlink(missing_ok=True)

    def _part(self, version: int) -> Path:
        return self.folder / f"v{version:05d}.{self.life}.part"

    def _parts(self, version: int) -> list[Path]:
        """The latest coordinator's first: what is recorded of a version is what the last one to make it has written."""
        found = self.folder.glob(f"v{version:05d}.*part")
        return sorted(found, key=lambda file: int(file.name.split(".")[1].removesuffix("part") or 0), reverse=True)

    def _files(self, version: int) -> list[Path]:
        return list(self.folder.glob(f"v{version:05d}-*.safetensors"))


def read_file(file: Path) -> tuple[Tensors, dict[str, Any]]:
    """Any safetensors file: its tensors and what raypipe wrote in its header. Raises ConfigError in one line."""
    try:
        with safe_open(file, "np") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
        return tensors, dict(json.loads(header.get(HEADER, "{}")))
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{file.name} is no readable safetensors file: {_reason(error)}") from None


def save_state(folder: Path, version: int, state: Mapping[str, Array]) -> None:
    """The server transform's state after a version, beside its weights.

    Outlives this process when it returns, and the machine after `force_state`. Raises RunError.
    """
    file = folder / STATE.format(version)
    part = file.with_suffix(".part")
    try:
        save_file(dict(state), part, metadata={"hash": _of_tensors(state)})
        part.rename(file)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RunError(f"the state after version {version} could not be written: {_reason(error)}") from None


def force_state(folder: Path, version: int) -> str | None:
    """Have the state after a version on the disk; its hash, None where there is none. Raises RunError.

    Those of older versions go, but for the one before it: a version that is damaged later has one to go back to.
    """
    file = folder / STATE.format(version)
    if not file.is_file():
        return None
    try:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        sync_folder(folder)
        with safe_open(file, "np") as state:
            found = _shortened((state.metadata() or {}).get("hash", ""))
    except (OSError, SafetensorError) as error:
        raise RunError(f"the state after version {version} could not be kept: {_reason(error)}") from None
    for old in folder.glob(STATE.format(0).replace("00000", "*")):
        if int(old.stem.removeprefix("state-v")) < version - 1:
            old.unlink(missing_ok=True)
    return found


def read_state(folder: Path, version: int, expected: str | None = None) -> Tensors | None:
    """The server transform's state after a version; None where it is lost, damaged, or not of the `expected` hash."""
    try:
        with safe_open(folder / STATE.format(version), "np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a mapping
            found = _of_tensors(tensors)
            return tensors if (opened.metadata() or {}).get("hash") == found and _is(found, expected) else None
    except (OSError, SafetensorError):
        return None


def _is(found: str, expected: str | None) -> bool:
    return expected in (None, _shortened(found))


def _shortened(of_tensors: str) -> str:
    """One hash, of those of all tensors."""
    return digest(of_tensors.encode())


def _of_tensors(tensors: Mapping[str, Array]) -> str:
    return "".join(digest(tensors[name]) for name in sorted(tensors))


def _digest(file: Path) -> str:
    """blake3 of a file: 64 hex digits, as `b3sum` prints them."""
    hasher, block = blake3(), bytearray(1 << 20)  # not mapped: its pages would count as this process's memory
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(block):
            hasher.update(memoryview(block)[:size])
    return hasher.hexdigest()


def _is_whole(file: Path, expected: str | None) -> bool:
    """Its content has the hash in its name, and the expected one: a blake3; once, a sha256."""
    named = file.stem.partition("-")[2]
    try:
        found = _digest(file)
        if found[:DIGITS] != named:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return False
    return found[:DIGITS] == named and expected in (None, found)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]

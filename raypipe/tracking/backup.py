"""A run in one file, made while it goes on, and back: what the coordinator needs to take it up again.

    journal    the record, by SQLite's own backup: one moment of it
    diary      copied after the journal, so that it is not behind the record, and cut where it is ahead of it
    versions   kept weights, the newest version's (also when they have no final name yet), the transform's state,
               control variates
    the rest   the ledger and its like, copied before the journal: they follow it

Not in it: what the stores keep (data, outboxes, kept state: it is theirs), keys and roster of the home (they are
of all runs; whoever had the key could sign), MLflow (told again from the record). Stores of a run with a ledger that
went on after the backup refuse the shorter history, as they must: their operators accept that what they saw is gone
by moving `heads/RUN.heads.jsonl` away.

A tar of plain files; its last member lists the blake3 of all others, so one that was cut or altered is found before
anything is put in place. A restored run's epoch is far above any that its stores may have heard of, else they would
refuse it as the older one.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, Any

from blake3 import blake3

from raypipe.config.schema import NAME
from raypipe.coordinator.diary import FOLDER as DIARY
from raypipe.errors import ConfigError, RunError
from raypipe.ledger import roster
from raypipe.security.files import sync_folder
from raypipe.tracking.journal import FILE, Journal
from raypipe.tracking.lineage import History
from raypipe.tracking.variates import VariateStore
from raypipe.tracking.versions import FOLDER, STATE, VersionStore, read_state
from raypipe.types import Layout

MANIFEST, FORMAT = "MANIFEST", 1
TRIES, WAIT_S = 25, 0.2  # a run that goes on may remove what is being looked for
EPOCHS = 1000  # a restored run is so many ahead
APART = ("mlflow.", "journal.", "state-v")  # taken otherwise, or not at all
BESIDE = ("keys", roster.FILE)
SECRET = (".pem", ".key")
BLOCK = 1 << 20
PUBLISHED = b'{"event":"Published",'  # how such a line of the diary begins

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """A backup, or what came of one. `left_out`: what of the home the run needs beside it."""

    run: str
    path: Path
    version: int
    num_bytes: int
    left_out: tuple[str, ...] = ()


@dataclass(slots=True)
class _Moment:
    """A run as it was at one moment: open files by name, which stay what they are when the run goes on."""

    version: int
    whole: bool  # the newest version can be had
    last: int  # of the journal's records
    files: dict[str, IO[bytes]] = field(default_factory=dict)


def backup(run_dir: Path, target: Path) -> Saved:
    """Put a run into a file; into `<run>.tar` of a folder. It appears when it is whole and on the disk.

    The run may go on meanwhile. Raises ConfigError: the target is there already; RunError: nothing to be saved yet,
    the disk is full.
    """
    target = target / f"{run_dir.name}.tar" if target.is_dir() else target
    if target.exists():
        raise ConfigError(f"{target} is there already: name another file")
    part, copy = (target.with_name(f"{target.name}.{end}") for end in ("part", "journal"))
    try:
        with ExitStack() as stack:
            others = _others(run_dir, stack)
            moment = _moment(run_dir, copy, stack)
            files = (
                others | moment.files | {FILE: stack.enter_context(copy.open("rb"))} | _diary(run_dir, moment.version)
            )
            _write(part, run_dir.name, moment.version, files)
        part.rename(target)
        sync_folder(target.absolute().parent)
    except OSError as error:
        raise RunError(f"the backup {target} could not be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)
    home = run_dir.parent.parent
    left_out = tuple(name for name in BESIDE if (home / name).exists())
    return Saved(run_dir.name, target, moment.version, target.stat().st_size, left_out)


def _others(run_dir: Path, stack: ExitStack) -> dict[str, IO[bytes]]:
    """What lies beside the journal and follows it, but for private keys."""
    there = sorted(f for f in run_dir.iterdir() if f.is_file() and not f.name.startswith(APART))
    wanted = [f for f in there if f.suffix not in (*SECRET, ".part", ".lock")]
    return {f.name: stack.enter_context(f.open("rb")) for f in wanted}


def _diary(run_dir: Path, newest: int) -> dict[str, IO[bytes]]:
    """Up to the newest version of the record: what came after it is done again, and comes to the same."""
    found: dict[str, IO[bytes]] = {}
    for file in sorted((run_dir / DIARY).glob("*.jsonl")):
        with suppress(FileNotFoundError):  # old ones are removed
            lines = file.read_bytes().splitlines(keepends=True)
            told = takewhile(lambda line: not _is_after(line, newest), lines)
            found[f"{DIARY}/{file.name}"] = io.BytesIO(b"".join(told))
    return found


def _is_after(line: bytes, newest: int) -> bool:
    if not line.endswith(b"\n"):  # being written
        return True
    return line.startswith(PUBLISHED) and int(json.loads(line)["version"]) > newest


def _moment(run_dir: Path, copy: Path, stack: ExitStack) -> _Moment:
    """The journal and the weights that it speaks of; tried again while the run is faster."""
    before = -1
    for _ in range(TRIES):
        with ExitStack() as trial:
            moment = _try(run_dir, copy, trial)
            if moment.whole or moment.last == before:  # the second: it does not go on, so it stays damaged
                stack.push(trial.pop_all())
                break
        before = moment.last
        time.sleep(WAIT_S)
    else:
        raise RunError("the run makes versions faster than they can be copied; try again when it is slower")
    if not moment.whole:
        log.warning("version %d is damaged or lost: who restores this goes on from an earlier one", moment.version)
    return moment


def _try(run_dir: Path, copy: Path, stack: ExitStack) -> _Moment:
    copy.unlink(missing_ok=True)
    with closing(Journal(run_dir / FILE)) as journal:
        journal.copy_to(copy)
    with closing(Journal(copy)) as journal:
        history, last = History.of(journal.read()), journal.last()
    if not history.versions:
        raise RunError(f"run {run_dir.name} has no version yet: there is nothing to back up")
    newest, store, variates = max(history.versions), VersionStore(run_dir / FOLDER), VariateStore(run_dir)
    moment = _Moment(newest, False, last)
    names = [f for like in ("v*-*.safetensors", "v*.pin", f"v{newest:05d}.*part") for f in store.folder.glob(like)]
    states = list(run_dir.glob("state-v*.safetensors"))
    tables = [file for file in variates.folder.glob("*") if file.suffix != ".part"]
    for file in sorted([*names, *states, *tables]):
        try:
            moment.files[str(file.relative_to(run_dir))] = stack.enter_context(file.open("rb"))
        except FileNotFoundError:  # removed or renamed just now
            continue
    layout = Layout.from_json(history.layout(newest))
    vector = store.recover(newest, layout, history.versions[newest]["hash"])
    there = any(name.startswith(f"{FOLDER}/v{newest:05d}") for name in moment.files)
    state = not states or (STATE.format(newest) in moment.files and read_state(run_dir, newest) is not None)
    moment.whole = vector is not None and there and state and (not tables or variates.read(newest) is not None)
    return moment


class _Hashing:
    """A file that is read once, and the hash of what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.hash = file, blake3()

    def read(self, size: int = -1, /) -> bytes:
        block = self._file.read(size)
        self.hash.update(block)
        return block


def _write(part: Path, run: str, version: int, files: dict[str, IO[bytes]]) -> None:
    listed: dict[str, list[Any]] = {}
    with part.open("wb") as out:
        with tarfile.open(fileobj=out, mode="w") as tar:
            for name, file in files.items():
                info = tarfile.TarInfo(f"{run}/{name}")
                info.size, info.mode, info.mtime = file.seek(0, os.SEEK_END), 0o600, int(time.time())
                file.seek(0)
                hashing = _Hashing(file)
                tar.addfile(info, hashing)
                listed[name] = [hashing.hash.hexdigest(), info.size]
            manifest = {"format": FORMAT, "run": run, "version": version, "at": time.time(), "files": listed}
            text = json.dumps(manifest, sort_keys=True).encode()
            text = blake3(text).hexdigest().encode() + b"\n" + text
            info = tarfile.TarInfo(f"{run}/{MANIFEST}")
            info.size, info.mode = len(text), 0o600
            tar.addfile(info, io.BytesIO(text))
        out.flush()
        os.fsync(out.fileno())


def restore(file: Path, home: Path) -> Saved:
    """Put a backup's run back under `home`; it appears when every byte of it was found right.

    Raises ConfigError: no such file, or a run of this name is here already; RunError: the backup is damaged, the disk
    is full.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such backup")
    staged = home / "restoring" / f"{os.getpid()}"
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        manifest = _unpacked(file, staged)
        run = str(manifest["run"])
        place = home / "runs" / run
        if place.exists():
            raise ConfigError(f"run {run} is here already: {place}; move that folder away first")
        _mark(staged / FILE, manifest)
        for path in (*staged.rglob("*"), staged):
            _sync(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        staged.rename(place)
        sync_folder(place.parent)
    except OSError as error:
        raise RunError(f"the run could not be put back: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        with suppress(OSError):  # somebody else is restoring
            staged.parent.rmdir()
    return Saved(run, place, int(manifest["version"]), sum(size for _, size in manifest["files"].values()))


def _unpacked(file: Path, staged: Path) -> dict[str, Any]:
    """All members but the list of them, which is returned when every one is as listed."""
    found: dict[str, list[Any]] = {}
    manifest: dict[str, Any] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for run, name, member in _members(tar, file):
                if name == MANIFEST:
                    manifest = _listed(member.read(), run, file)
                    continue
                place = staged / name
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("wb") as out:
                    hashing = _Hashing(member)
                    while block := hashing.read(BLOCK):
                        out.write(block)
                    found[name] = [hashing.hash.hexdigest(), out.tell()]
    except tarfile.TarError as error:
        raise RunError(f"{file} is cut or no backup: {error}") from None
    if not manifest:
        raise RunError(f"{file} is cut or no backup: the list of what is in it is missing")
    wrong = sorted(n for n in {*found, *manifest["files"]} if found.get(n) != manifest["files"].get(n))
    if wrong:
        raise RunError(f"{file} is damaged: {wrong[0]} is not what was saved")
    return manifest


def _members(tar: tarfile.TarFile, file: Path) -> Iterator[tuple[str, str, IO[bytes]]]:
    """(run, name within it, content). Nothing but plain files below one folder is taken."""
    for info in tar:
        path = PurePosixPath(info.name)
        safe = len(path.parts) in (2, 3) and NAME.match(path.parts[0]) and not {"..", ".", ""} & set(path.parts)
        opened = tar.extractfile(info) if info.isreg() and safe and not path.is_absolute() else None
        if opened is None:
            raise RunError(f"{file} is no backup of a run: it holds {info.name[:80]!r}")
        yield path.parts[0], str(PurePosixPath(*path.parts[1:])), opened


def _listed(text: bytes, run: str, file: Path) -> dict[str, Any]:
    check, _, body = text.partition(b"\n")
    if check != blake3(body).hexdigest().encode():
        raise RunError(f"{file} is damaged: the list of what is in it is not what was saved")
    manifest: dict[str, Any] = json.loads(body)
    if manifest["format"] > FORMAT or manifest["run"] != run:
        raise RunError(f"{file} is of format {manifest['format']}; this raypipe reads format {FORMAT}")
    return manifest


def _mark(journal: Path, manifest: dict[str, Any]) -> None:
    """The record says that it was restored; the next coordinator's epoch counts on from this one."""
    with closing(Journal(journal, write=True)) as opened:
        epochs = [r.body["epoch"] for r in opened.read(kinds=["run_started", "run_restored"])]
        now = time.time()
        body = {"version": manifest["version"], "epoch": max(epochs) + EPOCHS, "saved_at": manifest["at"], "at": now}
        opened.append("run_restored", body, now)


def _sync(path: Path) -> None:
    if path.is_dir():
        sync_folder(path)
        return
    with path.open("rb") as opened:
        os.fsync(opened.fileno())

"""Data packages of the Debian archive, fetched when they are asked for; none is shipped with raypipe.

    fashion-mnist-full   dataset-fashion-mnist, MIT: all 70,000 images of Fashion-MNIST
    orange-juice         r-cran-bayesm, GPL-2+: refrigerated orange juice at Dominick's. 106,139 weeks of a brand at a
                         store, 83 real stores, and who lives around them. Montgomery 1997
    lending-club         r-cran-modeldata, MIT: 9,857 loans, 5.2 % of them bad, 50 states

A .deb is an archive that needs no root to be unpacked and no R to be read. `rdata` reads R's files: the extra
`raypipe[tables]`.
"""

from __future__ import annotations

import bz2
import lzma
import shutil
import subprocess
import warnings
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raypipe.errors import ConfigError, RunError

PACKAGES = {
    "fashion-mnist-full": "dataset-fashion-mnist",
    "orange-juice": "r-cran-bayesm",
    "lending-club": "r-cran-modeldata",
}
SITE = "usr/lib/R/site-library"
IMAGES = "usr/share/datasets/fashion-mnist"
FETCH_S = 300.0


def fetch(name: str, source: Path | None = None) -> dict[str, Any]:
    """R's data frames by name, as pandas has them.

    `source`: the package's .deb, or a folder where it is unpacked; without it apt-get fetches it. Raises RunError where
    that cannot be done, ConfigError where the source is something else.
    """
    with TemporaryDirectory() as folder:
        root = Path(folder)
        if source is None or source.suffix == ".deb":
            _bring(name, source, root)
        else:
            root = source
        return _orange_juice(root) if name == "orange-juice" else _lending_club(root)


def kept_package(name: str, source: Path | None, folder: Path) -> Path:
    """Its .deb in this folder, brought there at the first time; or `source` where that is a folder.

    `source` and errors as of `fetch`. So what `raypipe data` was once given, `raypipe train` finds.
    """
    if source is not None and source.suffix != ".deb":
        return source
    target = folder / f"{PACKAGES[name]}.deb"
    if source is None and target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as beside:
        if source is not None and not source.is_file():
            raise ConfigError(f"{source}: no such file")
        found = _download(PACKAGES[name], Path(beside)) if source is None else Path(shutil.copy(source, beside))
        found.rename(target)
    return target


def fetch_images(out: Path, source: Path | None = None) -> None:
    """Fashion-MNIST's four idx files into a folder; what is there is left alone. `source` and errors as of `fetch`."""
    if out.is_dir():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent) as folder:
        _bring("fashion-mnist-full", source, Path(folder))
        inside = Path(folder) / IMAGES
        if not inside.is_dir():
            raise ConfigError(f"{source or PACKAGES['fashion-mnist-full']} has no {IMAGES}")
        inside.rename(out)


def _bring(name: str, source: Path | None, folder: Path) -> None:
    """Its package, unpacked."""
    _unpack(source or _download(PACKAGES[name], folder), folder)


def _download(package: str, folder: Path) -> Path:
    hint = f"get {package} elsewhere, then: raypipe data CONFIG --source FILE.deb"
    if shutil.which("apt-get") is None:
        raise RunError(f"this machine has no apt-get to fetch Debian's {package}; {hint}")
    try:
        command = ["apt-get", "download", "-qq", package]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=FETCH_S)
    except (subprocess.SubprocessError, OSError) as error:
        raise RunError(
            f"Debian's {package} could not be fetched ({type(error).__name__}): do `apt-get update`, or {hint}"
        ) from None
    return next(folder.glob("*.deb"))


def _unpack(package: Path, folder: Path) -> None:
    if not package.is_file():
        raise ConfigError(f"{package}: no such file")
    try:
        command = ["dpkg-deb", "-x", str(package), str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=FETCH_S)
    except (subprocess.SubprocessError, OSError) as error:
        raise ConfigError(f"{package} cannot be unpacked by dpkg-deb ({type(error).__name__})") from None


def _orange_juice(root: Path) -> dict[str, Any]:
    path = _found(root / SITE / "bayesm/data/orangeJuice.rda")
    tables = _rdata().read_rda(path)["orangeJuice"]
    return {"weeks": tables["yx"], "stores": tables["storedemo"]}


def _lending_club(root: Path) -> dict[str, Any]:
    return {"loans": lazy_load(_found(root / SITE / "modeldata/data/Rdata.rdx"), "lending_club")}


def lazy_load(index: Path, name: str) -> Any:
    """One object of R's lazy-load database: `index` (.rdx) says where it lies in the .rdb beside it.

    A chunk is the length of what it holds (4 bytes, big-endian), then that, compressed: by zlib, or by what one more
    byte says. R Internals, section 1.17; serialize.c of R.
    """
    rdata = _rdata()
    raw = index.read_bytes()
    where = _read(rdata, raw if raw[:2] == b"\x1f\x8b" else zlib.decompress(raw))["variables"]
    if name not in where:
        raise ConfigError(f"{index.name} has no object {name!r}")
    start, size = (int(number) for number in where[name])
    with _found(index.with_suffix(".rdb")).open("rb") as file:
        file.seek(start)
        chunk = file.read(size)
    return _read(rdata, _unpacked(chunk[4:]))


def _unpacked(chunk: bytes) -> bytes:
    kind, rest = chunk[:1], chunk[1:]
    if kind == b"2":
        return bz2.decompress(rest)
    if kind == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        return lzma.decompress(rest, format=lzma.FORMAT_RAW, filters=filters)
    return rest if kind == b"0" else zlib.decompress(chunk)


def _read(rdata: Any, raw: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes of R that are data frames by another name
        return rdata.conversion.convert(rdata.parser.parse_data(raw))


def _rdata() -> Any:
    try:
        import rdata
    except ImportError:
        raise ConfigError("R's files are read by rdata, which is not installed: install raypipe[tables]") from None
    return rdata


def _found(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path.name} is not where Debian's package has it, below {SITE}")
    return path

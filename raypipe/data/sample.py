"""Fashion-MNIST: 28x28 grey photographs of products, ten classes. Xiao et al. 2017, arXiv:1708.07747; MIT licence.

A sample of 12,000 train, 2,000 validation and 2,000 test images is bundled, the same number of each class. It was
made from the full data set (Debian package dataset-fashion-mnist) by

    python -m raypipe.data.sample /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from raypipe.data.camera import rng_for
from raypipe.data.dataset import Labels, Pixels, open_data
from raypipe.data.debian import fetch_images
from raypipe.data.schema import SPLITS, write_split
from raypipe.data.split import balanced
from raypipe.errors import ConfigError, RunError, did_you_mean

Images: TypeAlias = tuple[Pixels, Labels]  # (N, H, W) grey, and (N,)

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SCENE_BYTES = 9_400.0  # of a composed shelf as JPEG, mean of four stores
SAMPLES = {"fashion-mnist": Path(__file__).parent / "fashion_mnist"}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts it
RAW = Path("FashionMNIST/raw")  # where torchvision puts it, below the folder that it is given
SAMPLE_COUNTS = {"train": 12_000, "validation": 2_000, "test": 2_000}
FULL_VALIDATION = 6_000
SIZE = 28  # pixels
_IDX = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("t10k", "images"): "t10k-images-idx3-ubyte",
    ("t10k", "labels"): "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Public images to make stores' data sets from; pixels are read when `read(split)` is called."""

    name: str
    classes: tuple[str, ...]
    content_hash: str
    read: Callable[[str], Images]


def load_sample(name: str = "fashion-mnist") -> Source:
    """A bundled sample. Raises ConfigError for a name that there is none of."""
    if name not in SAMPLES:
        raise ConfigError(f"no sample named {name!r}.{did_you_mean(name, SAMPLES)}")
    data = open_data(SAMPLES[name], name=name)

    def read(split: str) -> Images:
        part = data.split(split)
        pixels, good = part.decode(np.arange(len(part)), size=SIZE, channels=1)
        if not good.all():
            raise RunError(f"the bundled sample {name!r} is damaged; install raypipe again")
        return pixels[:, 0], part.labels

    return Source(name, data.classes, data.content_hash, read)


def sample_image_bytes(name: str) -> float:
    """Mean size of a sample's image files: what pooling would move for each image."""
    if name == "fashion-shelves":
        return SCENE_BYTES
    name = "fashion-mnist" if name == "fashion-mnist-full" else name
    if name not in SAMPLES:
        raise ConfigError(f"no sample named {name!r}.{did_you_mean(name, SAMPLES)}")
    images = pq.read_table(SAMPLES[name] / "test.parquet", columns=["image"]).column(0)
    return float(pc.mean(pc.binary_length(images)).as_py())


def load_full(folder: Path = DEBIAN) -> Source:
    """All 70,000 images from the four idx files, gzipped or not: 54,000 train, 6,000 validation, 10,000 test.

    Raises ConfigError if they are not in the folder, or not whole.
    """
    files = {name: _find(folder, name) for name in _IDX.values()}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(_read_bytes(files[name]))

    def read(split: str) -> Images:
        images, labels = (_read_idx(files[_IDX[_half(split), kind]]) for kind in ("images", "labels"))
        if len(images) != len(labels):
            raise ConfigError("Fashion-MNIST's files do not belong together: images and labels differ in number")
        if split == "test":
            return images, labels.astype(np.int64)
        held_out = balanced(labels.astype(np.int64), FULL_VALIDATION, rng_for("fashion-mnist", "validation"))
        chosen = np.sort(held_out) if split == "validation" else np.setdiff1d(np.arange(len(labels)), held_out)
        return images[chosen], labels[chosen].astype(np.int64)

    return Source("fashion-mnist-full", CLASSES, digest.hexdigest(), read)


def download_full(folder: Path) -> Source:
    """All 70,000 images through torchvision, kept in the folder. Raises RunError where there is no internet."""
    try:
        from torchvision.datasets import FashionMNIST  # needs torch; nothing else in this room does

        FashionMNIST(str(folder), download=True)
    except (ImportError, OSError, RuntimeError):
        raise RunError(
            "Fashion-MNIST could not be downloaded; use the bundled sample, "
            "or install the Debian package dataset-fashion-mnist"
        ) from None
    return load_full(folder / RAW)


def full(source: str | None, kept: Path) -> Source:
    """All 70,000 images: of a folder of the idx files, a .deb, or `download` (through torchvision).

    None: of Debian's folder, or what was fetched before, or Debian's package by apt-get, or torchvision's download.
    `kept`: the folder where what was fetched stays. Raises ConfigError, RunError.
    """
    package, downloaded = kept / "fashion-mnist", kept / RAW
    if source == "download":
        return download_full(kept)
    if source is not None and not source.endswith(".deb"):
        return load_full(Path(source))
    if source is not None:
        fetch_images(package, Path(source))
        return load_full(package)
    if there := next((folder for folder in (DEBIAN, package, downloaded) if _is_whole(folder)), None):
        return load_full(there)
    try:
        fetch_images(package)
    except RunError as error:
        try:
            return download_full(kept)
        except RunError:
            raise RunError(f"{error.message}; nor could torchvision download it") from None
    return load_full(package)


def make_sample(source: Source, folder: Path, *, seed: int = 0) -> None:
    """Write the bundled sample's three files from the full data set; equal seeds give equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        images, labels = source.read(split)
        chosen = balanced(labels, SAMPLE_COUNTS[split], rng_for(seed, "sample", split))
        write_split(
            folder / f"{split}.parquet",
            images=encode_png(images[chosen], level=9),
            labels=labels[chosen],
            classes=source.classes,
            image_ids=[f"{split}-{i:05d}" for i in chosen],
            shapes=np.full((len(chosen), 2), SIZE),
            compression="zstd",
        )


def encode_png(images: Pixels, *, level: int) -> list[bytes]:
    """PNG files of (N, H, W) grey images. Level 1 is fast, 9 a twentieth smaller."""
    return [cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, level])[1].tobytes() for image in images]


def _half(split: str) -> str:
    return "t10k" if split == "test" else "train"


def _is_whole(folder: Path) -> bool:
    """A download that was cut short lacks files."""
    return all((folder / f"{name}.gz").is_file() or (folder / name).is_file() for name in _IDX.values())


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ConfigError(
        f"{folder} has no {name}.gz; install the Debian package dataset-fashion-mnist or name the folder of its files"
    )


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise ConfigError(f"{path.name} cannot be read ({type(error).__name__}); it should be an idx file") from None


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """The idx format: two zero bytes, type 8 (uint8), number of dimensions, each as big-endian int32, the values."""
    raw = _read_bytes(path)
    shape = np.frombuffer(raw, ">i4", count=raw[3] if len(raw) > 3 else 0, offset=4) if raw[:3] == b"\0\0\x08" else ()
    if not len(shape) or len(raw) != 4 + 4 * len(shape) + np.prod(shape):
        raise ConfigError(f"{path.name} is not a whole idx file of bytes")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def _main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m raypipe.data.sample", description="Make the bundled sample again.")
    parser.add_argument("folder", type=Path, help="the four idx files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=SAMPLES["fashion-mnist"], help="where the sample goes")
    chosen = parser.parse_args(arguments)
    make_sample(load_full(chosen.folder), chosen.out)


if __name__ == "__main__":
    _main()

"""Private data on a store's disk, and the sample that it is made from here."""

from __future__ import annotations

import gzip
import json
import stat
import subprocess
import sys
import types
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.data import parquet, places, sample, stores
from raypipe.data.camera import camera_of, rng_for, shoot
from raypipe.data.dataset import StoreData, open_data, readers
from raypipe.data.decode import decode_images, is_whole
from raypipe.data.places import StoreSummary
from raypipe.data.sample import (
    Source,
    download_full,
    encode_png,
    full,
    load_full,
    load_sample,
    make_sample,
    sample_image_bytes,
)
from raypipe.data.schema import SPLITS, content_hash, write_split
from raypipe.data.split import FEW, balanced, share, sizes, splits
from raypipe.data.stores import describe_stores, make_stores
from raypipe.errors import ConfigError, RunError, StoreRefused

SECRET = ("canary-shoe", "canary-hat")  # class names: they must not be in any message


def pictures(n: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), np.uint8)


def write(folder: Path, split: str, images: Sequence[bytes], labels: Sequence[int] | None = None, **other: Any) -> str:
    folder.mkdir(exist_ok=True)
    some = np.arange(len(images)) % 2 if labels is None else np.array(labels)
    given = {
        "classes": SECRET,
        "image_ids": [f"i{i}" for i in range(len(images))],
        "shapes": np.full((len(images), 2), 8),
    }
    return write_split(folder / f"{split}.parquet", images=images, labels=some, **{**given, **other})


def rewrite(path: Path, metadata: dict[str, str] | None = None, table: Any = None) -> None:
    """The same file with other metadata or another table, as another program might leave it."""
    table = pq.read_table(path) if table is None else table
    kept = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
    pq.write_table(table.replace_schema_metadata({**kept, **(metadata or {})}), path)


def refused(folder: Path) -> str:
    """The message of a data set that cannot be opened: one line, and nothing private in it."""
    with pytest.raises(ConfigError) as caught:
        open_data(folder, name="products")
    message = str(caught.value)
    assert "products" in message
    assert not any(private in message for private in (str(folder), "\n", *SECRET))
    return message


# --- the files ---


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    images = pictures(5)
    digest = write(tmp_path, "train", encode_png(images, level=1))
    data = open_data(tmp_path, name="products")
    pixels, good = data.split("train").decode(np.array([4, 0, 4]), size=8, channels=1)
    assert (data.counts, data.classes, good.tolist()) == ({"train": 5}, SECRET, [True] * 3)
    assert data.split("train").labels.tolist() == [0, 1, 0, 1, 0]
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels[:, 0], images[[4, 0, 4]])
    assert pq.read_schema(tmp_path / "train.parquet").metadata[b"raypipe.sha256"].decode() == digest


def test_the_hash_changes_with_an_image_a_label_and_the_order() -> None:
    images, labels = [b"a", b"bc"], np.array([0, 1])
    others = [([b"ab", b"c"], labels), ([b"a", b"bd"], labels), (images, labels[::-1]), (images[::-1], labels[::-1])]
    assert content_hash(images, labels) == content_hash(images, labels.astype(np.int32))
    assert len({content_hash(images, labels), *(content_hash(i, n) for i, n in others)}) == 5
    zeros = np.zeros(2, np.int64)
    assert content_hash([b"a", b"b"], zeros) != content_hash([b"a\0\0\0\0b"], zeros[:1])


def test_the_data_sets_hash_covers_every_split(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    alone = open_data(tmp_path, name="products").content_hash
    write(tmp_path, "test", [b"y"])
    assert open_data(tmp_path, name="products").content_hash != alone


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    rewrite(tmp_path / "train.parquet", {"raypipe.schema": "classification/2"})
    assert "has schema classification/2; this raypipe reads classification/1" in refused(tmp_path)


def test_a_schema_that_is_no_schema_is_not_repeated(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    rewrite(tmp_path / "train.parquet", {"raypipe.schema": f"{SECRET[0]}\n"})
    assert "an unknown one" in refused(tmp_path)


def test_a_wrong_row_count_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x", b"y", b"z"])
    rewrite(tmp_path / "train.parquet", table=pq.read_table(tmp_path / "train.parquet").slice(0, 2))
    assert "split 'train' of data set 'products' has 2 rows; its metadata says 3" in refused(tmp_path)


def test_a_label_without_a_class_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"], labels=[2])
    assert "labels outside its 2 classes" in refused(tmp_path)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    table = pq.read_table(tmp_path / "train.parquet")
    rewrite(tmp_path / "train.parquet", table=table.set_column(2, "label", pa.array([0], pa.int64())))
    assert "needs a column label of type int32" in refused(tmp_path)


def test_a_parquet_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "train.parquet")
    assert "lacks raypipe.schema" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"PAR1" + bytes(100) + b"PAR1"])
def test_half_a_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.parquet").write_bytes(content)
    assert "split 'train'" in refused(tmp_path)


def test_a_file_damaged_inside_is_refused_when_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x" * 1000] * 50)
    path = tmp_path / "train.parquet"
    raw = path.read_bytes()
    length = raw.find(b"x" * 1000) - 4  # of the first image, in front of it
    path.write_bytes(raw[:length] + b"\xff" * 4 + raw[length + 4 :])
    with pytest.raises(StoreRefused, match="split 'train' of data set 'products' is damaged"):
        open_data(tmp_path, name="products").split("train").decode(np.arange(2), size=8, channels=1)


def test_a_missing_folder_and_a_missing_train_split_are_told_apart(tmp_path: Path) -> None:
    assert "has no folder" in refused(tmp_path / "nowhere")
    write(tmp_path / "some", "test", [b"x"])
    assert "has no train.parquet" in refused(tmp_path / "some")


def test_splits_of_different_classes_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    write(tmp_path, "test", [b"x"], classes=SECRET[::-1])
    assert "differ in their classes" in refused(tmp_path)


def test_an_unknown_split_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    with pytest.raises(StoreRefused, match=r"'products' has no split 'trian'\. Did you mean 'train'"):
        open_data(tmp_path, name="products").split("trian")


def test_an_empty_validation_split_is_read_and_an_empty_train_split_is_named(tmp_path: Path) -> None:
    write(tmp_path, "train", [])
    write(tmp_path, "validation", [])
    data = open_data(tmp_path, name="products")
    pixels, good = data.split("validation").decode(np.arange(0), size=8, channels=3)
    assert (data.counts["validation"], pixels.shape, good.shape) == (0, (0, 3, 8, 8), (0,))
    with pytest.raises(StoreRefused, match="split 'train' of data set 'products' is empty"):
        data.split("train")


def test_row_groups_come_and_go_without_mixing_images_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypipe.data.schema.ROW_GROUP_BYTES", 300)
    monkeypatch.setattr(parquet, "HELD_BYTES", 400)
    images = pictures(40)
    write(tmp_path, "train", encode_png(images, level=1))
    split = open_data(tmp_path, name="products").split("train")
    assert pq.ParquetFile(tmp_path / "train.parquet").num_row_groups > 10
    order = np.random.default_rng(1).permutation(40)
    for _ in range(2):
        np.testing.assert_array_equal(split.decode(order, size=8, channels=1)[0][:, 0], images[order])
    assert len(split._held) < 5  # type: ignore[attr-defined]


def test_an_index_beyond_the_split_is_the_callers_mistake(tmp_path: Path) -> None:
    write(tmp_path, "train", [b"x"])
    for wrong in (-1, 1):
        with pytest.raises(IndexError):
            open_data(tmp_path, name="products").split("train").decode(np.array([wrong]), size=8, channels=1)


def test_a_users_own_format_comes_in_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_parts", dict(readers._parts))
    own = types.SimpleNamespace(counts={"train": 1})
    readers("shelf")(lambda folder, name: own)
    assert open_data(tmp_path, name="products", reader="shelf") is own
    with pytest.raises(ConfigError, match=r"no reader named 'parket'\. Did you mean 'parquet'"):
        open_data(tmp_path, name="products", reader="parket")


# --- decoding ---


def photo(size: int = 64) -> np.ndarray:
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    return np.stack([x * 3, y * 3, x + y], 2).astype(np.uint8)


def file_of(kind: str, image: np.ndarray) -> bytes:
    return cv2.imencode(kind, image)[1].tobytes()


def jpeg_with_exif(image: np.ndarray, orientation: int, thumbnail: bytes = b"") -> bytes:
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + orientation.to_bytes(2, "big") + bytes(6) + thumbnail
    segment = b"Exif\0\0" + tiff
    return b"\xff\xd8\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + file_of(".jpg", image)[2:]


@pytest.mark.parametrize("kind", [".png", ".jpg"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_truncated_image_among_good_ones_is_masked(
    kind: str, threads: int, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = file_of(kind, photo())
    blobs = [whole, whole[: len(whole) // 2], whole, whole[:-2], None, b"", b"no image", whole]
    pixels, good = decode_images(blobs, size=16, channels=3, threads=threads)
    assert good.tolist() == [True, False, True, False, False, False, False, True]
    assert not pixels[~good].any()
    assert pixels[0].any()
    assert [is_whole(memoryview(b or b"")) for b in blobs] == good.tolist()
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_in_a_png_is_masked(capfd: pytest.CaptureFixture[str]) -> None:
    whole = bytearray(file_of(".png", pictures(1)[0]))
    whole[60] ^= 1
    assert not decode_images([bytes(whole)], size=8, channels=1)[1].any()
    assert capfd.readouterr().err == ""


def test_an_image_too_large_to_decode_is_masked() -> None:
    whole = bytearray(file_of(".png", pictures(1)[0]))
    whole[16:24] = (1 << 20).to_bytes(4, "big") * 2  # width and height
    whole[29:33] = zlib.crc32(whole[12:29]).to_bytes(4, "big")
    assert is_whole(memoryview(whole))
    assert not decode_images([bytes(whole)], size=8, channels=1)[1].any()


def test_the_end_of_a_thumbnail_is_not_the_end_of_a_jpeg() -> None:
    whole = jpeg_with_exif(photo(), 1, thumbnail=file_of(".jpg", photo(8)))
    blobs = [whole, whole[:-300], whole + b"\0\0"]
    assert [is_whole(memoryview(b)) for b in blobs] == [True, False, True]
    assert decode_images(blobs, size=64, channels=3)[1].tolist() == [True, False, True]


def test_every_kind_of_jpeg_is_whole() -> None:
    scans = [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
    progressive = cv2.imencode(".jpg", photo(), scans)[1].tobytes()
    assert [is_whole(memoryview(b)) for b in (progressive, progressive[:-40])] == [True, False]
    assert decode_images([progressive], size=64, channels=3)[1].all()


def test_exif_orientation_is_respected() -> None:
    upright, turned = (decode_images([jpeg_with_exif(photo(), o)], size=64, channels=1)[0][0, 0] for o in (1, 6))
    np.testing.assert_array_equal(np.rot90(upright, -1), turned)


def test_colours_are_red_green_blue_and_grey_may_become_three_channels() -> None:
    blue_green_red = np.full((4, 4, 3), (10, 20, 30), np.uint8)
    pixels, _ = decode_images([file_of(".png", blue_green_red), file_of(".png", pictures(1, 4)[0])], size=4, channels=3)
    assert pixels[0, :, 0, 0].tolist() == [30, 20, 10]
    np.testing.assert_array_equal(pixels[1, 0], pixels[1, 2])


def test_images_of_any_shape_become_squares() -> None:
    blobs = [file_of(".png", np.full(shape, 7, np.uint8)) for shape in ((4, 4), (40, 10), (9, 9))]
    pixels, good = decode_images(blobs, size=9, channels=1)
    assert good.all()
    assert (pixels == 7).all()


def test_two_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 or 3 channels, not 2"):
        decode_images([], size=8, channels=2)


# --- splits and cameras ---


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), max_size=300),
    num_stores=st.integers(1, 8),
    ratio=st.floats(1, 50),
    part=st.sampled_from(splits.names()),
    seed=st.integers(0, 9),
)
def test_every_image_goes_to_exactly_one_store(
    labels: list[int], num_stores: int, ratio: float, part: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    counts = sizes(len(labels), num_stores, ratio)
    mix = splits.build({"name": part})("abcdef", num_stores, rng)
    parts = share(np.array(labels, np.int64), mix, counts, rng)
    assert [len(p) for p in parts] == counts.tolist()
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert counts.min() >= min(FEW, len(labels) // num_stores)


@given(total=st.integers(2_000, 100_000), num_stores=st.integers(2, 10), ratio=st.floats(1, 20))
def test_sizes_differ_by_the_ratio_asked_for(total: int, num_stores: int, ratio: float) -> None:
    found = sizes(total, num_stores, ratio)
    assert found.sum() == total
    assert found[0] / found[-1] == pytest.approx(ratio, rel=0.2)
    assert (np.diff(found) <= 1).all()


def skew(part: dict[str, Any], num_stores: int = 5) -> np.ndarray:
    """Class shares of each store, of 300 images of each of Fashion-MNIST's classes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 300)
    mix = splits.build(part)(sample.CLASSES, num_stores, rng)
    parts = share(labels, mix, sizes(3000, num_stores, 1), rng)
    return np.array([np.bincount(labels[p], minlength=10) / len(p) for p in parts])


def test_a_small_alpha_leaves_a_store_few_classes_and_iid_all() -> None:
    most = [skew({"name": "dirichlet", "alpha": a}).max(1).mean() for a in (0.05, 0.5, 1000.0)]
    assert most[0] > most[1] + 0.1 > most[2] + 0.2
    assert skew({"name": "iid"}).max() < 0.11


def test_a_shoe_shop_sells_shoes_and_bags() -> None:
    shop = skew({"name": "departments", "mix": 0.1})[0]
    shoes = [sample.CLASSES.index(name) for name in ("Sandal", "Sneaker", "Ankle boot", "Bag")]
    assert shop[shoes].sum() > 0.8
    assert skew({"name": "departments", "mix": 0.6})[0][shoes].sum() < 0.75


def test_departments_may_be_named_and_a_wrong_name_is_found() -> None:
    shares = skew({"name": "departments", "groups": [["Bag"], ["Coat", "Dress"]], "mix": 0.0}, num_stores=2)
    assert shares[0, 8] > shares[0, 4] == 0
    with pytest.raises(ConfigError, match=r"no class named 'Bagg'\. Did you mean 'Bag'"):
        skew({"name": "departments", "groups": [["Bagg"]]})


def test_a_balanced_choice_takes_each_class_alike_while_it_lasts() -> None:
    labels = np.array([0] * 50 + [1] * 50 + [2] * 3)
    chosen = balanced(labels, 23, np.random.default_rng(0))
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 3]
    assert len(set(chosen.tolist())) == 23


def test_a_store_always_has_the_same_camera_and_others_have_others() -> None:
    images = pictures(4)
    seen = [shoot(camera_of(s, strength=1, seed=3), images, rng_for(0)) for s in ("harbour", "harbour", "market")]
    np.testing.assert_array_equal(seen[0], seen[1])
    assert (seen[0] != seen[2]).mean() > 0.5
    assert camera_of("harbour", strength=1, seed=4) != camera_of("harbour", strength=1, seed=3)


def test_a_camera_without_strength_changes_nothing_and_a_stronger_one_more() -> None:
    images = pictures(20)
    far = [
        np.abs(shoot(camera_of("a", strength=s, seed=0), images, rng_for(0)).astype(int) - images).mean()
        for s in (0, 0.3, 1)
    ]
    assert far[0] == 0 < far[1] < far[2]


def test_a_camera_stays_within_the_grey_levels() -> None:
    extremes = np.array([[[0, 255]]], np.uint8).repeat(8, 1)
    bright, dark = (
        stores.shoot(type(camera_of("a", strength=1, seed=0))(b, 1, 0, 0), extremes, rng_for(0)) for b in (60, -60)
    )
    assert (bright[0, 0].tolist(), dark[0, 0].tolist()) == ([60, 255], [0, 195])


# --- the sample ---


def write_idx(folder: Path, name: str, values: np.ndarray, *, cut: int = 0) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    raw = header + values.astype(np.uint8).tobytes()
    (folder / f"{name}.gz").write_bytes(gzip.compress(raw[: len(raw) - cut], 1))


def idx_folder(folder: Path, *, cut: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for half, n in (("train", 60), ("t10k", 30)):
        write_idx(folder, f"{half}-images-idx3-ubyte", pictures(n, 28, seed=n))
        write_idx(folder, f"{half}-labels-idx1-ubyte", np.arange(n) % 10, cut=cut)
    return folder


def test_the_bundled_sample_is_balanced_and_its_licence_lies_beside_it() -> None:
    source = load_sample()
    images, labels = source.read("test")
    assert (images.shape, images.dtype, np.bincount(labels).tolist()) == ((2000, 28, 28), np.uint8, [200] * 10)
    data = open_data(sample.SAMPLES["fashion-mnist"], name="sample")
    assert dict(data.counts) == sample.SAMPLE_COUNTS
    assert "Zalando SE" in (sample.SAMPLES["fashion-mnist"] / "LICENSE").read_text()


def test_an_unknown_sample_is_named() -> None:
    for look_up in (load_sample, sample_image_bytes):
        with pytest.raises(ConfigError, match="Did you mean 'fashion-mnist'"):
            look_up("fashion-mnits")


def test_an_images_mean_size_is_that_of_its_file() -> None:
    table = pq.read_table(sample.SAMPLES["fashion-mnist"] / "test.parquet")
    lengths = [len(image) for image in table.column("image").to_pylist()]
    assert sample_image_bytes("fashion-mnist") == pytest.approx(sum(lengths) / 2000)


def test_the_full_data_set_is_read_from_idx_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "FULL_VALIDATION", 20)
    source = load_full(idx_folder(tmp_path))
    read = {split: source.read(split) for split in SPLITS}
    assert {split: len(images) for split, (images, _) in read.items()} == {"train": 40, "validation": 20, "test": 30}
    assert np.bincount(read["validation"][1]).tolist() == [2] * 10
    everything = np.concatenate([read["train"][0], read["validation"][0]])
    assert {i.tobytes() for i in everything} == {i.tobytes() for i in pictures(60, 28, seed=60)}


def test_the_sample_can_be_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "FULL_VALIDATION", 20)
    monkeypatch.setattr(sample, "SAMPLE_COUNTS", {"train": 20, "validation": 10, "test": 10})
    source = load_full(idx_folder(tmp_path / "idx"))
    for name in ("a", "b"):
        make_sample(source, tmp_path / name)
    made = [open_data(tmp_path / name, name="sample") for name in ("a", "b")]
    assert made[0].content_hash == made[1].content_hash
    assert dict(made[0].counts) == {"train": 20, "validation": 10, "test": 10}


def test_missing_and_broken_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset-fashion-mnist"):
        load_full(tmp_path)
    with pytest.raises(ConfigError, match=r"train-labels-idx1-ubyte\.gz is not a whole idx file"):
        load_full(idx_folder(tmp_path, cut=3)).read("train")


def test_the_full_data_set_is_brought_once_from_debians_package(tmp_path: Path) -> None:
    inside = tmp_path / "root" / "usr/share/datasets/fashion-mnist"
    inside.mkdir(parents=True)
    for file in idx_folder(tmp_path / "idx").iterdir():
        file.rename(inside / file.name)
    (tmp_path / "root" / "DEBIAN").mkdir()
    (tmp_path / "root" / "DEBIAN" / "control").write_text(
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: a\n"
    )
    package = tmp_path / "fashion.deb"
    subprocess.run(["dpkg-deb", "-b", str(tmp_path / "root"), str(package)], check=True, capture_output=True)
    made = full(str(package), tmp_path / "kept")
    package.unlink()
    assert full(str(package), tmp_path / "kept").content_hash == made.content_hash, "it is there"
    with pytest.raises(ConfigError, match=r"fashion\.deb: no such file"):
        full(str(package), tmp_path / "elsewhere")


def torchvision(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", types.SimpleNamespace(FashionMNIST=download))


def offline(*arguments: Any, **settings: Any) -> None:
    raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://a\nTried https://b")


def test_the_full_data_set_is_found_where_it_was_downloaded_or_downloaded_without_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "DEBIAN", tmp_path / "none")
    monkeypatch.setenv("PATH", "")

    def online(folder: str, *, download: bool) -> None:
        (raw := Path(folder) / "FashionMNIST" / "raw").mkdir(parents=True, exist_ok=True)
        for file in idx_folder(tmp_path / "idx").iterdir():
            file.rename(raw / file.name)

    torchvision(monkeypatch, online)
    made = full(None, tmp_path / "kept")
    torchvision(monkeypatch, offline)
    assert full(None, tmp_path / "kept").content_hash == made.content_hash, "it is there"
    next((tmp_path / "kept/FashionMNIST/raw").iterdir()).unlink()
    with pytest.raises(RunError) as caught:
        full(None, tmp_path / "kept")
    assert caught.value.message == (
        "this machine has no apt-get to fetch Debian's dataset-fashion-mnist; get dataset-fashion-mnist elsewhere, "
        "then: raypipe data CONFIG --source FILE.deb; nor could torchvision download it"
    )


def test_a_download_without_internet_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision(monkeypatch, offline)
    with pytest.raises(RunError) as caught:
        download_full(tmp_path)
    assert "\n" not in str(caught.value)
    assert "bundled sample" in str(caught.value)


# --- the stores ---


def tiny(counts: Sequence[int] = (300, 60, 30), name: str = "tiny") -> Source:
    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        n = counts[SPLITS.index(split)]
        return pictures(n, seed=n), np.arange(n) % 10

    return Source(name, sample.CLASSES, f"hash of {name} {counts}", read)


def make(out: Path, ids: Sequence[str] = ("harbour", "market"), **other: Any) -> list[StoreSummary]:
    return make_stores(out, ids, **{"source": tiny(), "split": {"name": "dirichlet", "alpha": 0.3}, **other})


def opened(out: Path, store: str, name: str = "products") -> StoreData:
    return open_data(out / store / "data" / name, name=name)


def image_ids(out: Path, store: str, split: str) -> list[str]:
    table = pq.read_table(out / store / "data" / "products" / f"{split}.parquet")
    return [str(value) for value in table.column("image_id").to_pylist()]


def test_stores_share_the_images_out_and_all_have_the_same_test(tmp_path: Path) -> None:
    make(tmp_path)
    for split, n in (("train", 300), ("validation", 60)):
        assert len({*image_ids(tmp_path, "harbour", split), *image_ids(tmp_path, "market", split)}) == n
    assert image_ids(tmp_path, "harbour", "test") == image_ids(tmp_path, "market", "test")
    assert opened(tmp_path, "harbour").counts == {"train": 273, "validation": 55, "test": 30}


def test_a_store_validates_on_what_it_sells(tmp_path: Path) -> None:
    make(tmp_path, ids=("a", "b", "c"), source=tiny((3000, 600, 30)), size_ratio=1)
    for store in "abc":
        trained, validated = (np.bincount(opened(tmp_path, store).split(s).labels, minlength=10) for s in SPLITS[:2])
        np.testing.assert_allclose(validated / validated.sum(), trained / trained.sum(), atol=0.02)


def test_each_store_sees_the_test_through_its_own_camera(tmp_path: Path) -> None:
    make(tmp_path, camera_shift=1.0)
    a, b = (
        opened(tmp_path, s).split("test").decode(np.arange(30), size=8, channels=1)[0] for s in ("harbour", "market")
    )
    assert abs(a.mean() - b.mean()) > 5  # not only in their noise
    make(tmp_path / "plain", camera_shift=0.0)
    plain = opened(tmp_path / "plain", "market").split("test").decode(np.arange(30), size=8, channels=1)[0]
    np.testing.assert_array_equal(plain[:, 0], pictures(30, seed=30))


def test_equal_seeds_make_equal_stores(tmp_path: Path) -> None:
    hashes = [[s.content_hash for s in make(tmp_path / str(i), seed=seed)] for i, seed in enumerate((1, 1, 2))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_same_recipe_again_leaves_everything_and_reads_no_pixels(tmp_path: Path) -> None:
    first = make(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*") if p.name != ".lock"}

    def never(split: str) -> Any:
        raise AssertionError(split)

    source = tiny()
    again = make(tmp_path, source=Source(source.name, source.classes, source.content_hash, never))
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert ([s.made for s in first], [s.made for s in again]) == ([True, True], [False, False])
    assert [s.content_hash for s in first] == [s.content_hash for s in again]


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"size_ratio": 2.0}, {"camera_shift": 0.1}, {"split": {"name": "iid"}}, {"max_images": 50}]
)
def test_another_recipe_makes_the_stores_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    before = [s.content_hash for s in make(tmp_path)]
    after = make(tmp_path, **change)
    assert all(s.made and s.content_hash not in before for s in after)
    assert not list(tmp_path.rglob("*.old"))


def test_data_that_somebody_else_put_there_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "harbour" / "data" / "products"
    own.mkdir(parents=True)
    (own / "train.parquet").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="store harbour has a data set 'products' that raypipe did not make"):
        make(tmp_path)
    assert (own / "train.parquet").read_bytes() == b"mine"


def test_an_interrupted_store_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(places, "_allow", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path)
    assert not (tmp_path / "harbour" / "data" / "products").exists()
    assert [s.made for s in make(tmp_path)] == [True, True]
    assert not list(tmp_path.rglob("*.new"))


def test_a_full_disk_is_one_line_without_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, **settings: Any) -> None:
        raise OSError(28, f"No space left on device {path}")

    monkeypatch.setattr(stores, "write_split", full)
    with pytest.raises(RunError) as caught:
        make(tmp_path)
    assert str(caught.value) == "the stores' data sets cannot be written: No space left on device"


def test_a_store_with_one_image_works(tmp_path: Path) -> None:
    summaries = make(tmp_path, ids=("a", "b", "c"), max_images=3)
    assert [s.counts["train"] for s in summaries] == [1, 1, 1]
    assert opened(tmp_path, "c").split("train").decode(np.array([0]), size=8, channels=1)[1].all()


def test_an_empty_validation_and_a_class_absent_in_a_store_work(tmp_path: Path) -> None:
    summaries = make(tmp_path, source=tiny((300, 0, 30)), split={"name": "dirichlet", "alpha": 0.05})
    assert [s.counts["validation"] for s in summaries] == [0, 0]
    assert 0 in summaries[1].histogram
    assert len(opened(tmp_path, "market").split("validation")) == 0


def test_max_images_counts_all_stores_together(tmp_path: Path) -> None:
    summaries = make(tmp_path, source=tiny((3000, 600, 600)), max_images=600)
    assert sum(s.counts["train"] for s in summaries) == 600
    assert {s.counts["test"] for s in summaries} == {120}


def test_the_policy_names_the_data_and_the_folders_are_private(tmp_path: Path) -> None:
    make(tmp_path, data_name="on")
    policy = yaml.safe_load((tmp_path / "harbour" / "policy.yaml").read_text())
    assert policy == {
        "store": "harbour",
        "data": {"on": {"folder": "data/on", "reader": "parquet"}},
        "tasks": ["classification"],
        "models": "all",
        "max_examples": 1_000_000,
        "max_seconds": 3600,
        "max_upload_bytes": 1_000_000_000,
    }
    for folder in ("harbour", "harbour/data", "harbour/data/on"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_a_second_data_set_joins_the_policy_and_an_edited_policy_stays(tmp_path: Path) -> None:
    make(tmp_path)
    make(tmp_path, data_name="shoes")
    policy = tmp_path / "harbour" / "policy.yaml"
    assert set(yaml.safe_load(policy.read_text())["data"]) == {"products", "shoes"}
    policy.write_text("store: harbour\nmodels: [small_cnn]\n")
    assert make(tmp_path, seed=9)[0].made
    assert policy.read_text() == "store: harbour\nmodels: [small_cnn]\n"


def test_a_deleted_policy_is_written_again(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "harbour" / "policy.yaml").unlink()
    assert [s.made for s in make(tmp_path)] == [True, False]
    assert (tmp_path / "harbour" / "policy.yaml").exists()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ids": ("a", "a")}, "distinct"),
        ({"ids": ("../a",)}, "'../a' cannot name a folder"),
        ({"data_name": "a/b"}, "'a/b' cannot name a folder"),
        ({"max_images": 1}, "max_images is 1 for 2 stores"),
        ({"camera_shift": 2.0}, "camera_shift is between 0 and 1"),
        ({"size_ratio": 0.5}, "size_ratio is at least 1"),
        ({"split": {"name": "dirichlet", "alpha": 0}}, "alpha"),
        ({"split": {"name": "dirichlett"}}, "Did you mean 'dirichlet'"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(
    tmp_path: Path, wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_the_table_has_a_line_a_store_and_a_bar_a_class(tmp_path: Path) -> None:
    lines = describe_stores(make(tmp_path, split={"name": "departments"})).splitlines()
    assert [line.split()[:4] for line in lines[1:]] == [["harbour", "273", "55", "30"], ["market", "27", "5", "30"]]
    assert lines[0].split() == ["store", "train", "validation", "test", "classes", "mostly"]
    assert len(lines[2].split()[4]) == 10


def test_a_recipe_holds_what_made_the_data(tmp_path: Path) -> None:
    make(tmp_path, seed=7)
    recipe = json.loads((tmp_path / "market" / "data" / "products" / "recipe.json").read_text())
    assert (recipe["seed"], recipe["stores"], recipe["source"][0]) == (7, ["harbour", "market"], "tiny")

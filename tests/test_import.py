"""Bringing images in: every format, what is wrong with files, and what may not be read at all."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT

from raypipe.cli import main
from raypipe.data.dataset import open_data
from raypipe.data.importers import safe
from raypipe.data.importers.ingest import Report, held_out, ingest
from raypipe.data.importers.safe import json_lists
from raypipe.data.importers.sources import open_source
from raypipe.errors import ConfigError

ALL_TRAIN = {"validation": 0.0, "test": 0.0}
RNG = np.random.default_rng(0)


def image(path: Path, width: int = 60, height: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), RNG.integers(0, 255, (height, width, 3), dtype=np.uint8))
    return path


def brought(root: Path, kind: str, out: Path | None = None, annotations: Path | None = None, **said: object) -> Report:
    return ingest(
        root, open_source(kind, root, annotations), out or root.parent / "out", **{"shares": ALL_TRAIN, **said}
    )


def yolo(root: Path, labels: dict[str, str], names: str = "names: [mug, cup]\n") -> Path:
    for name, text in labels.items():
        image(root / "images" / "train" / f"{name}.jpg")
        path = root / "labels" / "train" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "data.yaml").write_text(names)
    return root


def test_yolo_boxes_become_pixels_and_a_missing_file_means_background(tmp_path: Path) -> None:
    root = yolo(tmp_path / "in", {"0": "0 0.5 0.5 0.2 0.2\n1 .25 .5 .5 .5\n", "1": ""})
    image(root / "images" / "val" / "2.jpg")
    report = brought(root, "yolo")
    data = open_data(tmp_path / "out", name="x")
    assert (data.counts, data.classes) == ({"train": 2, "validation": 1}, ("mug", "cup"))
    table = data.split("train").boxes
    assert table is not None
    assert table.boxes.tolist() == [[24, 16, 12, 8], [0, 10, 30, 20]]
    assert table.offsets.tolist() == [0, 2, 2]
    assert report.content_hash == data.content_hash


BOXES = {
    "0 2 2 .1 .1": "outside the image",
    "0 .5 .5 0 .1": "no area",
    "0 nan .5 .1 .1": "a side that is not a finite number",
    "0 inf .5 .1 .1": "a side that is not a finite number",
    "9 .5 .5 .1 .1": "a class number that is not in the list of names",
    "0 .5 .5 .001 .1": "less than a pixel of it in the image",
    "0 .5 .5": "a line that is not a class number and four numbers",
    "mug .5 .5 .1 .1": "a line that is not a class number and four numbers",
}


@pytest.mark.parametrize("line", BOXES)
def test_a_box_that_cannot_be_is_left_out_and_counted_and_its_image_stays(tmp_path: Path, line: str) -> None:
    root = yolo(tmp_path / "in", {"0": f"{line}\n0 .5 .5 .5 .5\n"})
    report = brought(root, "yolo")
    assert report.boxes_left_out == Counter({BOXES[line]: 1})
    assert (report.boxes, report.images) == (1, Counter(train=1))


def test_a_box_that_reaches_beyond_the_image_is_cut(tmp_path: Path) -> None:
    report = brought(yolo(tmp_path / "in", {"0": "0 .9 .5 .4 .5"}), "yolo")
    table = open_data(tmp_path / "out", name="x").split("train").boxes
    assert table is not None
    assert np.allclose(table.boxes, [[42, 10, 18, 20]])
    assert report.notes == Counter({"a box that reached beyond the image was cut": 1})


def turned(path: Path, how: int = 6) -> None:
    """The JPEG with an EXIF orientation; 6 is a quarter turn."""
    tags = struct.pack("<HHHII", 1, 0x0112, 3, 1, how)
    app = b"Exif\0\0II*\0" + struct.pack("<I", 8) + tags + struct.pack("<I", 0)
    raw = path.read_bytes()
    path.write_bytes(raw[:2] + b"\xff\xe1" + struct.pack(">H", len(app) + 2) + app + raw[2:])


def test_files_that_are_no_images_are_left_out_each_with_its_reason(tmp_path: Path) -> None:
    root = tmp_path / "in"
    whole = image(root / "a" / "whole.jpg").read_bytes()
    (root / "a" / "empty.jpg").write_bytes(b"")
    (root / "a" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "a" / "text.png").write_text("hello")
    image(root / "a" / "thin.png", 1, 20000)
    (root / "a" / "link.jpg").symlink_to("/etc/hostname")
    report = brought(root, "folders")
    assert report.images == Counter(train=1)
    assert report.left_out == Counter(
        {
            "an empty file": 1,
            "not a whole image": 1,
            "not an image that can be decoded": 1,
            "a side is shorter than 2 pixels, or the other more than 100 times as long": 1,
            "its path leaves the folder": 1,
        }
    )
    assert "an empty file (e.g. a/empty.jpg)" in "\n".join(report.lines())


def cmyk(path: Path) -> None:
    """A JPEG whose frame has four components, written by hand: 8 x 8, all tables minimal."""
    ones = bytes([1] * 64)
    table = b"\xff\xdb" + struct.pack(">HB", 67, 0) + ones
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 20, 8, 8, 8, 4) + b"".join(bytes([i, 0x11, 0]) for i in range(1, 5))
    code = b"\xff\xc4" + struct.pack(">HB", 20, 0) + bytes([1] + [0] * 15) + b"\0"
    codes = code + b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15) + b"\0"
    scan = b"\xff\xda" + struct.pack(">HB", 14, 4) + b"".join(bytes([i, 0]) for i in range(1, 5)) + b"\0\x3f\0"
    path.write_bytes(b"\xff\xd8" + table + frame + codes + scan + b"\0\xff\xd9")


def test_unusual_images_are_taken_and_it_is_said_how(tmp_path: Path) -> None:
    root = tmp_path / "in"
    deep = image(root / "a" / "deep.png")
    cv2.imwrite(str(deep), RNG.integers(0, 65535, (40, 60, 3), dtype=np.uint16))
    turned(image(root / "a" / "turned.jpg"))
    image(root / "a" / "other.bmp")
    cmyk(root / "a" / "four.jpg")
    report = brought(root, "folders")
    assert report.images == Counter(train=4), report.left_out
    assert report.notes == Counter(
        {
            "16 bits a channel, seen with 8": 1,
            "seen as its EXIF rotation says": 1,
            "stored as PNG, since it was neither PNG nor JPEG": 1,
            "four colours (CMYK), seen as RGB": 1,
        }
    )
    split = open_data(tmp_path / "out", name="x").split("train")
    assert split.decode(np.arange(4), size=32, channels=3)[1].all()


def coco(root: Path, boxes: list[tuple[int, int, object]], images: list[dict[str, object]] | None = None) -> Path:
    image(root / "images" / "0.jpg")
    listed = [{"id": 7, "file_name": "0.jpg", "width": 60, "height": 40}, *(images or [])]
    said = [{"image_id": i, "category_id": c, "bbox": b, "segmentation": [[1, 2] * 9]} for i, c, b in boxes]
    kinds = [{"id": 90, "name": "cup"}, {"id": 3, "name": "mug"}]
    (root / "a.json").write_text(
        json.dumps({"info": {"x": [1]}, "images": listed, "annotations": said, "categories": kinds})
    )
    return root


def test_sparse_coco_ids_become_dense_and_what_fits_nowhere_is_counted(tmp_path: Path) -> None:
    boxes = [(7, 90, [1, 2, 10, 10]), (7, 3, [5, 5, 20, 10]), (7, 5, [1, 1, 4, 4]), (55, 3, [1, 1, 4, 4]), (7, 3, "no")]
    images: list[dict[str, object]] = [
        {"id": 7, "file_name": "again.jpg"},
        {"id": 8, "file_name": "../../etc/x.jpg"},
        {"id": 9, "file_name": "gone.jpg"},
        {"id": 10, "file_name": "/etc/hostname"},
    ]
    report = brought(coco(tmp_path / "in", boxes, images), "coco")
    data = open_data(tmp_path / "out", name="x")
    assert data.classes == ("mug", "cup")
    table = data.split("train").boxes
    assert table is not None
    assert table.labels.tolist() == [1, 0]
    assert report.boxes_left_out == Counter({"a category id that is not in the list": 1})
    assert report.left_out == Counter(
        {
            "one image id twice: the first is taken": 1,
            "its path leaves the folder": 2,
            "an image that is not there": 1,
            "labels without an image": 1,
            "an entry of annotations that is not as COCO has it": 1,
        }
    )


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_is_read_piece_by_piece_as_if_at_once(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe, "CHUNK", chunk)
    body = {"info": {"a": [1, {"b": "]}"}]}, "images": [{"id": 1}, {"id": 22}], "n": 12.5, "annotations": [[1], "x,]"]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(body, indent=1))
    seen: list[tuple[str, object]] = []
    json_lists(path, ("images", "annotations"), lambda kind, item: seen.append((kind, item)))
    assert seen == [*(("images", i) for i in body["images"]), *(("annotations", i) for i in body["annotations"])]
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ConfigError, match="not whole JSON"):
        json_lists(path, ("images",), lambda kind, item: None)


def voc(root: Path, name: str, before: str = "", filename: str | None = None, xmin: str = "1") -> None:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "Annotations" / f"{name}.xml").write_text(
        f"{before}<annotation><filename>{filename or name + '.jpg'}</filename><object><name>mug</name>"
        f"<difficult>1</difficult><bndbox><xmin>{xmin}</xmin><ymin>1</ymin><xmax>20</xmax><ymax>30</ymax></bndbox>"
        "</object></annotation>"
    )


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;&b;">]>'


def test_voc_counts_from_one_and_no_entity_is_ever_read(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for i in range(4):
        image(root / "JPEGImages" / f"{i}.jpg")
    voc(root, "0")
    voc(root, "1", BOMB)
    voc(root, "2", filename="../../../etc/hostname")
    voc(root, "3", xmin="left")
    voc(root, "4")
    (root / "Annotations" / "5.xml").write_text("<a><b></a>")
    report = brought(root, "voc")
    table = open_data(tmp_path / "out", name="x").split("train").boxes
    assert table is not None
    assert table.boxes.tolist() == [[0, 0, 20, 30]]
    assert table.ignored.tolist() == [True]
    assert report.boxes_left_out == Counter({"a box whose sides are not numbers": 1})
    assert report.left_out == Counter(
        {
            "its XML has a document type, which could define entities": 1,
            "its path leaves the folder": 1,
            "labels without an image": 1,
            "its XML is not well formed": 1,
            "an image without labels": 2,
        }
    )


def test_a_csv_row_of_the_wrong_type_is_left_out_by_its_line(tmp_path: Path) -> None:
    root = tmp_path / "in"
    image(root / "0.jpg"), image(root / "1.jpg")
    (root / "a.csv").write_text(
        "image,label,xmin,ymin,xmax,ymax,split\n0.jpg,mug,1,1,21,11,train\n0.jpg,cup,abc,1,20,20,train\n"
        "1.jpg,cup,1,1,9,9,test\n,cup,1,1,2,2,test\n/etc/hostname,cup,1,1,2,2,test\n"
    )
    report = brought(root, "csv")
    data = open_data(tmp_path / "out", name="x")
    assert data.counts == {"train": 1, "test": 1}
    assert report.left_out == Counter(
        {
            "column 'xmin' holds something that is not a number": 1,
            "a row without an image": 1,
            "its path leaves the folder": 1,
        }
    )
    assert report.examples["column 'xmin' holds something that is not a number"] == ["line 3"]


def test_a_csv_of_labels_is_a_classification_set(tmp_path: Path) -> None:
    root = tmp_path / "in"
    image(root / "0.jpg"), image(root / "1.jpg")
    (root / "a.csv").write_text("path,class\n0.jpg,mug\n0.jpg,cup\n1.jpg,cup\n")
    report = brought(root, "csv")
    data = open_data(tmp_path / "out", name="x")
    assert data.split("train").labels.tolist() == [1, 0]
    assert data.classes == ("cup", "mug")
    assert report.left_out == Counter({"one image id twice: the first is taken": 1})


def test_again_adds_what_is_new_and_keeps_every_number(tmp_path: Path) -> None:
    root = tmp_path / "in"
    image(root / "b" / "0.jpg"), image(root / "c" / "0.jpg")
    first = brought(root, "folders")
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    again = brought(root, "folders")
    assert (again.before, again.images, again.content_hash) == (2, Counter(), first.content_hash)
    image(root / "a" / "0.jpg")  # a new class, first by its name
    (root / "b" / "0.jpg").write_bytes(image(tmp_path / "x.jpg").read_bytes())
    third = brought(root, "folders")
    data = open_data(tmp_path / "out", name="x")
    assert data.classes == ("b", "c", "a")
    assert data.split("train").labels.tolist() == [0, 1, 2]
    assert third.left_out == Counter({"one image id twice with other bytes: the first is kept": 1})
    assert third.content_hash != first.content_hash
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before


def test_an_import_that_is_cut_off_leaves_what_was_there(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for i in range(5):
        image(root / "a" / f"{i}.jpg")

    def see(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        brought(root, "folders", see=see)
    assert [p for p in (tmp_path / "out").iterdir() if p.is_file()] == []
    assert brought(root, "folders").images == Counter(train=5)


def test_a_fixed_list_of_classes_leaves_others_out(tmp_path: Path) -> None:
    root = tmp_path / "in"
    image(root / "a" / "0.jpg"), image(root / "b" / "0.jpg")
    report = brought(root, "folders", classes=["b"])
    assert report.left_out == Counter({"a class that is not in the list": 1})
    assert open_data(tmp_path / "out", name="x").classes == ("b",)


def test_where_no_split_is_said_an_image_always_goes_where_it_went(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for i in range(60):
        image(root / "a" / f"{i}.jpg", 8, 8)
    shares = held_out("0.2,0.2")
    first, second = (brought(root, "folders", tmp_path / out, shares=shares) for out in ("one", "two"))
    assert first.images == second.images
    assert all(first.images[split] >= 4 for split in ("train", "validation", "test"))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["tiff", "IN"], "no importer named"),
        (["folders", "IN/none"], "no such folder"),
        (["yolo", "IN"], "no data.yaml"),
        (["coco", "IN"], "0 JSON files"),
        (["folders", "IN", "--held-out", "0.9,0.2"], "together below 1"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    image(tmp_path / "in" / "a" / "0.jpg")
    given = [word.replace("IN", str(tmp_path / "in")) for word in arguments]
    assert main(["import", *given, "--to", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert why in said
    assert "\n" not in said


def test_the_command_reports_what_came_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image(tmp_path / "in" / "a" / "0.jpg")
    (tmp_path / "in" / "a" / "1.jpg").write_bytes(b"")
    arguments = ["import", "folders", str(tmp_path / "in"), "--to", str(tmp_path / "out"), "--held-out", "0,0"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "1 images added: 1 train",
        "1 image left out: an empty file (e.g. a/1.jpg)",
    ]


def test_memory_stays_flat_however_many_images(tmp_path: Path) -> None:
    """600 images of 0.5 MB, 300 MB in all, one file by many names: the process grows by far less."""
    top = tmp_path / "in" / "images"
    first = image(top / "0.jpg", 700, 400)
    for i in range(1, 600):
        os.link(first, top / f"{i}.jpg")
    (tmp_path / "in" / "classes.txt").write_text("mug\n")
    code = (
        "import resource, sys; from pathlib import Path; from raypipe.data.importers.ingest import ingest;"
        "from raypipe.data.importers.sources import open_source; root = Path(sys.argv[1]) / 'in';"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024; before = peak();"
        "ingest(root, open_source('yolo', root, None), Path(sys.argv[1]) / 'out'); print(before, peak())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    before, peak = map(int, done.stdout.split())
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.parquet")) > 100 << 20
    assert peak - before < 100, f"{before} -> {peak} MiB"

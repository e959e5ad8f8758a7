"""Bringing images in: what is said twice, turned, missing, linked elsewhere, too large, or not as its format has it."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_import import brought, coco, image, turned, voc, yolo

from raypipe import MOST_PIXELS
from raypipe.cli import main
from raypipe.data.dataset import BoxTable, open_data
from raypipe.data.importers.exif import orientation
from raypipe.data.importers.picture import read_picture
from raypipe.data.importers.safe import Refused

UNKNOWN = "it has an EXIF rotation, and nothing says whether its boxes were drawn before or after it"
TURNED = "its boxes were drawn on the image before its EXIF rotation, and are turned with it"
SEEN = "seen as its EXIF rotation says"


def table(out: Path, split: str = "train") -> BoxTable:
    found = open_data(out, name="x").split(split).boxes
    assert found is not None
    return found


def said_in_one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refused import says; fails where it is not one line and exit code 2."""
    assert main(["import", *map(str, arguments)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("raypipe: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    "wrong", [{"category_id": None}, {}, {"category_id": 1 << 70}, {"category_id": 3, "bbox": [1]}]
)
def test_a_coco_box_that_lacks_something_moves_no_other_box(tmp_path: Path, wrong: dict[str, object]) -> None:
    root = coco(tmp_path / "in", [(7, 90, [1, 2, 10, 10])])
    body = json.loads((root / "a.json").read_text())
    body["annotations"].insert(0, {"image_id": 7, "bbox": [30, 30, 5, 5], **wrong})
    (root / "a.json").write_text(json.dumps(body))
    report = brought(root, "coco")
    assert report.left_out == Counter({"an entry of annotations that is not as COCO has it": 1})
    assert (table(tmp_path / "out").boxes.tolist(), table(tmp_path / "out").labels.tolist()) == ([[1, 2, 10, 10]], [1])


def test_annotations_may_lie_outside_the_folder_and_images_may_be_missing(tmp_path: Path) -> None:
    root = coco(tmp_path / "in", [(7, 3, [1, 2, 10, 10])], [{"id": 8, "file_name": "gone.jpg"}])
    (root / "a.json").rename(tmp_path / "a.json")
    report = brought(root, "coco", annotations=tmp_path / "a.json")
    assert (report.images, report.left_out) == (Counter(train=1), Counter({"an image that is not there": 1}))
    voc(tmp_path / "xml", "0"), voc(tmp_path / "xml", "1")
    report = brought(root, "voc", tmp_path / "voc", annotations=tmp_path / "xml" / "Annotations")
    assert (report.images, report.left_out) == (Counter(train=1), Counter({"labels without an image": 1}))
    assert table(tmp_path / "voc").boxes.tolist() == [[0, 0, 20, 30]]


def test_coco_finds_images_in_the_folder_of_its_split_and_beside_itself(tmp_path: Path) -> None:
    root = coco(tmp_path / "in", [], [{"id": 8, "file_name": "8.jpg"}, {"id": 9, "file_name": "../images/9.jpg"}])
    image(root / "val2017" / "8.jpg"), image(root / "images" / "9.jpg")
    (root / "annotations").mkdir()
    (root / "a.json").rename(root / "annotations" / "instances_val2017.json")
    report = brought(root, "coco")
    assert (report.images, report.left_out) == (Counter(validation=3), Counter())


@pytest.mark.parametrize("kind", ["csv", "coco", "yolo"])
def test_a_folder_in_place_of_a_file_of_annotations_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    image(tmp_path / "in" / "0.jpg")
    told = said_in_one_line(capsys, kind, tmp_path / "in", "--to", tmp_path / "out", "--annotations", tmp_path)
    assert told.endswith("not a file")


def test_a_list_of_a_split_that_is_not_text_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "in"
    image(root / "JPEGImages" / "0.jpg"), voc(root, "0")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "val.txt").write_bytes(b"0\n\xff\xfe")
    told = said_in_one_line(capsys, "voc", root, "--to", tmp_path / "out")
    assert told == "raypipe: ImageSets/Main/val.txt: its names are not text in UTF-8"
    (root / "ImageSets" / "Main" / "val.txt").write_text("0\n")
    assert brought(root, "voc").images == Counter(validation=1)


@pytest.mark.parametrize("text", ["names: [mug]\nday: 2001-99-99\n", "[" * 5000])
def test_names_that_cannot_be_read_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    root = yolo(tmp_path / "in", {"0": ""}, names=text)
    told = said_in_one_line(capsys, "yolo", root, "--to", tmp_path / "out")
    assert told == "raypipe: data.yaml is not YAML with a list of names"


def test_a_name_that_no_disk_or_text_can_hold_is_left_out(tmp_path: Path) -> None:
    root = coco(tmp_path / "in", [], [{"id": 8, "file_name": "x" * 300 + ".jpg"}])
    assert brought(root, "coco").left_out == Counter({"an image that is not there": 1})
    photos = tmp_path / "photos"
    whole = image(photos / "a" / "0.jpg").read_bytes()
    Path(os.fsdecode(bytes(photos / "a") + b"/\xff.jpg")).write_bytes(whole)
    report = brought(photos, "folders", tmp_path / "two")
    assert (report.images, report.left_out) == (Counter(train=1), Counter({"its name is not text in UTF-8": 1}))
    assert "\n".join(report.lines()).encode()


def test_an_image_that_two_entries_name_is_taken_with_the_first_and_the_other_counted(tmp_path: Path) -> None:
    boxes = [(7, 90, [1, 2, 10, 10]), (8, 3, [5, 5, 20, 10])]
    root = coco(tmp_path / "in", boxes, [{"id": 8, "file_name": "./0.jpg"}])
    report = brought(root, "coco")
    assert (report.before, report.boxes) == (0, 1)
    assert report.left_out == Counter({"one image id twice: the first is taken": 1})
    assert table(tmp_path / "out").boxes.tolist() == [[1, 2, 10, 10]]
    voc(root, "0"), voc(root, "1", filename="0.jpg", xmin="5")
    report = brought(root, "voc", tmp_path / "voc")
    assert report.left_out == Counter({"one image id twice: the first is taken": 1})
    assert table(tmp_path / "voc").boxes.tolist() == [[0, 0, 20, 30]]
    (root / "b.csv").write_text("image,label\nimages/0.jpg,mug\nimages/../images/0.jpg,cup\n")
    report = brought(root, "csv", tmp_path / "csv")
    assert report.left_out == Counter({"one image id twice: the first is taken": 1})


def test_an_entry_after_one_that_was_refused_is_no_second_one(tmp_path: Path) -> None:
    images: list[dict[str, object]] = [{"id": 8, "file_name": "0.jpg", "width": 60, "height": 40}]
    root = coco(tmp_path / "in", [(8, 3, [5, 5, 20, 10])], images)
    body = json.loads((root / "a.json").read_text())
    body["images"][0]["width"] = 61
    (root / "a.json").write_text(json.dumps(body))
    report = brought(root, "coco")
    assert (report.images, report.boxes) == (Counter(train=1), 1)
    assert report.left_out == Counter({"its labels are for another size than the image has": 1})


def test_labels_that_changed_since_are_said_and_those_there_stay(tmp_path: Path) -> None:
    differ = "its labels are not those that it is there with, which stay"
    root = yolo(tmp_path / "in", {"0": "0 .5 .5 .2 .2\n1 .25 .5 .5 .5\n", "1": "0 .5 .5 .2 .2\n", "2": ""})
    brought(root, "yolo")
    (root / "labels" / "train" / "0.txt").write_text("1 .25 .5 .5 .5\n0 .5 .5 .2 .2\n")  # another order
    assert not brought(root, "yolo").notes
    (root / "labels" / "train" / "1.txt").write_text("0 .5 .5 .3 .2\n")
    (root / "labels" / "train" / "2.txt").write_text("1 .5 .5 .3 .2\n")
    report = brought(root, "yolo")
    assert (report.before, report.notes) == (3, Counter({differ: 2}))
    assert table(tmp_path / "out").labels.tolist() == [0, 1, 0]
    photos = tmp_path / "photos"
    image(photos / "a" / "0.jpg"), image(photos / "b" / "1.jpg")
    (photos / "x.csv").write_text("image,label\na/0.jpg,a\nb/1.jpg,b\n")
    brought(photos, "folders", tmp_path / "two")
    assert not brought(photos, "csv", tmp_path / "two").notes
    (photos / "x.csv").write_text("image,label\na/0.jpg,b\nb/1.jpg,c\n")
    report = brought(photos, "csv", tmp_path / "two")
    assert (report.before, report.notes) == (2, Counter({differ: 2}))
    assert open_data(tmp_path / "two", name="x").split("train").labels.tolist() == [0, 1]


def marked(path: Path, width: int = 60) -> tuple[int, int, int, int]:
    """A black image with a white box in it, as it is stored: where the box is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((40, width, 3), np.uint8)
    pixels[4:16, 8:24] = 255
    cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return 8, 4, 16, 12


def white(raw: bytes) -> list[int]:
    """Where the white box is seen: x, y, w, h."""
    y, x = np.nonzero(cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_GRAYSCALE) > 127)
    return [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]


@pytest.mark.parametrize("how", [5, 6, 7, 8])
def test_boxes_drawn_before_a_quarter_turn_are_turned_with_the_image(tmp_path: Path, how: int) -> None:
    root = coco(tmp_path / "in", [(7, 3, [*marked(tmp_path / "x.jpg")])])
    marked(root / "images" / "0.jpg")
    turned(root / "images" / "0.jpg", how)
    report = brought(root, "coco")
    assert report.notes == Counter({SEEN: 1, TURNED: 1})
    assert table(tmp_path / "out").boxes.tolist() == [white((root / "images" / "0.jpg").read_bytes())]
    assert table(tmp_path / "out").sizes.tolist() == [[40, 60]]


def test_boxes_drawn_on_the_turned_image_are_taken_as_they_are(tmp_path: Path) -> None:
    root = coco(tmp_path / "in", [(7, 3, [1, 2, 10, 50])])
    body = json.loads((root / "a.json").read_text())
    body["images"][0] |= {"width": 40, "height": 60}
    (root / "a.json").write_text(json.dumps(body))
    turned(root / "images" / "0.jpg")
    report = brought(root, "coco")
    assert report.notes == Counter({SEEN: 1})
    assert table(tmp_path / "out").boxes.tolist() == [[1, 2, 10, 50]]


@pytest.mark.parametrize(("how", "width"), [(2, 60), (3, 60), (4, 60), (6, 40)])
def test_where_nothing_says_how_boxes_were_drawn_their_image_is_left_out(tmp_path: Path, how: int, width: int) -> None:
    root = coco(tmp_path / "in", [(7, 3, [1, 2, 10, 10])])
    body = json.loads((root / "a.json").read_text())
    body["images"][0]["width"] = width
    for boxes in (body["annotations"], []):
        image(root / "images" / "0.jpg", width, 40)
        turned(root / "images" / "0.jpg", how)
        (root / "a.json").write_text(json.dumps({**body, "annotations": boxes}))
        report = brought(root, "coco", tmp_path / f"out{len(boxes)}")
        assert report.left_out == Counter({UNKNOWN: 1} if boxes else {})
        assert report.notes == Counter({} if boxes else {SEEN: 1})


def test_a_turned_image_of_voc_csv_and_yolo(tmp_path: Path) -> None:
    root = yolo(tmp_path / "in", {"0": "0 .25 .5 .5 1\n"})
    turned(root / "images" / "train" / "0.jpg", 3)
    report = brought(root, "yolo")  # shares are of the image as it is seen
    assert (report.notes, table(tmp_path / "out").boxes.tolist()) == (Counter({SEEN: 1}), [[0, 0, 30, 40]])
    photos = tmp_path / "photos"
    place = marked(photos / "JPEGImages" / "0.jpg")
    turned(photos / "JPEGImages" / "0.jpg")
    seen = [white((photos / "JPEGImages" / "0.jpg").read_bytes())]
    voc(photos, "0")
    assert brought(photos, "voc", tmp_path / "voc").left_out == Counter({UNKNOWN: 1})  # no size
    for name, header, size in (("a", "", ""), ("b", ",width,height", ",60,40")):
        row = ",".join(map(str, place))
        (photos / "a.csv").write_text(f"image,label,x,y,w,h{header}\nJPEGImages/0.jpg,mug,{row}{size}\n")
        report = brought(photos, "csv", tmp_path / name)
        assert report.left_out == Counter({} if size else {UNKNOWN: 1})
    assert table(tmp_path / "b").boxes.tolist() == seen


def held(how: int, kind: str) -> bytes:
    """An image file of this kind, with an orientation."""
    raw = cv2.imencode(f".{kind}", np.zeros((40, 60, 3), np.uint8))[1].tobytes()
    tiff = b"MM\0*" + struct.pack(">I", 8) + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, how, 0, 0)
    if kind == "png":
        chunk = b"eXIf" + tiff
        return raw[:33] + struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + raw[33:]
    if kind == "webp":
        whole = b"VP8X" + struct.pack("<IIHBHB", 10, 8, 59, 0, 39, 0) + raw[12:]
        body = b"WEBP" + whole + b"EXIF" + struct.pack("<I", len(tiff)) + tiff
        return b"RIFF" + struct.pack("<I", len(body)) + body
    app = b"Exif\0\0" + tiff
    other = b"\xff\xe1\0\x10http://ns.ado\0"  # XMP before it
    return raw[:2] + other + b"\xff\xe1" + struct.pack(">H", len(app) + 2) + app + raw[2:]


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_every_orientation_is_read_as_the_decoder_reads_it(tmp_path: Path, kind: str) -> None:
    for how in range(11):
        (tmp_path / "x").write_bytes(held(how, kind))
        found = read_picture(tmp_path / "x")
        assert found.orientation == orientation(held(how, kind)) == (how if 1 <= how <= 8 else 1)
        assert (SEEN in found.notes) == (2 <= how <= 8)
        assert (found.width, found.height) == ((40, 60) if 5 <= how <= 8 else (60, 40))


def test_images_without_labels_are_said_in_every_format(tmp_path: Path) -> None:
    root = yolo(tmp_path / "in", {"0": "", "1": "0 .5 .5 .2 .2\n"})
    image(root / "images" / "train" / "2.jpg")
    (root / "labels" / "train" / "3.txt").write_text("0 .5 .5 .2 .2\n")
    report = brought(root, "yolo")
    assert report.images == Counter(train=3)
    assert report.notes == Counter({"no label file: taken as background": 1})
    assert report.examples["no label file: taken as background"] == ["images/train/2.jpg"]
    assert report.left_out == Counter({"labels without an image": 1})
    listed = coco(tmp_path / "coco", [(7, 3, [1, 2, 10, 10])])
    image(listed / "images" / "other.jpg"), image(listed / "more" / "other.jpg")
    report = brought(listed, "coco", tmp_path / "out2")
    assert report.left_out == Counter({"an image without labels in the list": 2})
    (listed / "b.csv").write_text("image,label\nimages/0.jpg,mug\n")
    report = brought(listed, "csv", tmp_path / "out3")
    assert report.left_out == Counter({"an image without labels in the list": 2})
    assert "images/other.jpg" in report.examples["an image without labels in the list"]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("yolo", "data.yaml"),
        ("yolo", "classes.txt"),
        ("csv", "a.csv"),
        ("coco", "a.json"),
        ("coco", "annotations/a.json"),
        ("voc", "ImageSets/Main/train.txt"),
        ("voc", "Annotations"),
        ("voc", "JPEGImages"),
        ("yolo", "images"),
        ("yolo", "labels"),
        ("folders", "cup"),
    ],
)
def test_what_is_found_in_the_folder_does_not_lead_out_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str
) -> None:
    root, away = tmp_path / "in", tmp_path / "away"
    image(root / "mug" / "0.jpg"), image(away / "folder" / "0.jpg"), image(root / "images" / "0.jpg")
    texts = {"a.csv": "image,label\nmug/0.jpg,mug\n", "a.json": '{"images": []}', "classes.txt": "mug\n"}
    where = root / place
    if kind == "yolo" and where.suffix not in (".txt", ".yaml"):
        (root / "classes.txt").write_text("mug\n")
    if where.suffix:
        (away / where.name).write_text(texts.get(where.name, "names: [mug]\n"))
    if place == "images":
        (root / "images").rename(root / "else")
    where.parent.mkdir(parents=True, exist_ok=True)
    where.symlink_to(away / (where.name if where.suffix else "folder"))
    told = said_in_one_line(capsys, kind, root, "--to", tmp_path / "out")
    assert told == f"raypipe: {place}: its path leaves the folder; put into the folder what it leads to"
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_a_link_to_elsewhere_that_a_person_named_is_followed(tmp_path: Path) -> None:
    image(tmp_path / "in" / "mug" / "0.jpg")
    (tmp_path / "a.csv").write_text("image,label\nmug/0.jpg,mug\n")
    (tmp_path / "in" / "a.csv").symlink_to(tmp_path / "a.csv")
    assert brought(tmp_path / "in", "csv", annotations=tmp_path / "in" / "a.csv").images == Counter(train=1)


def huge(kind: str, wide: int, high: int) -> bytes:
    """A file of a few bytes whose header claims so many pixels."""
    if kind == "bmp":
        head = struct.pack("<IiiHHIIiiII", 40, wide, high, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head
    if kind == "webp":
        size = (wide - 1) | (high - 1) << 14
        return b"RIFF" + struct.pack("<I", 26) + b"WEBPVP8L" + struct.pack("<IBIIIB", 14, 0x2F, size, 0, 0, 0)
    tags = {256: wide, 257: high, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: high, 279: 8}
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)


@pytest.mark.parametrize("kind", ["bmp", "webp", "tiff"])
def test_a_header_that_claims_more_pixels_than_allowed_is_refused_before_memory_is_taken(
    tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "in"
    image(root / "a" / "0.jpg")
    (root / "a" / f"1.{kind}").write_bytes(huge(kind, 12000, 12000))
    report = brought(root, "folders")
    assert (report.images, report.left_out) == (Counter(train=1), Counter({"more than 100 million pixels": 1}))


def test_the_limit_holds_where_another_one_was_set_for_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypipe.data.importers.picture.MOST_PIXELS", 60 * 40 - 1)
    for kind in ("jpg", "bmp"):
        with pytest.raises(Refused, match=f"more than {MOST_PIXELS // 10**6} million pixels"):
            read_picture(image(tmp_path / f"0.{kind}"))


def test_a_box_without_the_name_of_a_class_has_a_sentence_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "in"
    image(root / "JPEGImages" / "0.jpg"), voc(root, "0")
    path = root / "Annotations" / "0.xml"
    path.write_text(path.read_text().replace("<name>mug</name>", "<name> </name>"))
    report = brought(root, "voc")
    assert report.boxes_left_out == Counter({"a box without the name of a class": 1})


def test_the_bar_goes_on_where_something_is_left_out(tmp_path: Path) -> None:
    root = yolo(tmp_path / "in", {"0": "", "1": "", "2": ""})
    (root / "labels" / "train" / "1.txt").write_bytes(b"\xff\xfe")
    seen: list[int] = []
    report = brought(root, "yolo", see=seen.append)
    assert report.left_out == Counter({"its labels are not text in UTF-8": 1})
    assert seen == [1, 2, 3]

"""Image bytes to pixels, fast and without raising: one broken file must not end a ticket.

Files are checked before they are decoded, since decoders return half an image for a truncated file and complain
on stderr: every chunk of a PNG by its checksum, a JPEG by its chain of segments up to the end marker.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from raypipe.data.dataset import Mask, Pixels
from raypipe.errors import ConfigError

Sizes: TypeAlias = NDArray[np.int64]
Corners: TypeAlias = NDArray[np.float64]
Blob: TypeAlias = Any  # bytes or anything with the buffer protocol; None where a row has no image

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]", re.DOTALL)  # not stuffing, not a restart inside a scan
_END_OF_IMAGE = 0xD9
FILL = 114  # grey, beside a letterboxed image

cv2.setNumThreads(1)  # a store uses its CPU share and no more
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # a line about an image would leave by Ray's logs


def decode_images(
    blobs: Sequence[Blob], *, size: int, channels: int, threads: int = 1, letterbox: bool = False
) -> tuple[Pixels, Mask]:
    """Pixels (n, channels, size, size) and which of them could be decoded; the others are zero.

    Channels are 1 (grey) or 3 (RGB). EXIF orientation is respected; another shape is resized to the square,
    not cropped, or with `letterbox` fitted into it. Threads pay for photographs, not for thumbnails.
    """
    return decode_sized(blobs, size=size, channels=channels, threads=threads, letterbox=letterbox)[:2]


def decode_sized(
    blobs: Sequence[Blob], *, size: int, channels: int, threads: int = 1, letterbox: bool = False
) -> tuple[Pixels, Mask, Sizes]:
    """The same, and each image's own width and height, (n, 2), after EXIF orientation; 0 where it is broken."""
    if channels not in (1, 3):
        raise ConfigError(f"images have 1 or 3 channels, not {channels}")
    pixels = np.zeros((len(blobs), channels, size, size), np.uint8)
    good = np.zeros(len(blobs), np.bool_)
    sizes = np.zeros((len(blobs), 2), np.int64)

    def work(first: int) -> None:
        for i in range(first, len(blobs), threads):
            image = _decode(blobs[i], channels)
            if image is not None:
                square = _letterboxed(image, size) if letterbox else _resize(image, size, size)
                pixels[i] = square.reshape(size, size, channels).transpose(2, 0, 1)
                good[i], sizes[i] = True, image.shape[1::-1]

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return pixels, good, sizes


def is_whole(raw: memoryview) -> bool:
    """Whether these are all the bytes of a PNG or JPEG file; bytes after its end do no harm."""
    if raw[: len(PNG)] == PNG:
        return _is_whole_png(raw)
    return raw[: len(JPEG)] == JPEG and _is_whole_jpeg(raw)


def _decode(blob: Blob, channels: int) -> Pixels | None:
    if blob is None or not is_whole(memoryview(blob).cast("B")):  # Arrow's bytes are signed
        return None
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    try:
        image = cv2.imdecode(np.frombuffer(blob, np.uint8), flag)
    except cv2.error:
        return None
    return None if image is None else np.asarray(image, np.uint8)


def fitted(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """Where an image lies in a square of this size: left, top, width, height; its shape kept, in the middle."""
    scale = size / max(width, height, 1)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    return (size - wide) // 2, (size - high) // 2, wide, high


def unfitted(corners: Corners, width: int, height: int, size: int) -> Corners:
    """Boxes (k, 4) in a square into which an image was `fitted`, in the image's own pixels, cut to it.

    Left, top, right, bottom; one that lies beside the image altogether comes out without a width or a height.
    """
    left, top, wide, high = fitted(width, height, size)
    own = (corners - (left, top, left, top)) * (width / wide, height / high, width / wide, height / high)
    return np.asarray(np.clip(own, 0, (width, height, width, height)), np.float64)


def _letterboxed(image: Pixels, size: int) -> Pixels:
    left, top, wide, high = fitted(image.shape[1], image.shape[0], size)
    square = np.full((size, size, *image.shape[2:]), FILL, np.uint8)
    square[top : top + high, left : left + wide] = _resize(image, wide, high)
    return square


def _resize(image: Pixels, wide: int, high: int) -> Pixels:
    height, width = image.shape[:2]
    if (height, width) == (high, wide):
        return image
    how = cv2.INTER_AREA if height >= high and width >= wide else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (wide, high), interpolation=how), np.uint8)


def _is_whole_png(raw: memoryview) -> bool:
    at = len(PNG)
    while at + 12 <= len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        if zlib.crc32(raw[at + 4 : end - 4]) != int.from_bytes(raw[end - 4 : end], "big"):
            return False
        if raw[at + 4 : at + 8].tobytes() == b"IEND":
            return True
        at = end
    return False


def _is_whole_jpeg(raw: memoryview) -> bool:
    # Segments are stepped over by their length, so that the end marker of an EXIF thumbnail does not count.
    at = len(JPEG)
    while found := _MARKER.search(raw, at):
        if raw[found.end() - 1] == _END_OF_IMAGE:
            return True
        at = found.end() + int.from_bytes(raw[found.end() : found.end() + 2], "big")
    return False

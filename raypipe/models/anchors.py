"""Anchors fitted to boxes: k-means whose distance is 1 - overlap, so that small boxes count as much as large ones.

Redmon & Farhadi 2016, arXiv:1612.08242. They are fitted where boxes lie, by `raypipe anchors`, and whoever writes the
configuration says them there, as `model.anchors`; no run fits them by itself, and a store never changes them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from raypipe.errors import ConfigError

Sizes: TypeAlias = "np.ndarray[Any, np.dtype[np.floating[Any]]]"  # (n, 2): width and height
MOST = 200  # turns; it settles in far fewer


def fit_anchors(sizes: Sizes, *, num: int = 9) -> list[tuple[float, float]]:
    """So many (width, height), the small ones first, for boxes (n, 2) in pixels of the image size that is trained at.

    Equal boxes give equal anchors. Raises ConfigError where there are fewer than `num` boxes of a positive size.
    """
    boxes = np.asarray(sizes, np.float64)
    boxes = boxes[np.isfinite(boxes).all(1) & (boxes > 0).all(1)]
    if len(boxes) < num:
        raise ConfigError(f"{num} anchors need at least {num} boxes, found {len(boxes)}")
    order = np.lexsort((boxes[:, 0], boxes.prod(1)))
    anchors = boxes[order[np.linspace(0, len(boxes) - 1, 2 * num + 1)[1::2].astype(int)]]
    mine = np.full(len(boxes), -1)
    for _ in range(MOST):
        nearest = overlaps(boxes, anchors).argmax(1)
        if (nearest == mine).all():
            break
        mine = nearest
        anchors = np.array([np.median(boxes[mine == k], 0) if (mine == k).any() else anchors[k] for k in range(num)])
    return [(float(w), float(h)) for w, h in anchors[np.argsort(anchors.prod(1), kind="stable")].round(1)]


def overlaps(boxes: Sizes, anchors: Sizes) -> Sizes:
    """Intersection over union (n, k) of boxes and anchors with one corner in common."""
    inside = np.minimum(boxes[:, None], anchors[None]).prod(2)
    return np.asarray(inside / (boxes.prod(1)[:, None] + anchors.prod(1)[None] - inside))


def matching(sizes: Sizes, anchors: list[tuple[float, float]], *, match_ratio: float = 4.0) -> float:
    """Share of boxes that some anchor matches: no other box can be learned."""
    ratio = np.asarray(sizes)[:, None] / np.asarray(anchors)[None]
    return float((np.maximum(ratio, 1 / ratio).max(2).min(1) < match_ratio).mean())

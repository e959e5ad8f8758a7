"""How a store's camera sees: brightness, contrast, blur and noise that stay the same for all of its images.

Sample images come from one studio. Real stores have their own light and lens, and a federation must cope with it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np

from raypipe.data.dataset import Pixels

# At strength 1; a camera draws uniformly from the range that its strength leaves.
MAX_BRIGHTNESS = 60.0  # grey levels, either way
MAX_CONTRAST = 0.5  # share, either way
MAX_BLUR = 1.2  # standard deviation, pixels
MAX_NOISE = 24.0  # standard deviation, grey levels


@dataclass(frozen=True, slots=True)
class Camera:
    """Added grey levels, factor around mid-grey, and the standard deviations of blur (pixels) and noise (levels)."""

    brightness: float
    contrast: float
    blur: float
    noise: float


def rng_for(*names: object) -> np.random.Generator:
    """The same chance for the same names, whoever else draws; e.g. of a seed and a store."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def camera_of(store: str, *, strength: float, seed: int) -> Camera:
    """A store's camera, for a strength in [0, 1]; 0 sees what is there. Another store in the list changes nothing."""
    brightness, contrast, blur, noise = rng_for(seed, "camera", store).uniform([-1, -1, 0, 0], 1)
    return Camera(
        brightness=float(strength * brightness * MAX_BRIGHTNESS),
        contrast=float(1 + strength * contrast * MAX_CONTRAST),
        blur=float(strength * blur * MAX_BLUR),
        noise=float(strength * noise * MAX_NOISE),
    )


def shoot(camera: Camera, images: Pixels, rng: np.random.Generator) -> Pixels:
    """Images (N, H, W) or (N, H, W, 3) as this camera sees them; the noise is the rng's."""
    if not images.size:
        return images
    if camera.blur > 0:
        images = np.stack([cv2.GaussianBlur(image, (0, 0), camera.blur) for image in images])
    middle = 127.5
    seen = images.astype(np.float32)
    seen -= middle
    seen *= camera.contrast
    seen += middle + camera.brightness
    if camera.noise > 0:
        seen += camera.noise * rng.standard_normal(images.shape, dtype=np.float32)
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)

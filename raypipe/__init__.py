"""Federated vision training on Ray; each room below has a table of contents of its own."""

import os

MOST_PIXELS = 100_000_000  # of an image that is decoded: 300 MB of memory

# OpenCV reads this once, when it is first imported, hence before every other module: a file of a few bytes may claim
# to be an image of gigabytes. Who sets it for a machine on purpose has their way.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))

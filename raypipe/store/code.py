"""Which code runs: a hash of this package's own source."""

from __future__ import annotations

import hashlib
from pathlib import Path


def code_hash(package: Path | None = None) -> str:
    """sha256 over every .py file of the package, by name: equal for equal code, wherever it lies."""
    digest = hashlib.sha256()
    here = package or Path(__file__).parent.parent
    for file in sorted(here.rglob("*.py")):
        digest.update(str(file.relative_to(here)).encode() + file.read_bytes())
    return digest.hexdigest()

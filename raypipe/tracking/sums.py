"""The sums that stores gave for a head in closed form, kept in the run's folder: a store can be taken out of them.

One safetensors file: a float64 vector a store, as it came (aggregation/closed_form.py), and what makes a head of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import save_file

from raypipe.errors import ConfigError, RunError
from raypipe.models.tensors import Array
from raypipe.security.files import sync_folder
from raypipe.tracking.versions import HEADER, read_file

FILE = "gram.safetensors"


@dataclass(frozen=True, slots=True)
class Head:
    """The layer that the sums are for: its tensors' name, how wide and with how many outputs, and the ridge penalty."""

    name: str
    width: int
    num_outputs: int
    ridge: float


def save_sums(run_dir: Path, sums: Mapping[str, Array], head: Head) -> None:
    """In the place of those that were kept before; on the disk when it returns. Raises RunError."""
    part = run_dir / f"{FILE}.part"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        save_file(dict(sums), part, metadata={HEADER: json.dumps(asdict(head), sort_keys=True)})
        part.chmod(0o600)
        part.rename(run_dir / FILE)
        sync_folder(run_dir)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RunError(f"the stores' sums could not be written: {str(error).splitlines()[0]}") from None


def read_sums(run_dir: Path) -> tuple[dict[str, Array], Head]:
    """By store. Raises ConfigError where none are kept."""
    if not (run_dir / FILE).is_file():
        raise ConfigError(f"run {run_dir.name} keeps no sums of its stores: it did not begin with closed_form")
    sums, head = read_file(run_dir / FILE)
    return sums, Head(**head)


def without(sums: Mapping[str, Array], stores: Iterable[str]) -> dict[str, Array]:
    """Those of the others. Raises ConfigError: a store that gave none, or nobody would be left."""
    unknown = sorted({*stores} - {*sums})
    if unknown:
        raise ConfigError(f"no sums of {', '.join(unknown)} are kept; there are those of {', '.join(sorted(sums))}")
    left = {store: own for store, own in sums.items() if store not in {*stores}}
    if not left:
        raise ConfigError("no store would be left")
    return left

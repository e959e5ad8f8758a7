"""Runs whose head died: which they are, by their journals. raypipe.launch.take_up begins them again."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from raypipe.config.load import to_dict
from raypipe.config.schema import RunConfig
from raypipe.errors import ConfigError, RaypipeError
from raypipe.placement.homes import raypipe_home
from raypipe.tracking.journal import FILE, Journal


def unfinished(home: Path | None = None) -> dict[str, RunConfig | RaypipeError]:
    """Run -> its configuration, or why it cannot be read; by name.

    Only those whose newest coordinator was on a cluster: a run on Ray of its own, on one machine, may be at work, and
    its stores are not the cluster's.
    """
    found: dict[str, RunConfig | RaypipeError] = {}
    for file in sorted(((home or raypipe_home()) / "runs").glob(f"*/{FILE}")):
        run = file.parent.name
        try:
            config = _open(file)
        except RaypipeError as error:
            found[run] = error
        else:
            if config is not None:
                found[run] = config
    return found


def left_of(config: RunConfig, home: Path | None = None) -> str | None:
    """The newest run of just this configuration that was not ended: what a job submitted again goes on with."""
    said = to_dict(config)
    runs = [run for run, own in unfinished(home).items() if isinstance(own, RunConfig) and to_dict(own) == said]
    return max(runs, default=None)  # an id ends with when it began


def _open(file: Path) -> RunConfig | None:
    """The configuration of a run that is to be taken up. Raises RunError, ConfigError."""
    started, journal = None, Journal(file)
    try:
        for record in journal.read(kinds=["run_started", "run_finished"]):
            started = record.body if record.kind == "run_started" else None
    finally:
        journal.close()
    if started is None or not started.get("cluster"):
        return None
    try:
        return RunConfig.model_validate(started["config"])
    except ValidationError as error:
        raise ConfigError(f"its configuration is not one of this raypipe: {error.error_count()} mistake(s)") from None

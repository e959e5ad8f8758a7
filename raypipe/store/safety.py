"""What may leave a store when something goes wrong, and the log on its own disk for the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from raypipe.errors import ConfigError, RaypipeError, StoreClosed, StoreError, StoreRefused, StoreSuperseded
from raypipe.store.messages import Refusal

FILE = "site.log"


class _Log(logging.FileHandler):
    """Says nothing of its own troubles, as on a full disk: what it would print holds the message."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def site_log(home: Path, store: str) -> logging.Logger:
    """The store's own log `<home>/site.log`; nothing of it reaches the process's output, which Ray carries away."""
    log = logging.getLogger(f"raypipe.site.{store}")
    log.propagate = False
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    handler = _Log(home / FILE, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    return log


def safe_reason(error: BaseException, method: str = "the store") -> str:
    """One line that may leave the store: our own errors' text, of any other only its type."""
    if isinstance(error, (StoreError, ConfigError)):
        return "; ".join(error.message.splitlines())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        return f"out of memory in {method}; lower batch_size, or take a smaller model"
    return f"unexpected {type(error).__name__} in {method}; the store's own log has it"


def refusal(error: BaseException, store: str, method: str, log: logging.Logger, ticket_id: str = "") -> Refusal:
    """An exception as a message; what may not leave the store goes to its own log."""
    if not isinstance(error, RaypipeError):
        log.error("%s %s", method, ticket_id, exc_info=error)
    kind: Literal["refused", "failed", "superseded"] = "failed"
    if isinstance(error, StoreSuperseded):
        kind = "superseded"
    elif isinstance(error, (StoreRefused, ConfigError)):
        kind = "refused"
    wait_s = error.wait_s if isinstance(error, StoreClosed) else 0.0
    return Refusal(store, kind, safe_reason(error, method), ticket_id, wait_s)

"""The actor's side of a vault: a Site's methods, each carried over the socket. It holds nothing of the store.

A call that is cut is made again over a new connection, for as long as a vault needs to be started again: a ticket
sent twice joins the work that goes on, or gets the report that waits.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, TypeVar

import numpy as np

from raypipe.errors import StoreError, StoreUnreachable
from raypipe.ledger.keys import digest
from raypipe.store import messages as msg
from raypipe.vault.frames import Channel, Cut
from raypipe.vault.memory import STALL_S, mapped, pour
from raypipe.vault.transfer import Incoming, Piece, pieces

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Body: TypeAlias = dict[str, Any]
M = TypeVar("M", msg.Card, msg.Report, msg.Evaluation)
T = TypeVar("T")

PATIENCE_S = 20.0  # in which a vault that was started again answers
RETRY_S = 0.2
HELLO_S = 10.0
PING_S = 4.0


class Line:
    """One connection, made when it is needed and again when it was cut."""

    def __init__(self, path: Path, store: str, *, pipe: bool, speaks: tuple[int, ...]) -> None:
        self._path, self._store, self._pipe, self._speaks = path, store, pipe, speaks
        self.channel: Channel | None = None
        self.protocol = msg.PROTOCOL
        self.code = ""
        self.bytes_sent = 0  # over earlier connections
        self.writer = -1
        self.update: Array | None = None  # the mapped memory of the way out
        self.guard = Lock()

    def connect(self) -> Channel:
        """Raises Cut, OSError, StoreError."""
        if self.channel is not None:
            return self.channel
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        channel = Channel(sock, takes_files=True)
        try:
            _connect(sock, self._path)
            hello = {"verb": "hello", "store": self._store, "speaks": list(self._speaks), "pipe": self._pipe}
            channel.send(hello)
            answer = channel.receive(HELLO_S)
            if "error" in answer:
                raise StoreError(str(answer["error"]))
            self.protocol, self.code = int(answer["speaks"]), str(answer["code"])
            self.writer = channel.files.pop(0) if answer["pipe"] and channel.files else -1
        except BaseException:
            channel.close()
            raise
        self.channel = channel
        return channel

    def drop(self) -> None:
        if self.channel is not None:
            self.bytes_sent += self.channel.bytes_sent
            self.channel.close()
        if self.writer >= 0:
            os.close(self.writer)
        self.channel, self.writer, self.update = None, -1, None


class VaultSite:
    """A Site's methods. `speaks`: the protocols that this side knows; `pipe` False: vectors travel in pieces."""

    def __init__(
        self,
        path: Path,
        store: str,
        *,
        node: str = "",
        pipe: bool = True,
        speaks: tuple[int, ...] = msg.SPOKEN,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.store, self._path, self._node, self._patience_s = store, path, node, patience_s
        self.rate: float | None = None  # of what leaves, in bytes a second, by the store's policy
        self._work = Line(path, store, pipe=pipe, speaks=speaks)
        self._aside = Line(path, store, pipe=False, speaks=speaks)

    @property
    def code(self) -> str:
        """The hash of the code that the vault says it runs."""
        return self._work.code

    @property
    def bytes_sent(self) -> int:
        """To the vault's socket, whatever was sent twice counted twice."""
        channel = self._work.channel
        return self._work.bytes_sent + (channel.bytes_sent if channel else 0)

    def close(self) -> None:
        self._work.drop()
        self._aside.drop()

    def describe(self, run: str = "", epoch: int = 0) -> msg.Card:
        """The process is the actor's: it is the one that a coordinator may end. An older vault's card has no `code`."""
        card = self._asked(msg.Card, {"verb": "describe", "run": run, "epoch": epoch})
        self.rate = card.limits.get("max_upload_bytes_s")
        return replace(card, process=os.getpid(), node=self._node, code=card.code or self.code)

    def train(self, ticket: msg.Ticket, plan: msg.Plan, weights: Array, correction: Array | None = None) -> msg.Report:
        """A correction goes behind the weights; a vault of older code refuses what is so long."""
        more = {} if correction is None else {"corrected": int(correction.size)}
        whole = weights if correction is None else np.concatenate([weights, correction])

        def ask(line: Line) -> Body:
            said = {"ticket": msg.encode(ticket, line.protocol), "plan": msg.encode(plan, line.protocol), **more}
            return _with_weights(line, {"verb": "train", **said}, whole)

        return _expected(msg.Report, self._call(self._work, ask))

    def evaluate(self, plan: msg.Plan, weights: Array, split: str, epoch: int = 0) -> msg.Evaluation:
        def ask(line: Line) -> Body:
            said = {"plan": msg.encode(plan, line.protocol), "split": split, "epoch": epoch}
            return _with_weights(line, {"verb": "evaluate", **said}, weights)

        return _expected(msg.Evaluation, self._call(self._work, ask))

    def measure(
        self, plan: msg.Plan, weights: Array | None, what: str, epoch: int = 0, known: Array | None = None
    ) -> Array:
        """As `collect`: read-only, until the next."""
        more = {} if known is None else {"known": np.ascontiguousarray(known, "<f4").tobytes()}

        def ask(line: Line) -> Body:
            said = {"verb": "measure", "plan": msg.encode(plan, line.protocol), "what": what, "epoch": epoch, **more}
            return _exchange(line, said) if weights is None else _with_weights(line, said, weights)

        fetched = _Fetched()
        return self._call(self._work, lambda line: _collected(line, ask, fetched))

    def collect(self, ticket_id: str, how: list[msg.Part], run: str = "", epoch: int = 0) -> Array:
        """Read-only, in memory that the next `collect` writes to."""
        body = {"verb": "collect", "ticket": ticket_id, "how": how, "run": run, "epoch": epoch}
        fetched = _Fetched()
        return self._call(self._work, lambda line: _collected(line, lambda line: _exchange(line, body), fetched))

    def settle(self, verdict: msg.Verdict) -> None:
        def ask(line: Line) -> Body:
            return _exchange(line, {"verb": "settle", "verdict": msg.encode(verdict, line.protocol)})

        _raised(self._call(self._work, ask))

    def control(self, ticket_id: str, command: msg.Command, run: str = "", epoch: int = 0) -> None:
        body = {"verb": "control", "ticket": ticket_id, "command": command, "run": run, "epoch": epoch}
        _raised(self._call(self._aside, lambda line: _exchange(line, body)))

    def ping(self) -> bool | str:
        """Whether the vault answers, in seconds; why it pauses, where it does."""
        try:
            with self._aside.guard:
                try:
                    self._aside.connect().send({"verb": "ping"})
                    answer = self._aside.connect().receive(PING_S).get("answer")
                    return answer if isinstance(answer, str) else answer is True
                except (OSError, StoreError):
                    self._aside.drop()
                    raise
        except (OSError, StoreError):
            return False

    def _asked(self, kind: type[M], body: Body) -> M:
        return _expected(kind, self._call(self._work, lambda line: _exchange(line, body)))

    def _call(self, line: Line, ask: Callable[[Line], T]) -> T:
        """Raises StoreError what the vault says; StoreUnreachable when it does not answer."""
        until = time.monotonic() + self._patience_s
        with line.guard:
            while True:
                try:
                    line.connect()
                    return ask(line)
                except StoreError:
                    raise
                except OSError as error:  # Cut and TimeoutError are such
                    line.drop()
                    if isinstance(error, PermissionError) or time.monotonic() > until:
                        hint = f"on its machine: raypipe vault status {self.store}"
                        raise StoreUnreachable(
                            f"its vault does not answer ({error.strerror or error}); {hint}"
                        ) from None
                time.sleep(RETRY_S)


def _connect(sock: socket.socket, path: Path) -> None:
    """Raises OSError."""
    until = time.monotonic() + HELLO_S
    while True:
        try:
            sock.settimeout(HELLO_S)
            return sock.connect(str(path))
        except BlockingIOError:  # many connect at once
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def _exchange(line: Line, body: Body) -> Body:
    channel = line.connect()
    channel.send(body)
    return channel.receive(None)


def _with_weights(line: Line, body: Body, weights: Array) -> Body:
    raw = np.ascontiguousarray(weights, "<f4").reshape(-1).view(np.uint8)
    channel = line.connect()
    if line.writer < 0:
        name = _handed(line, raw)
        return _exchange(line, {**body, "digest": name})
    channel.send({**body, "num_bytes": raw.size})
    answer = channel.receive(None)
    if "go" not in answer:
        return answer
    if answer["go"] is True:
        pour(line.writer, raw)
    return channel.receive(None)


def _handed(line: Line, raw: Array) -> str:
    """The name under which the vault has the vector, all of it."""
    name, channel = digest(raw), line.connect()
    have = int(_raised(_exchange(line, {"verb": "announce", "digest": name, "num_bytes": raw.size})))
    if have == raw.size:
        return name
    for piece in pieces(raw, have):
        channel.send({"verb": "piece", "digest": name, "at": piece.at, "data": piece.data, "check": piece.check})
    _raised(channel.receive(None))
    return name


class _Fetched:
    """An update on its way here in pieces; what has come stays when the line is cut."""

    def __init__(self) -> None:
        self.about: Body | None = None
        self.coming = Incoming("", 0)


def _collected(line: Line, ask: Callable[[Line], Body], fetched: _Fetched) -> Array:
    if fetched.about is not None:
        return _pulled(line, fetched)
    about = _raised(ask(line))
    num_bytes, dtype = int(about["num_bytes"]), np.dtype(about["dtype"])
    if "digest" in about:
        fetched.about, fetched.coming = about, Incoming(about["digest"], num_bytes)
        return _pulled(line, fetched)
    if about["new"]:
        files = line.connect().files
        if not files:
            raise Cut("no memory came")
        file = files.pop(0)
        try:
            line.update = mapped(file, num_bytes)
        finally:
            os.close(file)
    if line.update is None or line.update.size != num_bytes:
        raise StoreError("the vault handed over an update without its memory")
    return line.update.view(dtype)


def _pulled(line: Line, fetched: _Fetched) -> Array:
    assert fetched.about is not None
    coming, channel = fetched.coming, line.connect()
    channel.send({"verb": "pull", "digest": coming.announced, "at": coming.have})
    while not coming.whole():
        piece = channel.receive(STALL_S)
        if "refusal" in piece:
            fetched.about = None
            raise Cut("the vault was started again meanwhile")
        coming.take(Piece(int(piece["at"]), bytes(piece["data"]), bytes(piece["check"])))
    return coming.data.view(np.dtype(fetched.about["dtype"]))


def _raised(answer: Body) -> Any:
    """The answer, or what a Refusal in its place stands for."""
    if "refusal" in answer:
        raise msg.refusal_error(msg.expect(msg.Refusal, answer["refusal"]), named=False)
    return answer["answer"]


def _expected(kind: type[M], answer: Body) -> M:
    return msg.expect(kind, _raised(answer))

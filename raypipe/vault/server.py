"""The vault's gate: who may connect, and a thread for each who does. What may be said is in conversation.py.

Who connects is known by the kernel's word (SO_PEERCRED), not by what it says: the actor's user and no other.
"""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from raypipe.errors import StoreError
from raypipe.vault.conversation import Conversation, Vault
from raypipe.vault.frames import Cut, peer_user

MAX_CONNECTIONS = 16  # above it one is closed: who has not said hello, then who has been silent longest
LOOK_S = 0.5


class Gate:
    """`serve` until `stop`."""

    def __init__(self, vault: Vault, actor_user: int) -> None:
        self._vault, self._actor_user = vault, actor_user
        self._open: set[Conversation] = set()
        self._guard = threading.Lock()
        self._stop = threading.Event()

    def serve(self, path: Path) -> None:
        """Listen at a unix socket; the vault's work is done in this thread. Raises OSError."""
        quiet = path.with_suffix(".new")
        quiet.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(str(quiet))
            quiet.chmod(0o666)  # the kernel tells who connects
            listener.listen(4 * MAX_CONNECTIONS)
            quiet.rename(path)  # who sees it can connect
            threading.Thread(target=self._accept, args=(listener,), name="gate", daemon=True).start()
            while not self._stop.is_set():
                self._vault.jobs.work(LOOK_S)
            path.unlink(missing_ok=True)
            listener.shutdown(socket.SHUT_RDWR)
            with self._guard:
                for conversation in self._open:
                    conversation.channel.shut()

    def stop(self) -> None:
        self._stop.set()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stop.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                time.sleep(0.1)  # no descriptors left: some conversation will end
                continue
            process, user = peer_user(sock)
            if user != self._actor_user:
                self._vault.log.warning("process %d of user %d was turned away", process, user)
                sock.close()
                continue
            self._admit(Conversation(self._vault, sock))

    def _admit(self, conversation: Conversation) -> None:
        with self._guard:
            self._open.add(conversation)
            if len(self._open) > MAX_CONNECTIONS:
                min(self._open, key=lambda each: (each.greeted, each.busy, each.heard)).channel.shut()
        threading.Thread(target=self._converse, args=(conversation,), name="actor", daemon=True).start()

    def _converse(self, conversation: Conversation) -> None:
        log = self._vault.log
        try:
            conversation.run()
        except (Cut, TimeoutError):
            log.debug("a connection ended")
        except StoreError as error:
            log.warning("a connection was closed: %s", error.message)
        except Exception:
            log.exception("a connection was closed")
        finally:
            with self._guard:
                self._open.discard(conversation)
            conversation.close()

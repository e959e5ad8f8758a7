"""Processes of other users, by number, for tests that are root: no user is added to the machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from conftest import ROOT

VAULT_USER, ACTOR_USER, STRANGER = 64101, 64102, 64103
CAN = os.geteuid() == 0 and all(map(shutil.which, ("unshare", "setpriv")))
WHY = "needs root, unshare and setpriv: processes of other users"

# A Python that lies in a home folder closed to others is shown to them all the same, in a mount namespace of their own.
SHOW = """
keep=$(mktemp -d) && for place in $PLACES; do mkdir -p "$keep$place" && mount --bind "$place" "$keep$place"; done
for closed in $CLOSED; do mount -t tmpfs -o mode=755 none "$closed"; done
for place in $PLACES; do mkdir -p "$place" && mount --bind "$keep$place" "$place"; done
exec "$@"
"""


def beside(command: list[str], user: int | None) -> list[str]:
    """The command as one that runs as this user (None: root) and sees Python and this repository."""
    needed = {Path(sys.base_prefix).resolve(), ROOT, Path(sys.prefix)}
    closed = {above for place in needed for above in place.parents if not above.stat().st_mode & 0o001}
    first = sorted(path for path in closed if not closed & set(path.parents))
    hidden = sorted(place for place in needed if set(place.parents) & set(first))
    become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user is not None else []
    if not first:
        return [*become, *command]
    places = {"PLACES": " ".join(map(str, hidden)), "CLOSED": " ".join(map(str, first))}
    words = [f"{key}={value}" for key, value in places.items()]
    return ["env", *words, "unshare", "--mount", "sh", "-c", SHOW, "sh", *become, *command]

"""Make a vault's folders: its code a copy that only root can change, its home the vault's user's alone.

Files are left for both ways to start it: a systemd unit, and a script that any supervisor can call.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import yaml

from raypipe.errors import ConfigError
from raypipe.ledger.keys import load_or_make_key
from raypipe.store.policy import FILE, read_policy
from raypipe.vault.place import Place, Settings
from raypipe.vault.process import environment

BOOT = '''"""Starts the vault from the code beside this file, whatever else the interpreter has installed."""
import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
from raypipe.errors import ConfigError
from raypipe.vault.process import main
try:
    sys.exit(main(Path(sys.argv[1])))
except ConfigError as error:
    print(f"vault: {error.message}", file=sys.stderr)
    sys.exit(2)
'''

SCRIPT = """#!/bin/sh
# Starts the vault of store {store} in the foreground, as root or as user {user}; end it with SIGTERM.
cd {folder} && exec env -i {environment} {python} -I -B {code}/vault.py {folder}
"""

UNIT = """# cp {folder}/{name} /etc/systemd/system/ && systemctl enable --now {name}
[Unit]
Description=raypipe vault of store {store}

[Service]
ExecStart={python} -I -B {code}/vault.py {folder}
User={user}
Group={user}
WorkingDirectory={folder}
Environment={environment}
Restart=always
RestartSec=1
NoNewPrivileges=yes
CapabilityBoundingSet=
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ProtectProc=invisible
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes
ReadWritePaths={home} {gate}
UMask=0077
LimitCORE=0
{memory}
[Install]
WantedBy=multi-user.target
"""


def install(place: Place, settings: Settings, source: Path | None) -> None:
    """Make it, or renew the code and the settings of one that is there; its home is only added to.

    `source`: a folder with a policy.yaml and its data, copied in where the vault has none. Raises ConfigError.
    """
    if os.geteuid() != 0 and settings.user != os.geteuid():
        raise ConfigError("raypipe vault install has to be root: the vault's folder is to be another user's")
    if place.home.exists() and place.home.stat().st_uid != settings.user:
        raise ConfigError(f"{place.home} is there and not user {settings.user}'s: a vault does not change its user")
    try:
        _made(place, settings, source)
    except OSError as error:
        raise ConfigError(f"{error.filename or place.folder}: {error.strerror}") from None
    if (place.home / FILE).exists() and (named := read_policy(place.home).store) != place.store:
        raise ConfigError(f"{place.home / FILE} is of store {named!r}, not of {place.store!r}")


def _made(place: Place, settings: Settings, source: Path | None) -> None:
    for folder in (place.folder.parent, place.folder):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    _renew_code(place.code)
    said = settings.model_dump(mode="json", exclude_unset=True)
    _write(place.settings, yaml.safe_dump(said, sort_keys=False), 0o644)
    for folder in (place.home, place.gate):
        folder.mkdir(mode=0o700, exist_ok=True)
    if source is not None and not (place.home / FILE).exists():
        without = shutil.ignore_patterns("state", "heads", "egress", "keys", "site.log")  # a key others knew is none
        # Links stay links: who owns the source must not choose what root reads.
        shutil.copytree(source, place.home, symlinks=True, dirs_exist_ok=True, ignore=without)
    load_or_make_key(key_file(place))
    _hand_over(place.home, settings.user, 0o700)
    _hand_over(place.gate, settings.user, 0o755)
    words = {"store": place.store, "user": settings.user, "python": sys.executable, "code": place.code}
    words |= {
        "folder": place.folder,
        "home": place.home,
        "gate": place.gate,
        "name": f"raypipe-vault-{place.store}.service",
    }
    words["environment"] = " ".join(f"{key}={value}" for key, value in environment().items())
    words["memory"] = "" if settings.memory_gb is None else f"MemoryMax={int(settings.memory_gb * 2**30)}\n"
    _write(place.folder / "start.sh", SCRIPT.format(**words), 0o755)
    _write(place.folder / str(words["name"]), UNIT.format(**words), 0o644)


def key_file(place: Place) -> Path:
    """The private key that the vault signs its updates with."""
    return place.home / "keys" / "store.pem"


def _renew_code(code: Path) -> None:
    """A copy of the package that runs now, without what it does not need; a vault that runs keeps what it has read."""
    fresh = code.with_name("code.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o755)
    package = Path(__file__).resolve().parent.parent
    shutil.copytree(package, fresh / "raypipe", ignore=shutil.ignore_patterns("__pycache__", "fashion_mnist"))
    _write(fresh / "vault.py", BOOT, 0o644)
    for path in fresh.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.chown(path, os.geteuid(), os.getegid())
    shutil.rmtree(code, ignore_errors=True)
    fresh.rename(code)


def _hand_over(folder: Path, user: int, mode: int) -> None:
    """To its user, all of it; what it holds is nobody else's to read."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, user, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(mode if path == folder else 0o700 if path.is_dir() else 0o600)


def _write(path: Path, text: str, mode: int) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.chmod(mode)
    part.rename(path)

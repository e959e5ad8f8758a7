"""What of a model stays at its store: norm layers, where stores' images look different (FedBN, Li et al. 2021,
arXiv:2102.07623), or other parts by name, as the head (FedPer, Arivazhagan et al. 2019, arXiv:1912.00818).

A store's model is a version with the store's own local entries in their place. It trains them with the rest, keeps
what they came to once its update is in a version (store/kept.py), and trains and judges with them from then on. The
version's own local entries stay as the run began: that is what a store has before its first update is in a version,
and all that there is of them in what is exported. The best version at a store is judged with the store's newest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from raypipe.errors import ConfigError
from raypipe.types import Role

Local: TypeAlias = str | Sequence[str] | None  # "norms", or patterns of tensors' names
Row: TypeAlias = tuple[str, tuple[int, ...], str, Role]  # name, shape, dtype, role

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def with_local(module: nn.Module, rows: Sequence[Row], local: Local) -> list[Row]:
    """The tensors of a layout with those that stay at their store as `Role.LOCAL`; only what trains can.

    Raises ConfigError: none would stay, a pattern fits nothing, or nothing would be left to train together.
    """
    if local is None:
        return list(rows)
    able = [name for name, _, dtype, role in rows if role in (Role.SHARED, Role.STATISTIC) and dtype == "float32"]
    patterns = [local] if isinstance(local, str) else list(local)
    if local == "norms":
        patterns = [f"{name}.*" if name else "*" for name, part in module.named_modules() if isinstance(part, NORMS)]
    stays = {name for name in able if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for pattern in [] if local == "norms" else patterns:
        if not any(fnmatchcase(name, pattern) for name in able):
            shown = ", ".join(sorted({name.split(".")[0] for name in able}))
            raise ConfigError(f"train.local: no name of a tensor that trains fits {pattern!r}; they begin with {shown}")
    if not stays:
        raise ConfigError("train.local: norms: this model has no norm layers that train; leave it out or name others")
    if not any(role is Role.SHARED and name not in stays for name, _, _, role in rows):
        raise ConfigError("train.local: nothing would be left to train together; name less")
    return [(name, shape, dtype, Role.LOCAL if name in stays else role) for name, shape, dtype, role in rows]

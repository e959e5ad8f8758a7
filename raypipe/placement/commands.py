"""`raypipe cluster render`: the files for `ray up` and KubeRay from a list of stores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from raypipe.errors import ConfigError
from raypipe.placement.settings import Settings

Parsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
FLAGS = {
    "name": "the cluster's name",
    "head": "the head's host",
    "user": "ssh user on all machines",
    "key": "ssh private key of that user",
    "venv": "where raypipe is installed on all machines",
    "image": "container image made of cluster/Dockerfile",
    "aws_region": "for aws.yaml",
    "operator_namespace": "of KubeRay's operator, for rayjob.yaml",
}


def add_parsers(subparsers: Parsers) -> None:
    """The verb `cluster`."""
    help = "write what `ray up` and Kubernetes need from a list of stores"
    cluster = subparsers.add_parser("cluster", help=help, description=help, allow_abbrev=False)
    verbs = cluster.add_subparsers(required=True, metavar="VERB")
    sub = verbs.add_parser("render", help=help, description=help, allow_abbrev=False)
    sub.set_defaults(run=lambda options, *_: cluster_render(options))
    sub.add_argument("stores", type=Path, metavar="STORES.csv", help="id,host,gpus,region,hours")
    sub.add_argument("--out", type=Path, default=Path("cluster"), help="default: cluster")
    usual = Settings()
    for name, help in FLAGS.items():
        default = getattr(usual, name)
        flag = f"--{name.replace('_', '-')}"
        sub.add_argument(flag, dest=name, default=default, help=f"{help}; default: {default}")
    sub.add_argument("--idle-minutes", type=float, default=usual.idle_minutes, help="then a store's node is released")


def cluster_render(options: argparse.Namespace) -> int:
    """Files that are there are replaced: they are this command's own."""
    from raypipe.placement.inventory import read_machines
    from raypipe.placement.render import render

    settings = Settings(**{name: getattr(options, name) for name in (*FLAGS, "idle_minutes")})
    machines = read_machines(options.stores, settings.head)
    for name, text in render(machines, settings).items():
        path = options.out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
        print(f"{path}: {len(machines)} stores")
    return 0

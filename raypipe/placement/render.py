"""`stores.csv` rendered for `ray up` on the stores' own machines, `ray up` in a cloud, and KubeRay.

In all three a store is a node type (a worker group) of its own that offers `store:<id>` 1, at least none of it and at
most one: its node starts when the federation wants the store, and stops when it is idle. Every file has token
authentication and TLS on, and leaves the jobs and dashboard port on the head's loopback, but for KubeRay's RayJob.

The plan is plain data, made without Ray; the files in `cluster/` are this file's output for `cluster/stores.csv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from raypipe.errors import ConfigError
from raypipe.placement.inventory import HEAD, Machine
from raypipe.placement.kuberay import CLUSTER_HEADER, JOB_HEADER, cluster_objects, job_objects
from raypipe.placement.offers import environment, node_types
from raypipe.placement.settings import Settings

# Fixed, so that a firewall can name them; `raypipe doctor` tries each from every node to every other.
NODE_PORTS = {
    "node-manager-port": 6380,
    "object-manager-port": 6381,
    "runtime-env-agent-port": 6382,
    "dashboard-agent-grpc-port": 6383,
    "dashboard-agent-listen-port": 6384,
    "metrics-export-port": 6385,
    "min-worker-port": 10010,
    "max-worker-port": 10999,
}
HEAD_PORTS = {"port": 6379, "ray-client-server-port": 10001, "dashboard-port": 8265}
LOOK_S = 2  # how often the autoscaler looks; four looks lie between a store that is wanted and its node
# A machine's own address is the one by which ssh came, so that a name in `stores.csv` will do.
SSH_CAME_TO = "$(echo $SSH_CONNECTION | cut -d' ' -f3)"


def start_command(settings: Settings, *, head: bool, address: str | None) -> str:
    """One line for a machine's shell. It ends nothing: a machine may run other Rays.

    A bash that finds SSH_CLIENT reads ~/.bashrc. Each of Ray's workers begins as one, and would put what that file
    has for a PATH (conda, pyenv) before ours.
    """
    exports = " ".join(f"{key}={value}" for key, value in environment(settings).items())
    often = f"AUTOSCALER_UPDATE_INTERVAL_S={LOOK_S} " if head else ""
    ports = {**(HEAD_PORTS if head else {}), **NODE_PORTS}
    flags = [f"--{key}={value}" for key, value in ports.items()] + ["--disable-usage-stats"]
    if address:
        flags.append(f"--node-ip-address={address}")
    if head:
        flags += ["--head", "--num-cpus=0", "--dashboard-host=127.0.0.1"]
        flags.append("--autoscaling-config=~/ray_bootstrap_config.yaml")
    else:
        flags.append("--address=$RAY_HEAD_IP:6379")
    before = f"ulimit -n 65536 2>/dev/null; unset SSH_CLIENT SSH2_CLIENT; export {often}{exports}"
    return f"{before}; ray start {' '.join(flags)}"


def stores_config(machines: Sequence[Machine], settings: Settings) -> dict[str, Any]:
    """The stores' own machines, over ssh."""
    types = node_types(machines)
    for machine in machines:
        said = {"store": machine.store, "host": machine.host, "hours": machine.hours, "wake": machine.wake}
        types[machine.store]["node_config"] = {key: value for key, value in said.items() if value}
    types[HEAD] = {"node_config": {"host": settings.head}, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0}
    head = settings.head if settings.head.replace(".", "").isdigit() else SSH_CAME_TO
    return {
        "cluster_name": settings.name,
        "max_workers": len(machines),
        "idle_timeout_minutes": settings.idle_minutes,
        "provider": {
            "type": "external",
            "module": "raypipe.placement.provider.StoreProvider",
            "head_host": settings.head,
        },
        "auth": {"ssh_user": settings.user, "ssh_private_key": settings.key},
        "head_node_type": HEAD,
        "available_node_types": types,
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [start_command(settings, head=True, address=head)],
        "worker_start_ray_commands": [start_command(settings, head=False, address=SSH_CAME_TO)],
    }


MANY_GPUS = {0: "m7i.xlarge", 1: "g6.xlarge", 4: "g6.12xlarge", 8: "g6.48xlarge"}
CA_TO_NODE = "raypipe certs node --folder ~/.raypipe/ca --out ~/.raypipe/tls"


def aws_config(machines: Sequence[Machine], settings: Settings) -> dict[str, Any]:
    """Machines that are made when they are wanted, spot ones; `host` is not used.

    A store's data stays its own by its instance profile, `raypipe-<store>`: only that may read the store's bucket.
    """
    types = node_types(machines)
    for machine in machines:
        size = next((kind for gpus, kind in sorted(MANY_GPUS.items()) if gpus >= machine.gpus), None)
        if size is None:
            raise ConfigError(
                f"store {machine.store}: no AWS machine has {machine.gpus} GPUs; at most {max(MANY_GPUS)}"
            )
        types[machine.store]["resources"]["CPU"] = min(machine.cpus, 4)
        types[machine.store]["node_config"] = {
            "InstanceType": size,
            "IamInstanceProfile": {"Name": f"raypipe-{machine.store}"},
            "InstanceMarketOptions": {"MarketType": "spot"},
            "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 100, "Encrypted": True}}],
        }
    head = {"InstanceType": "m7i.xlarge", "IamInstanceProfile": {"Name": "raypipe-head"}}
    types[HEAD] = {"node_config": head, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0}
    return stores_config([], settings) | {
        "max_workers": len(machines),
        "provider": {
            "type": "aws",
            "region": settings.aws_region,
            "use_internal_ips": True,  # nothing has a public address; `ray up` comes by VPN or ssh_proxy_command
            "cache_stopped_nodes": False,
            "security_group": {"GroupName": settings.name},  # Ray makes it: all among its nodes, ssh from outside
        },
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": settings.image,
            "container_name": "raypipe",
            "run_options": ["--ulimit nofile=65536:65536", "--network host"],
        },
        "available_node_types": types,
        "file_mounts": {"~/.raypipe/ca": "~/.raypipe/certs"},
        "head_setup_commands": [CA_TO_NODE],  # it keeps the CA, to send it on
        "worker_setup_commands": [f"{CA_TO_NODE} && rm -rf ~/.raypipe/ca"],
        "head_start_ray_commands": [start_command(settings, head=True, address=None)],
        "worker_start_ray_commands": [start_command(settings, head=False, address=None)],
    }


HEADERS = {
    "stores.yaml": """\
# The stores' own machines over ssh: each store's node starts when the federation wants the store, stops when idle.
#   raypipe certs make STORES.csv --head HEAD && raypipe certs send STORES.csv --head HEAD
#   ray up cluster/stores.yaml        (here, with raypipe installed: the node provider is part of it)
#   ray down cluster/stores.yaml
# Jobs and dashboard listen on the head's loopback alone: `ray dashboard cluster/stores.yaml` is a tunnel by ssh.
# A store whose machine shall be in the cluster all the time runs cluster/store-node instead, and is not listed here.
""",
    "aws.yaml": """\
# Machines in AWS, spot ones, made when the federation wants a store. Not tried on AWS: its fields are checked.
#   raypipe certs make STORES.csv --head HEAD && ray up cluster/aws.yaml
# Each machine makes its certificate when it starts; a store's then removes the CA's key, the head keeps it.
""",
    "kuberay.yaml": CLUSTER_HEADER,
    "rayjob.yaml": JOB_HEADER,
}


def render(machines: Sequence[Machine], settings: Settings) -> dict[str, str]:
    """File names and texts. Raises ConfigError for a store that one of them cannot have."""
    made = {
        "stores.yaml": [stores_config(machines, settings)],
        "aws.yaml": [aws_config(machines, settings)],
        "kuberay.yaml": cluster_objects(machines, settings),
        "rayjob.yaml": job_objects(machines, settings),
    }
    return {name: HEADERS[name] + _dump(objects) for name, objects in made.items()}


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # C's is missing in some builds
    """Without anchors, which Ray would read but people would not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(objects: Sequence[dict[str, Any]]) -> str:
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)

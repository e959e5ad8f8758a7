"""`stores.csv` rendered for `ray up` on the stores' own machines, `ray up` in a cloud, and KubeRay.

In all three a store is a node type (a worker group) of its own that offers `store:<id>` 1, at least none of it and at
most one: its node starts when the federation wants the store, and stops when it is idle. Every file has token
authentication and TLS on, and leaves the jobs and dashboard port on the head's loopback.

The plan is plain data, made without Ray; the files in `cluster/` are this file's output for `cluster/stores.csv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from raypipe.config.schema import repeated
from raypipe.errors import ConfigError
from raypipe.placement.inventory import HEAD, Machine
from raypipe.placement.plan import resource
from raypipe.placement.settings import Settings

RAY = "2.58.0"
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
TLS = "~/.raypipe/tls"
# What has not come after so long Ray asks for again, and all of it is sent again, also where it is on its way. Its own
# 10 s are less than a model takes over a thin line.
PULL_S = 600
LOOK_S = 2  # how often the autoscaler looks; four looks lie between a store that is wanted and its node
# A machine's own address is the one by which ssh came, so that a name in `stores.csv` will do.
SSH_CAME_TO = "$(echo $SSH_CONNECTION | cut -d' ' -f3)"


def node_types(machines: Sequence[Machine]) -> dict[str, dict[str, Any]]:
    """Ray's `available_node_types`: what each store's node offers, and how many of it there may be."""
    return {
        machine.store: {
            "min_workers": 0,
            "max_workers": 1,
            "resources": offered(machine),
            "labels": labels(machine),
        }
        for machine in machines
    }


def offered(machine: Machine) -> dict[str, int]:
    """Resources of a store's node."""
    return {"CPU": machine.cpus, "GPU": machine.gpus, resource(machine.store): 1}


def labels(machine: Machine) -> dict[str, str]:
    """What describes a store's node; a label holds no ':', so hours are `2200-0600`."""
    said = {"store": machine.store, "region": machine.region, "hours": machine.hours.split(" ")[0].replace(":", "")}
    return {key: value for key, value in said.items() if value}


def environment(settings: Settings, tls: str = TLS) -> dict[str, str]:
    """What every Ray process of a locked cluster has in its environment. Shell: `~` is expanded."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": f"{tls}/token",
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{tls}/node.crt",
        "RAY_TLS_SERVER_KEY": f"{tls}/node.key",
        "RAY_TLS_CA_CERT": f"{tls}/ca.crt",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_object_manager_pull_timeout_ms": str(PULL_S * 1000),
        "PATH": f"{settings.venv}/bin:$PATH",
    }


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


def kuberay_objects(machines: Sequence[Machine], settings: Settings) -> list[dict[str, Any]]:
    """A RayCluster with a worker group a store, and who may reach it.

    A store's pod runs on the Kubernetes node labelled `raypipe.io/store=<id>` alone, where its data lies. There is no
    RayJob: KubeRay's operator would ask the jobs' port over the pod network in plain HTTP, in each submission mode.
    """
    groups = [_worker_group(machine, settings) for machine in machines]
    if alike := repeated(group["groupName"] for group in groups):
        raise ConfigError(f"stores whose ids differ in '.', '_' and '-' only are one in Kubernetes: {alike[0]}")
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": settings.name},
        "spec": {
            "rayVersion": RAY,
            "authOptions": {"mode": "token"},  # the operator makes the token as a Secret and gives it to all pods
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "idleTimeoutSeconds": round(settings.idle_minutes * 60),
                "env": _env(settings),
                "volumeMounts": [{"name": "tls", "mountPath": "/tls", "readOnly": True}],
            },
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "127.0.0.1"},  # KubeRay's own: 0.0.0.0
                "template": {"spec": _pod("ray-head", settings, cpus=2, gpus=0)},
            },
            "workerGroupSpecs": groups,
        },
    }
    return [cluster, _only_its_own_pods(settings)]


def _only_its_own_pods(settings: Settings) -> dict[str, Any]:
    """Nobody else's pod reaches the cluster's. `kubectl port-forward` and a kubelet's probes are no pod's."""
    own = {"matchLabels": {"ray.io/cluster": settings.name}}  # KubeRay gives it to every pod of a cluster
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": settings.name},
        "spec": {"podSelector": own, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": own}]}]},
    }


def _worker_group(machine: Machine, settings: Settings) -> dict[str, Any]:
    pod = _pod("ray-worker", settings, cpus=machine.cpus, gpus=machine.gpus)
    pod["nodeSelector"] = {"raypipe.io/store": machine.store}
    pod["volumes"].append({"name": "store", "hostPath": {"path": "/var/lib/raypipe/stores", "type": "Directory"}})
    pod["containers"][0]["volumeMounts"].append({"name": "store", "mountPath": "/stores"})
    pod["containers"][0]["env"].append({"name": "RAYPIPE_STORES", "value": "/stores"})
    return {
        "groupName": machine.store.lower().replace("_", "-").replace(".", "-"),
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": 1,
        "rayStartParams": {"resources": f'"{{\\"{resource(machine.store)}\\": 1}}"', "num-cpus": str(machine.cpus)},
        "labels": labels(machine),
        "template": {"spec": pod},
    }


# A Secret's files belong to root, and this user's group may read them: raypipe wants them for itself.
NODE_CERT = (
    "umask 077; mkdir /tmp/ca && cp /ca/* /tmp/ca && chmod 600 /tmp/ca/* && "
    "raypipe certs node --folder /tmp/ca --out /tls --address $POD_IP $FQ_RAY_IP"
)


def _pod(name: str, settings: Settings, *, cpus: int, gpus: int) -> dict[str, Any]:
    """Its first container makes the node's certificate; the CA's key is in no container that runs Ray."""
    size = {"cpu": str(cpus), "memory": f"{4 * max(cpus, 2)}Gi"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    tls = {"name": "tls", "mountPath": "/tls"}
    address = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return {
        "initContainers": [
            {
                "name": "certificate",
                "image": settings.image,
                "command": ["sh", "-c", NODE_CERT],
                "env": [address],
                "volumeMounts": [tls, {"name": "ca", "mountPath": "/ca", "readOnly": True}],
            }
        ],
        "containers": [
            {
                "name": name,
                "image": settings.image,
                "env": _env(settings),
                "resources": {"limits": size, "requests": size},
                "volumeMounts": [tls | {"readOnly": True}],
            }
        ],
        "securityContext": {"fsGroup": 1000},
        "volumes": [
            {"name": "tls", "emptyDir": {"medium": "Memory"}},
            {"name": "ca", "secret": {"secretName": f"{settings.name}-ca", "defaultMode": 0o400}},
        ],
        "restartPolicy": "Never",  # a pod that comes back would be taken for the node that died
    }


def _env(settings: Settings) -> list[dict[str, str]]:
    said = environment(settings, "/tls")
    return [
        {"name": key, "value": value} for key, value in said.items() if key.startswith("RAY_") and "AUTH" not in key
    ]


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
    "kuberay.yaml": """\
# KubeRay 1.5.1 or newer: a worker group a store, none of it running until the federation wants the store.
#   kubectl create secret generic NAME-ca --from-file=ca.key --from-file=ca.crt --from-file=token    (~/.raypipe/certs)
#   kubectl label node NODE raypipe.io/store=ID ...
#   kubectl apply -f cluster/kuberay.yaml
# Jobs and dashboard are on the loopback of the head's pod, where port-forward comes out (through Kubernetes' own TLS):
#   kubectl port-forward service/NAME-head-svc 8265        # for as long as it runs
#   export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl get secret NAME -o jsonpath='{.data.auth_token}' | base64 -d)
#   ray job submit --address http://127.0.0.1:8265 -- raypipe train /opt/raypipe/configs/quickstart.yaml
# The NetworkPolicy needs a network plugin that knows them; without one every pod reaches the cluster's other ports.
""",
}


def render(machines: Sequence[Machine], settings: Settings) -> dict[str, str]:
    """File names and texts. Raises ConfigError for a store that one of them cannot have."""
    made = {
        "stores.yaml": [stores_config(machines, settings)],
        "aws.yaml": [aws_config(machines, settings)],
        "kuberay.yaml": kuberay_objects(machines, settings),
    }
    return {name: HEADERS[name] + _dump(objects) for name, objects in made.items()}


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # C's is missing in some builds
    """Without anchors, which Ray would read but people would not."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _dump(objects: Sequence[dict[str, Any]]) -> str:
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)

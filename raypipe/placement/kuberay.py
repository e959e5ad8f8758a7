"""KubeRay: a cluster that stays (RayCluster), and one that is made for a run (RayJob).

A store's pod runs on the Kubernetes node labelled `raypipe.io/store=<id>` alone, where its data lies.

KubeRay's operator asks after a RayJob's run every three seconds at the dashboard's port of the head's service, in each
submission mode, over plain HTTP, with the token in a header (its dashboard client has no other scheme). So the
RayCluster, which needs no operator at that port, keeps it on the pod's loopback; the RayJob opens it, for the
operator's pods alone. Its job is handed in by a container of the head's own pod (SidecarMode), over loopback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raypipe.config.schema import repeated
from raypipe.errors import ConfigError
from raypipe.placement.inventory import Machine
from raypipe.placement.offers import RAY, environment, labels
from raypipe.placement.plan import resource
from raypipe.placement.settings import Settings

JOBS_PORT = 8265
ENTRYPOINT = "raypipe train /opt/raypipe/configs/quickstart.yaml"
CLUSTER_HEADER = """\
# KubeRay 1.5.1 or newer: a worker group a store, none of it running until the federation wants the store.
#   kubectl create secret generic NAME-ca --from-file=ca.key --from-file=ca.crt --from-file=token    (~/.raypipe/certs)
#   kubectl label node NODE raypipe.io/store=ID ...
#   kubectl apply -f cluster/kuberay.yaml
# Jobs and dashboard are on the loopback of the head's pod, where port-forward comes out (through Kubernetes' own TLS):
#   kubectl port-forward service/NAME-head-svc 8265        # for as long as it runs
#   export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(kubectl get secret NAME -o jsonpath='{.data.auth_token}' | base64 -d)
#   ray job submit --address http://127.0.0.1:8265 -- raypipe train /opt/raypipe/configs/quickstart.yaml
# The NetworkPolicy needs a network plugin that knows them; without one every pod reaches the cluster's other ports.
"""
JOB_HEADER = """\
# KubeRay 1.5.1 or newer, Kubernetes 1.25 or newer: a cluster made for one run, handed in within the head's own pod.
#   the CA's secret and the nodes' labels as in kuberay.yaml; then kubectl apply -f cluster/rayjob.yaml
#   kubectl get rayjob NAME                                # its state; kubectl delete rayjob NAME ends cluster and run
# KubeRay's operator asks after the run every few seconds in plain HTTP, the cluster's token in a header: whoever reads
# the pods' network then has the cluster. Take this file where the network plugin encrypts it (WireGuard, IPsec) and
# keeps NetworkPolicies; everywhere else kuberay.yaml with its port-forward, where the port never leaves the pod.
# The run's record is in the head's pod: copy it (raypipe backup, kubectl cp) before the RayJob is deleted.
"""


def cluster_objects(machines: Sequence[Machine], settings: Settings) -> list[dict[str, Any]]:
    """A RayCluster with a worker group a store, and who may reach it: its own pods alone.

    `kubectl port-forward` and a kubelet's probes are no pod's.
    """
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": settings.name},
        "spec": _cluster_spec(machines, settings, dashboard_host="127.0.0.1"),  # KubeRay's own: 0.0.0.0
    }
    own = {"ray.io/cluster": settings.name}  # KubeRay gives it to every pod of a cluster
    return [cluster, _reached_by(settings.name, own, [{"from": [{"podSelector": {"matchLabels": own}}]}])]


def job_objects(machines: Sequence[Machine], settings: Settings) -> list[dict[str, Any]]:
    """A RayJob with a cluster of its own, and who may reach that: the operator the jobs' port, its own pods the others.

    KubeRay invents the cluster's name, so its pods are known by a label of ours.
    """
    name = f"{settings.name}-run"
    own = {"raypipe.io/run": name}
    spec = _cluster_spec(machines, settings, dashboard_host="0.0.0.0")  # of the pod; its NetworkPolicy is below
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        group["template"] = {"metadata": {"labels": own}, **group["template"]}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "submissionMode": "SidecarMode",
            "entrypoint": ENTRYPOINT,
            "shutdownAfterJobFinishes": False,  # the record is in the head's pod
            "rayClusterSpec": spec,
        },
    }
    operator = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": settings.operator_namespace}},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    but_jobs = [
        {"protocol": "TCP", "port": 1, "endPort": JOBS_PORT - 1},
        {"protocol": "TCP", "port": JOBS_PORT + 1, "endPort": 65535},
    ]
    into = [
        {"from": [{"podSelector": {"matchLabels": own}}], "ports": but_jobs},
        {"from": [operator], "ports": [{"protocol": "TCP", "port": JOBS_PORT}]},
    ]
    return [_reached_by(name, own, into), job]  # the policy first: no moment without it


def _reached_by(name: str, pods: dict[str, str], into: list[dict[str, Any]]) -> dict[str, Any]:
    """All else is kept from the pods."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": pods}, "policyTypes": ["Ingress"], "ingress": into},
    }


def _cluster_spec(machines: Sequence[Machine], settings: Settings, *, dashboard_host: str) -> dict[str, Any]:
    groups = [_worker_group(machine, settings) for machine in machines]
    if alike := repeated(group["groupName"] for group in groups):
        raise ConfigError(f"stores whose ids differ in '.', '_' and '-' only are one in Kubernetes: {alike[0]}")
    return {
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
            "rayStartParams": {"num-cpus": "0", "dashboard-host": dashboard_host},
            "template": {"spec": _pod("ray-head", settings, cpus=2, gpus=0)},
        },
        "workerGroupSpecs": groups,
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

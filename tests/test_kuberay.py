"""cluster/kuberay.yaml and rayjob.yaml against an excerpt, made by hand, of KubeRay's published CRDs
(helm-chart/kuberay-operator/crds: RayCluster of 017710c; RayJob's own fields by its API reference of 1.7) and of
Kubernetes' NetworkPolicy: what they use, as it is typed there. What a CRD does not name, Kubernetes takes away unsaid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from conftest import ROOT

TEXTS = {"*": str}  # any name
MOUNTS = [{"name": str, "mountPath": str, "readOnly": bool, "subPath": str}]
ENV = [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str, "apiVersion": str}}}]
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": ENV,
    "resources": {"limits": {"*": (int, str)}, "requests": {"*": (int, str)}},
    "volumeMounts": MOUNTS,
}
VOLUME = {
    "name": str,
    "emptyDir": {"medium": str, "sizeLimit": (int, str)},
    "secret": {"secretName": str, "defaultMode": int, "optional": bool},
    "hostPath": {"path": str, "type": str},
}
POD = {
    "initContainers": [CONTAINER],
    "containers": [CONTAINER],
    "volumes": [VOLUME],
    "securityContext": {"fsGroup": int, "runAsUser": int, "runAsNonRoot": bool},
    "nodeSelector": TEXTS,
    "restartPolicy": str,
}
TEMPLATE = {"metadata": {"labels": TEXTS, "annotations": TEXTS, "name": str}, "spec": POD}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": ("disabled", "token")},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "env": ENV,
        "idleTimeoutSeconds": int,
        "image": str,
        "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "version": ("v1", "v2"),
        "volumeMounts": MOUNTS,
    },
    "headGroupSpec": {"rayStartParams": TEXTS, "template": TEMPLATE},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "idleTimeoutSeconds": int,
            "labels": TEXTS,
            "maxReplicas": int,
            "minReplicas": int,
            "numOfHosts": int,
            "rayStartParams": TEXTS,
            "replicas": int,
            "resources": TEXTS,
            "template": TEMPLATE,
        }
    ],
}
JOB = {
    "entrypoint": str,
    "rayClusterSpec": CLUSTER,
    "shutdownAfterJobFinishes": bool,
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),  # a string there
    "ttlSecondsAfterFinished": int,
}
LABELLED = {"matchLabels": TEXTS}
POLICY = {
    "podSelector": LABELLED,
    "policyTypes": [("Ingress", "Egress")],
    "ingress": [
        {
            "from": [{"podSelector": LABELLED, "namespaceSelector": LABELLED}],
            "ports": [{"protocol": ("TCP", "UDP", "SCTP"), "port": int, "endPort": int}],
        }
    ],
}
META = {"name": str, "namespace": str, "labels": TEXTS}
KINDS: dict[str, Any] = {
    "RayCluster": {"apiVersion": ("ray.io/v1",), "kind": str, "metadata": META, "spec": CLUSTER},
    "RayJob": {"apiVersion": ("ray.io/v1",), "kind": str, "metadata": META, "spec": JOB},
    "NetworkPolicy": {"apiVersion": ("networking.k8s.io/v1",), "kind": str, "metadata": META, "spec": POLICY},
}


def misfits(said: Any, shape: Any, at: str) -> Iterator[str]:
    """Fields that are not there, or of another kind."""
    if isinstance(shape, dict) and isinstance(said, dict):
        for key, value in said.items():
            if key in shape or "*" in shape:
                yield from misfits(value, shape.get(key, shape.get("*")), f"{at}.{key}")
            else:
                yield f"{at}: no field {key}"
    elif isinstance(shape, list) and isinstance(said, list):
        for number, one in enumerate(said):
            yield from misfits(one, shape[0], f"{at}[{number}]")
    elif isinstance(shape, tuple) and isinstance(shape[0], str):
        if said not in shape:
            yield f"{at}: {said!r} is none of {shape}"
    elif (
        isinstance(shape, dict | list) or not isinstance(said, shape) or (isinstance(said, bool) and shape is not bool)
    ):
        yield f"{at}: a {type(said).__name__}"


def objects(file: str = "kuberay.yaml") -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "cluster" / file).read_text()))


@pytest.mark.parametrize(
    ("file", "kinds"),
    [("kuberay.yaml", ["RayCluster", "NetworkPolicy"]), ("rayjob.yaml", ["NetworkPolicy", "RayJob"])],
)
def test_every_field_is_one_of_the_published_crds(file: str, kinds: list[str]) -> None:
    made = objects(file)
    assert [one["kind"] for one in made] == kinds
    assert [line for one in made for line in misfits(one, KINDS[one["kind"]], one["kind"])] == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda spec: spec.update(rayVersions="2"), "RayCluster.spec: no field rayVersions"),
        (lambda spec: spec["authOptions"].update(mode="on"), "RayCluster.spec.authOptions.mode: 'on' is none of"),
        (
            lambda spec: spec["workerGroupSpecs"][0].update(replicas="0"),
            "RayCluster.spec.workerGroupSpecs[0].replicas",
        ),
        (lambda spec: spec["headGroupSpec"]["rayStartParams"].update(x=1), "RayCluster.spec.headGroupSpec.rayStartPar"),
    ],
)
def test_a_field_that_is_not_is_found(change: Any, line: str) -> None:
    cluster = objects()[0]
    change(cluster["spec"])
    (found,) = misfits(cluster, KINDS["RayCluster"], "RayCluster")
    assert found.startswith(line)


@pytest.mark.parametrize("spec", [objects()[0]["spec"], objects("rayjob.yaml")[1]["spec"]["rayClusterSpec"]])
def test_what_each_container_mounts_is_a_volume_of_its_pod(spec: dict[str, Any]) -> None:
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        there = {volume["name"] for volume in pod["volumes"]}
        mounted = {m["name"] for c in [*pod["initContainers"], *pod["containers"]] for m in c["volumeMounts"]}
        assert mounted == there


def test_jobs_and_dashboard_are_on_loopback_and_only_the_clusters_own_pods_get_in() -> None:
    """KubeRay has the dashboard on 0.0.0.0 where nothing is said, in plain HTTP; TLS does not cover it."""
    cluster, policy = objects()
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert not {"headService", "enableIngress"} & cluster["spec"]["headGroupSpec"].keys()
    own = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}
    assert policy["spec"] == {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": own}]}],
    }
    said = (ROOT / "cluster" / "kuberay.yaml").read_text()
    assert "0.0.0.0" not in said
    assert f"name: RAY_USE_TLS\n{' ' * 6}value: '1'" in said


def lets_in(policy: dict[str, Any], pod: dict[str, str], namespace: str, port: int) -> bool:
    """Whether a pod of a namespace, not the policy's own where it is named, reaches a port; by Kubernetes' words."""

    def comes(peer: dict[str, Any]) -> bool:
        wanted = peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": "own"}})["matchLabels"]
        there = {"kubernetes.io/metadata.name": namespace}
        return wanted.items() <= there.items() and peer["podSelector"]["matchLabels"].items() <= pod.items()

    def open_at(ports: list[dict[str, Any]]) -> bool:
        return any(one["port"] <= port <= one.get("endPort", one["port"]) for one in ports)

    rules = policy["spec"]["ingress"]
    return any(any(map(comes, rule["from"])) and ("ports" not in rule or open_at(rule["ports"])) for rule in rules)


def test_a_rayjobs_dashboard_is_reached_by_the_operator_and_by_no_store() -> None:
    """It must listen beyond loopback, as the operator asks there after the job; the job comes over loopback."""
    policy, job = objects("rayjob.yaml")
    spec = job["spec"]["rayClusterSpec"]
    own = policy["spec"]["podSelector"]["matchLabels"]
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        assert own.items() <= group["template"]["metadata"]["labels"].items()
    assert job["spec"]["submissionMode"] == "SidecarMode"
    assert spec["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never", "what this mode asks for"
    assert spec["authOptions"] == {"mode": "token"}
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    ports = (1, 6379, 8264, 8265, 8266, 10001, 10999, 65535)
    assert [port for port in ports if lets_in(policy, own, "own", port)] == [p for p in ports if p != 8265]
    assert [port for port in ports if lets_in(policy, operator, "kuberay-system", port)] == [8265]
    assert not any(lets_in(policy, operator, "own", port) for port in ports), "one who calls himself so, elsewhere"
    assert not any(lets_in(policy, own, "other", port) for port in ports)
    assert not any(lets_in(policy, {}, "kuberay-system", port) for port in ports)


def test_a_rayjobs_cluster_differs_in_its_dashboard_alone() -> None:
    cluster, job = objects()[0]["spec"], objects("rayjob.yaml")[1]["spec"]["rayClusterSpec"]
    assert job["headGroupSpec"]["rayStartParams"].pop("dashboard-host") == "0.0.0.0"
    del cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"]
    for group in [job["headGroupSpec"], *job["workerGroupSpecs"]]:
        del group["template"]["metadata"]
    assert job == cluster

"""Every file of cluster/ for Kubernetes, offline. Nothing here talks to a cluster."""

import copy
import re

import kubernetes_validate
import pytest
import ray
import yaml

from tests.cluster.manifests import (
    API_VERSIONS,
    CLUSTER,
    ROOT,
    cluster_specs,
    document,
    documents,
    jobs,
    locked,
    merge_patch,
    node_types,
    pod_templates,
    schema_errors,
)

KUBERNETES = kubernetes_validate.latest_version()
NOT_KUBERNETES = {"ray-up.yaml", "sizing.yaml", "road.yaml", "gcs-fault-tolerance.yaml"}
FILES = sorted(
    str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*.yaml") if str(path.relative_to(CLUSTER)) not in NOT_KUBERNETES
)
ALL = [(name, manifest) for name in FILES for manifest in documents(name)]
SERVICE = document("rayservice.yaml", "RayService")
WITH_REDIS = merge_patch(SERVICE, yaml.safe_load((CLUSTER / "gcs-fault-tolerance.yaml").read_text()))


@pytest.mark.parametrize(("name", "manifest"), ALL, ids=lambda value: value if isinstance(value, str) else value["kind"])
def test_every_resource_is_valid(name, manifest):
    if manifest["kind"] in API_VERSIONS:
        assert schema_errors(manifest) == []
    else:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_gcs_fault_tolerance_patch_is_valid_and_names_what_redis_yaml_makes():
    assert schema_errors(WITH_REDIS) == []
    options = WITH_REDIS["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    service, stateful_set = document("redis.yaml", "Service"), document("redis.yaml", "StatefulSet")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    (password,) = stateful_set["spec"]["template"]["spec"]["containers"][0]["env"]
    assert password["valueFrom"] == options["redisPassword"]["valueFrom"]
    assert service["spec"]["selector"] == stateful_set["spec"]["template"]["metadata"]["labels"]
    assert {**WITH_REDIS["spec"]["rayClusterConfig"], "gcsFaultToleranceOptions": None} == {
        **SERVICE["spec"]["rayClusterConfig"],
        "gcsFaultToleranceOptions": None,
    }


@pytest.mark.parametrize(
    ("manifest", "path", "value"),
    [
        (document("raycluster.yaml", "RayCluster"), ("spec", "workerGroupSpec"), []),
        (document("raycluster.yaml", "RayCluster"), ("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (document("raycluster.yaml", "RayCluster"), ("spec", "authOptions", "mode"), "disabled"),
        (SERVICE, ("spec", "rayClusterSpec"), {}),
        (SERVICE, ("spec", "rayClusterConfig", "redisAddress"), "axn-redis:6379"),
        (jobs()["score"], ("spec", "entrypointResources"), {"axn_gpu": 1}),
        (document("monitoring.yaml", "PrometheusRule"), ("spec", "groups", 0, "rules", 0, "expression"), "1"),
    ],
)
def test_schema_refuses_mistakes(manifest, path, value):
    broken = copy.deepcopy(manifest)
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert len(schema_errors(broken)) == 1


PODS = [
    pytest.param(spec["rayVersion"], template, id=f"{use}-{group}")
    for use, spec in cluster_specs().items()
    for group, template in pod_templates(spec).items()
]


@pytest.mark.parametrize(("ray_version", "template"), PODS)
def test_pods(ray_version, template):
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (container,) = template["spec"]["containers"]
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests == limits, "Ray counts limits, Kubernetes places by requests"
    flavour = "cuda" if "nvidia.com/gpu" in limits else "cpu"
    assert container["image"] == f"axn-ray:{ray_version}-{flavour}"
    assert template["spec"]["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    claims = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in template["spec"]["volumes"]}
    assert {claims[mount["name"]] for mount in container["volumeMounts"]} == {
        document("raycluster.yaml", "PersistentVolumeClaim")["metadata"]["name"]
    }
    assert {"name": "metrics", "containerPort": 8080} in container["ports"]


def test_pod_check_refuses_an_unknown_field():
    spec = copy.deepcopy(pod_templates(cluster_specs()["jobs"])["head"]["spec"])
    spec["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullPolice"):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}, KUBERNETES, strict=True
        )


def test_no_two_ray_resources_share_a_name():
    names = [manifest["metadata"]["name"] for _, manifest in ALL if manifest["kind"] in ("RayCluster", "RayJob", "RayService")]
    assert len(names) == len(set(names)) == 7, "the operator names services and jobs after them"


def test_one_ray_version_everywhere():
    versions = {spec["rayVersion"] for spec in cluster_specs().values()}
    assert versions == {locked("ray")} == {ray.__version__}
    for path in (CLUSTER / "Dockerfile", CLUSTER / "ray-up.yaml", CLUSTER / "README.md"):
        tags = set(re.findall(r"axn-ray:([\d.]+)-(cpu|cuda)", path.read_text()))
        assert tags == {(ray.__version__, "cpu"), (ray.__version__, "cuda")}, path.name


def test_dockerfile_installs_what_is_locked_and_runs_as_the_pods_user():
    text = (CLUSTER / "Dockerfile").read_text()
    make = (ROOT / "Makefile").read_text()
    assert re.search(r"^ARG TORCH=(.+)$", text, re.M)[1] == re.search(r"^TORCH := (.+)$", make, re.M)[1]
    assert re.search(r"^ARG FAISS=faiss-gpu==(.+)$", text, re.M)[1] == locked("faiss-cpu")
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.M) == ["base", "cpu", "cuda"]
    for target in ("cpu", "cuda"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        users = {template.values[1]["spec"]["securityContext"]["runAsUser"] for template in PODS}
        assert users == {int(re.findall(r"^USER (\d+)$", stage, re.M)[-1])}
        assert "--constraint constraints.txt" in stage


def test_docker_context_holds_what_the_package_is_built_from():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    let_in = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    needed = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    needed |= {path for path in project["project"]["license-files"] if "/" not in path} | {project["project"]["readme"]}
    assert needed | {"pyproject.toml", "constraints.txt"} <= let_in


def test_ray_autoscaler_reads_the_groups_as_meant():
    types = node_types(cluster_specs()["jobs"])
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["cpu"]["resources"]["axn_cpu"] == 1
    assert "GPU" not in types["cpu"]["resources"]
    gpu = types["gpu"]
    assert (gpu["resources"]["GPU"], gpu["resources"]["axn_gpu"]) == (1, 1)
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    for spec in cluster_specs().values():
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]

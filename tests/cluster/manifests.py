"""Reads cluster/'s files, and the checks that several tests make of them."""

from pathlib import Path

import jsonschema
import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
SCHEMAS = yaml.safe_load(Path(__file__).with_name("schemas.yaml").read_text())
API_VERSIONS = {
    "RayCluster": "ray.io/v1",
    "RayJob": "ray.io/v1",
    "RayService": "ray.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
}
# In the order in which README.md runs them; `distill` is optional.
STAGES = ("embed", "score", "distill", "factorize", "evaluate")


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def document(name, kind):
    (found,) = [d for d in documents(name) if d["kind"] == kind]
    return found


def jobs():
    return {stage: document(f"jobs/{stage}.yaml", "RayJob") for stage in STAGES}


def locked(package):
    """The version of `package` in constraints.txt."""
    (line,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{package}==")]
    return line.split("==")[1]


def schema_errors(manifest):
    """Messages of what the project's own schema says against a manifest of one of `API_VERSIONS`' kinds."""
    kind = manifest["kind"]
    schema = {
        "definitions": SCHEMAS["definitions"],
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": API_VERSIONS[kind]},
            "kind": {"const": kind},
            "metadata": {"$ref": "#/definitions/metadata"},
            "spec": SCHEMAS["kinds"][kind],
        },
    }
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(manifest)]


def cluster_specs():
    """The two Ray clusters' specs, by what they are for."""
    return {
        "jobs": document("raycluster.yaml", "RayCluster")["spec"],
        "serving": document("rayservice.yaml", "RayService")["spec"]["rayClusterConfig"],
    }


def pod_templates(spec):
    """Name of the group -> its pod template."""
    workers = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **workers}


def merge_patch(target, patch):
    """RFC 7386: what `kubectl patch --type merge` makes of `target`."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged


def node_types(spec):
    """Group -> `resources`, `min_workers`, `max_workers`, as Ray's own autoscaler on Kubernetes reads the spec."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "axn", "namespace": "default"}, "spec": spec}
    return _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]

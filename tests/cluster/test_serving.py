"""The serving manifest: Serve's own schema, strictly, and pods enough for every replica that it allows."""

import copy
import importlib
import inspect
import tomllib
from types import SimpleNamespace

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

from serve_app.config import AppArgs
from serve_app.ingress import GRACE_S
from tests.cluster.manifests import ROOT, cluster_specs, document, node_types, pod_templates

DEPLOYMENTS = {"Ingress", "Retriever", "CrossEncoder"}
NESTED = {
    ServeDeploySchema: {
        "http_options": HTTPOptionsSchema,
        "logging_config": LoggingConfig,
        "applications": ServeApplicationSchema,
    },
    ServeApplicationSchema: {"deployments": DeploymentSchema, "logging_config": LoggingConfig},
    DeploymentSchema: {"autoscaling_config": AutoscalingConfig, "ray_actor_options": RayActorOptionsSchema},
}


def serve_config():
    return yaml.safe_load(document("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])


def unknown_keys(config, model=ServeDeploySchema, path=""):
    """Keys that Serve would accept in silence and do nothing with."""
    found = [f"{path}{key}" for key in config if key not in model.model_fields]
    for name, part in NESTED.get(model, {}).items():
        value = config.get(name) or []
        for entry in value if isinstance(value, list) else [value]:
            found += unknown_keys(entry, part, f"{path}{name}.")
    return found


def serve_errors(config, bound):
    """What is wrong with a Serve config whose one application binds the deployments named `bound`."""
    errors = [f"unknown key {key}" for key in unknown_keys(config)]
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        errors += [f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in error.errors()]
    for application in config["applications"]:
        named = {deployment["name"] for deployment in application.get("deployments", [])}
        errors += [f"no deployment {name}" for name in sorted(named - bound)]
    return errors


def place(replicas, nodes):
    """Replicas (resources, at most so many a node or None, name) that no node has room for, placed first come first served."""
    free = [dict(node) for node in nodes]
    held = [{} for _ in nodes]
    left = []
    for needed, per_node, name in replicas:
        for room, on_node in zip(free, held, strict=True):
            full = per_node is not None and on_node.get(name, 0) >= per_node
            if not full and all(room.get(kind, 0) >= amount for kind, amount in needed.items()):
                for kind, amount in needed.items():
                    room[kind] -= amount
                on_node[name] = on_node.get(name, 0) + 1
                break
        else:
            left.append(name)
    return left


def replicas_of(config, bound):
    """`bound` is min_replicas or max_replicas; those that need a GPU first."""
    (application,) = config["applications"]
    wanted = []
    for deployment in application["deployments"]:
        options = deployment["ray_actor_options"]
        needed = {"CPU": options.get("num_cpus", 1)} | ({"GPU": options["num_gpus"]} if "num_gpus" in options else {})
        count = deployment["autoscaling_config"][bound]
        wanted += [(needed, deployment.get("max_replicas_per_node"), deployment["name"])] * count
    return sorted(wanted, key=lambda replica: -replica[0].get("GPU", 0))


def nodes_of(spec, bound):
    """Resources of every worker node, GPU nodes last: Ray keeps work without a GPU off them while it can."""
    types = [kind for name, kind in node_types(spec).items() if name != "headgroup" for _ in range(kind[bound])]
    return sorted((kind["resources"] for kind in types), key=lambda resources: resources.get("GPU", 0))


def test_serve_config_is_valid_and_holds_no_unknown_key():
    assert serve_errors(serve_config(), DEPLOYMENTS) == []


def test_every_deployment_has_its_settings():
    (application,) = serve_config()["applications"]
    assert {deployment["name"] for deployment in application["deployments"]} == DEPLOYMENTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["applications"][0].update(import_pth="x"), "unknown key applications.import_pth"),
        (lambda c: c["http_options"].update(prot=1), "unknown key http_options.prot"),
        (
            lambda c: c["applications"][0]["deployments"][0]["autoscaling_config"].update(max_replica=9),
            "unknown key applications.deployments.autoscaling_config.max_replica",
        ),
        (lambda c: c["applications"][0]["deployments"][1].update(name="Retreiver"), "no deployment Retreiver"),
    ],
)
def test_mistakes_are_found(change, message):
    config = copy.deepcopy(serve_config())
    change(config)
    assert message in serve_errors(config, DEPLOYMENTS)


@pytest.mark.parametrize(("replicas", "nodes"), [("min_replicas", "min_workers"), ("max_replicas", "max_workers")])
def test_pods_hold_every_replica(replicas, nodes):
    assert place(replicas_of(serve_config(), replicas), nodes_of(cluster_specs()["serving"], nodes)) == []


def test_a_replica_too_many_is_found():
    config = copy.deepcopy(serve_config())
    config["applications"][0]["deployments"][2]["autoscaling_config"]["max_replicas"] += 1
    left = place(replicas_of(config, "max_replicas"), nodes_of(cluster_specs()["serving"], "max_workers"))
    assert left == ["CrossEncoder"]


def test_serving_pods_share_haproxy_settings_and_the_port():
    port = serve_config()["http_options"]["port"]
    for group, template in pod_templates(cluster_specs()["serving"]).items():
        (container,) = template["spec"]["containers"]
        settings = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
        assert settings == {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/local/bin/axn-haproxy",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "1",
        }, group
        assert {"name": "serve", "containerPort": port} in container["ports"], group


@pytest.mark.parametrize("config", [serve_config(), yaml.safe_load((ROOT / "serve_app/serve.yaml").read_text())])
def test_serve_gives_the_app_time_to_answer_by_its_own_deadline(config):
    (application,) = config["applications"]
    deadline_s = AppArgs.model_validate(application["args"]).deadline_ms / 1000
    assert config["http_options"]["request_timeout_s"] > deadline_s + GRACE_S


def bound_names(application):
    """Names of the deployments that an application binds."""
    deployment = application._bound_deployment
    inner = [argument for argument in deployment.init_args if isinstance(argument, Application)]
    return {deployment.name}.union(*map(bound_names, inner))


def test_autoscaling_policies_are_there_and_count_pairs():
    (application,) = serve_config()["applications"]
    policies = [
        deployment["autoscaling_config"]["policy"]["policy_function"]
        for deployment in application["deployments"]
        if "policy" in deployment["autoscaling_config"]
    ]
    (path,) = policies
    module, name = path.split(":")
    policy = getattr(importlib.import_module(module), name)
    for pairs, replicas in (([], 1), ([0.0], 1), ([256.0], 1), ([200.0, 100.0], 2), ([1000.0, 0.0], 4)):
        context = SimpleNamespace(aggregated_metrics={"pending_pairs": dict(enumerate(pairs))})
        assert policy(context) == (replicas, {})
    assert policy(SimpleNamespace(aggregated_metrics=None)) == (1, {})


def test_import_path_arguments_and_deployments_are_the_apps_own():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "serve_app" in project["tool"]["setuptools"]["packages"], "the images install only packages that are listed"
    (application,) = serve_config()["applications"]
    module, name = application["import_path"].split(":")
    build = getattr(importlib.import_module(module), name)
    (parameter,) = inspect.signature(build, eval_str=True).parameters.values()
    assert issubclass(parameter.annotation, BaseModel)
    assert bound_names(build(parameter.annotation.model_validate(application["args"]))) == DEPLOYMENTS
    own = yaml.safe_load((ROOT / "serve_app/serve.yaml").read_text())
    assert serve_errors(own, DEPLOYMENTS) == []
    assert own["applications"][0]["import_path"] == application["import_path"]

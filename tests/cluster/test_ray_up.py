"""The file for `ray up`, by Ray's own validator and the parser of `ray start`."""

import copy
import shlex

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from tests.cluster.manifests import CLUSTER, cluster_specs, jobs

CONFIG = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())


def parse_start(command):
    """Environment and options of an `A=1 ray start ...` line; nothing starts."""
    words = shlex.split(command)
    first = words.index("ray")
    assert words[first : first + 2] == ["ray", "start"]
    return dict(word.split("=", 1) for word in words[:first]), start.make_context("start", words[first + 2 :]).params


def test_ray_accepts_the_file():
    prepared = prepare_config(copy.deepcopy(CONFIG))
    validate_config(prepared)
    (nodes,) = prepared["available_node_types"].values()
    assert nodes["max_workers"] == len(CONFIG["provider"]["worker_ips"])


@pytest.mark.parametrize("change", [{"cluster_nam": "axn"}, {"docker": {**CONFIG["docker"], "imag": "x"}}])
def test_ray_refuses_an_unknown_key(change):
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**copy.deepcopy(CONFIG), **change}))


def test_nodes_start_with_a_token_and_what_the_jobs_ask_for():
    settings, head = parse_start(CONFIG["head_start_ray_commands"][-1])
    assert settings == {"RAY_AUTH_MODE": "token"}
    assert (head["head"], head["num_cpus"]) == (True, 0)
    settings, worker = parse_start(CONFIG["worker_start_ray_commands"][-1])
    assert settings == {"RAY_AUTH_MODE": "token"}
    offered = yaml.safe_load(worker["resources"])
    for job in jobs().values():
        assert yaml.safe_load(job["spec"]["entrypointResources"]).keys() <= offered.keys()
    (target,) = CONFIG["file_mounts"]
    assert target == "/home/ray/.ray/auth_token"


def test_the_shared_folder_stands_where_the_jobs_write():
    (volume,) = [option for option in CONFIG["docker"]["run_options"] if option.startswith("-v ")]
    (mount,) = cluster_specs()["jobs"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert volume.split(":")[1] == mount["mountPath"]

"""The RayJobs' entrypoints, read by the command line's own parser, and whether the cluster can run them."""

import json
import shlex

import pytest
import typer

from axn_ray.cli import app
from axn_ray.command import read_config
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.distributed.distill import DistillConfig
from axn_ray.distributed.embed import EmbedConfig
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.score import ScoreConfig
from axn_ray.errors import InputError
from tests.cluster.manifests import CLUSTER, STAGES, cluster_specs, document, jobs, node_types

UsageError = typer.BadParameter.__mro__[1]  # click's, or that of the click inside typer
CONFIGS = {
    "embed": EmbedConfig,
    "score": ScoreConfig,
    "distill": DistillConfig,
    "factorize": FactorizationConfig,
    "evaluate": EvaluateConfig,
}


def parse(entrypoint):
    """The stage and its parameters, as `axn` would take them, and the config that it would make; nothing runs."""
    program, *words = shlex.split(entrypoint)
    assert program == "axn"
    group = typer.main.get_command(app)
    with group.context_class(group, info_name=program) as context:
        name, command, rest = group.resolve_command(context, words)
        given = command.make_context(name, rest, parent=context).params
    model = CONFIGS[name]
    return name, given, read_config(model, None, {field: given[field] for field in model.model_fields})


PARSED = {stage: parse(job["spec"]["entrypoint"]) for stage, job in jobs().items()}


def test_there_is_a_job_for_each_stage_and_no_other():
    assert {path.stem for path in (CLUSTER / "jobs").iterdir()} == set(STAGES)
    assert {stage: name for stage, (name, _, _) in PARSED.items()} == {stage: stage for stage in STAGES}


@pytest.mark.parametrize(
    ("entrypoint", "error"),
    [
        ("axn score --embeddings /runs/e --out /runs/s --per-querry 5", UsageError),
        ("axn weigh --out /runs/s", UsageError),
        ("axn score --embeddings /runs/e", UsageError),
        ("axn score --embeddings /runs/e --out /runs/s --workers 0", InputError),
    ],
)
def test_an_entrypoint_that_axn_would_refuse_is_refused(entrypoint, error):
    with pytest.raises(error):
        parse(entrypoint)


def test_each_stage_reads_what_an_earlier_one_wrote_on_the_shared_disk():
    written = set()
    for stage in STAGES:
        _, given, _ = PARSED[stage]
        read = {str(given[name]) for name in ("embeddings", "scores", "mf_ind") if given.get(name) is not None}
        assert read <= written, stage
        written.add(str(given["out"]))
    folders = written | {str(PARSED[stage][1]["storage"]) for stage in ("distill", "factorize")}
    (mount,) = {
        mount["mountPath"]
        for group in cluster_specs()["jobs"]["workerGroupSpecs"]
        for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert all(folder.startswith(f"{mount}/") for folder in folders)


@pytest.mark.parametrize("stage", STAGES)
def test_the_cluster_can_run_the_job(stage):
    job, (_, given, config) = jobs()[stage]["spec"], PARSED[stage]
    cluster = document("raycluster.yaml", "RayCluster")
    assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    ((resource, amount),) = json.loads(job["entrypointResources"]).items()
    (group,) = [kind for kind in node_types(cluster["spec"]).values() if kind["resources"].get(resource, 0) >= amount]
    workers = given.get("workers") or config.workers
    threads = given.get("threads") or getattr(config, "threads", 1)
    per_node = group["resources"]["CPU"] // threads
    if resource == "axn_gpu":  # a GPU of its own for each worker
        per_node = min(per_node, group["resources"]["GPU"])
    assert workers <= per_node * group["max_workers"]

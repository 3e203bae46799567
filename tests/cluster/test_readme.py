"""cluster/README.md: its tables are what the functions make of the YAML files beside it, its files are there."""

import json
import re

import yaml

from axn_ray.core.road_sizing import RoadConfig, RoadCosts, road_table
from axn_ray.core.sizing import SizingConfig, sizing_table
from tests.cluster.manifests import CLUSTER, ROOT, STAGES

README = (CLUSTER / "README.md").read_text()


def test_sizing_table_is_computed():
    runs = {name: SizingConfig(**run) for name, run in yaml.safe_load((CLUSTER / "sizing.yaml").read_text()).items()}
    table = README.split("<!-- table: cluster/sizing.yaml -->\n")[1].split("\n\n")[0] + "\n"
    assert table == sizing_table(runs)


def test_road_table_is_computed_from_the_measured_costs():
    runs = {name: RoadConfig(**run) for name, run in yaml.safe_load((CLUSTER / "road.yaml").read_text()).items()}
    costs = RoadCosts(**json.loads((ROOT / "docs/benchmarks/scale.json").read_text())["costs"])
    table = README.split("<!-- table: cluster/road.yaml, docs/benchmarks/scale.json -->\n")[1].split("\n\n")[0] + "\n"
    assert table == road_table(runs, costs)


def test_every_file_is_named_and_every_named_file_exists():
    named = set(re.findall(r"(?<![\w/])cluster/[\w./-]*\w", README)) | {f"cluster/jobs/{stage}.yaml" for stage in STAGES}
    for name in named:
        assert (ROOT / name).exists(), name
    there = {f"cluster/{path.relative_to(CLUSTER)}" for path in CLUSTER.rglob("*") if path.is_file()}
    assert there - named == {"cluster/README.md", "cluster/Dockerfile.dockerignore"}

"""cluster/README.md: its table is what the function makes of cluster/sizing.yaml, its files are there."""

import re

import yaml

from axn_ray.core.sizing import SizingConfig, sizing_table
from tests.cluster.manifests import CLUSTER, ROOT, STAGES

README = (CLUSTER / "README.md").read_text()


def test_sizing_table_is_computed():
    runs = {name: SizingConfig(**run) for name, run in yaml.safe_load((CLUSTER / "sizing.yaml").read_text()).items()}
    table = README.split("<!-- table: cluster/sizing.yaml -->\n")[1].split("\n\n")[0] + "\n"
    assert table == sizing_table(runs)


def test_every_file_is_named_and_every_named_file_exists():
    named = set(re.findall(r"(?<![\w/])cluster/[\w./-]*\w", README)) | {f"cluster/jobs/{stage}.yaml" for stage in STAGES}
    for name in named:
        assert (ROOT / name).exists(), name
    there = {f"cluster/{path.relative_to(CLUSTER)}" for path in CLUSTER.rglob("*") if path.is_file()}
    assert there - named == {"cluster/README.md", "cluster/Dockerfile.dockerignore"}

"""What every benchmark records beside its figures, and the line that closes it."""

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

DOCS = Path(__file__).parent.parent.parent / "docs" / "benchmarks"
PACKAGES = ("axn-ray", "ray", "torch", "transformers", "numpy", "scipy")


def machine():
    """Processor, cores and versions: what a reader needs to compare figures."""
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def read_rows(evaluation):
    """The rows of an evaluation artifact, one per query, method, budget and k."""
    return pa.parquet.read_table(evaluation / "rows.parquet")


def record(name, figures, target=None, **headline):
    """Write docs/benchmarks/NAME.json and print the closing line; `target` is make's where it is not bench-NAME."""
    DOCS.mkdir(parents=True, exist_ok=True)
    described = {"command": f"make {target or f'bench-{name}'}", "machine": machine(), "headline": headline, **figures}
    (DOCS / f"{name}.json").write_text(json.dumps(described, indent=1) + "\n")
    sys.stdout.write(f"BENCH {name} " + " ".join(f"{key}={value}" for key, value in headline.items()) + "\n")

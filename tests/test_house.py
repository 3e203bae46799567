"""The house rules that ARCHITECTURE.md states: who may import whom, and a core that works where Ray is missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("axn_ray", "jobs", "serve_app", "tests", "notebooks")
# Folder -> prefixes of our own modules that its files may import.
ALLOWED = {
    "axn_ray/core": ("axn_ray.core", "axn_ray.errors", "axn_ray.sample"),
    "axn_ray/distributed": ("axn_ray.core", "axn_ray.distributed", "axn_ray.errors", "axn_ray.sample"),
    "axn_ray/integrations": ("axn_ray.client", "axn_ray.errors", "axn_ray.integrations", "axn_ray.replies"),
    "axn_ray/sample": ("axn_ray.errors",),
    "jobs": ("axn_ray", "serve_app"),
    "serve_app": ("axn_ray.core", "axn_ray.errors", "axn_ray.sample", "serve_app"),
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources():
    return [path for folder in OURS[:3] for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_house(path):
    relative = path.relative_to(ROOT)
    for module in imported_modules(path):
        top = module.split(".")[0]
        if relative.parts[:2] == ("axn_ray", "core"):
            assert top != "ray", f"{relative} imports Ray"
        assert top != "pickle", f"{relative} imports pickle"
        if top == "jobs":
            assert relative == Path("axn_ray/cli.py"), f"{relative} imports {module}; only the command line may"
        if top in OURS:
            prefixes = next((p for folder, p in ALLOWED.items() if relative.is_relative_to(folder)), OURS)
            assert module == "axn_ray" or module in ("axn_ray.sample",) or module.startswith(prefixes), f"{relative}: {module}"


def test_core_works_where_ray_is_missing():
    modules = [f"axn_ray.core.{path.stem}" for path in sorted((ROOT / "axn_ray/core").glob("[!_]*.py"))]
    program = f"""
import sys
sys.modules["ray"] = None
import importlib
for name in {modules!r}:
    importlib.import_module(name)
print("imported", {len(modules)})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"imported {len(modules)}"


def test_stage_modules_stay_thin():
    for path in sorted((ROOT / "jobs").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 60, f"{path.name} holds more than a stage's front"

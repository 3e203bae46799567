"""Wheel and sdist: what stands in the packages' folders is in them, and the sample can be read from the wheel alone."""

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import axn_ray

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = sorted({package.split(".")[0] for package in PROJECT["tool"]["setuptools"]["packages"]})


def run(*command, **settings):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist), built from a copy: a build leaves its folders beside the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    run("-m", "build", "--no-isolation", "--outdir", out, source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def package_files():
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_wheel_and_sdist_hold_every_file_of_the_packages(built):
    wheel, sdist = built
    assert package_files() - set(zipfile.ZipFile(wheel).namelist()) == set()
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert package_files() | {"pyproject.toml", "LICENSE", "NOTICE"} <= inside


def test_the_version_stands_in_one_place(built):
    assert "version" in PROJECT["project"]["dynamic"]
    for path in built:
        assert path.name.startswith(f"axn_ray-{axn_ray.__version__}")


def test_the_sample_is_read_from_the_wheel_alone(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    program = """
import axn_ray
from axn_ray import cli, sample
from axn_ray.core.corpus import read_items
from axn_ray.core.score_store import load_scores
print(axn_ray.__file__)
print(len(read_items(sample.ITEMS)), load_scores(sample.EXACT_SCORES).matrix.n_observed)
"""
    settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    where, counts = run("-c", program, **settings).splitlines()
    assert Path(where) == tmp_path / "axn_ray/__init__.py"
    assert counts == "117659 1376700"

"""Sealed folders: files beside a `manifest.json` that says what they are and what they were made from.

Knows no model and no Ray. A folder appears under its name only when it is whole, or is not sealed until it is.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from upath import UPath

import axn_ray
from axn_ray.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class Manifest(BaseModel):
    """What an artifact is: its kind, its configuration, its sizes, and hashes of its inputs and files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    format_version: int = FORMAT_VERSION
    axn_ray_version: str = axn_ray.__version__
    config: dict[str, Any]
    counts: dict[str, int | float]
    made_from: dict[str, str]
    files: dict[str, str] = {}


def locate_folder(name: str) -> Path:
    """A local path, or for a URI that fsspec knows (`s3://`, `gs://`, ...) an object that acts like one.

    Without fsspec's cache of listings: other processes write into the same folder.
    """
    return cast(Path, UPath(name, use_listings_cache=False)) if "://" in name else Path(name)


def is_local(path: Path) -> bool:
    """Whether this is a path of the local file system and not an object store's."""
    return isinstance(path, Path)


def hash_file(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of a JSON-serializable value in canonical form, as hex; the fingerprint of a configuration."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_file_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: readers see the old file or the whole new one.

    An object store shows an object only when all of it has been received: there the write itself is the rename.
    """
    if not is_local(path):
        path.write_bytes(content)
        return
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a finished folder, with the sha256 of every file below it but hidden ones."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST and not p.name.startswith("."))
    sealed = manifest.model_copy(update={"files": {p.relative_to(folder).as_posix(): hash_file(p) for p in files}})
    write_file_atomically(folder / MANIFEST, (sealed.model_dump_json(indent=1) + "\n").encode())
    return sealed


@contextmanager
def new_artifact(folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Yield an empty folder to write into; on success seal it and move it to `folder`, replacing an older one.

    After an exception nothing is left, and an artifact that stood at `folder` still stands.
    """
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    aside.mkdir()
    try:
        yield aside
        seal(aside, manifest)
        if folder.exists():
            shutil.rmtree(folder)
        aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Refuse to overwrite anything that is not an artifact of ours.

    Raises:
        ArtifactError: the folder holds files but no manifest.
    """
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} exists and is not an axn-ray artifact; choose another output folder")


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check the manifest of an artifact of the given kind.

    Raises:
        ArtifactError: no manifest, another kind, a newer format, or a listed file that is missing.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a finished {kind} artifact (no {MANIFEST}); run the stage that makes it")
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read ({error.error_count()} bad fields); make the artifact again") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{folder} holds a {manifest.kind} artifact, a {kind} artifact is needed; check the path")
    if manifest.format_version > FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format {manifest.format_version}, this version reads up to {FORMAT_VERSION}; upgrade axn-ray"
        )
    missing = [name for name in manifest.files if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more files; make the artifact again")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file with its hash in the manifest.

    Raises:
        ArtifactError: a file was truncated or changed after it was sealed.
    """
    for name, expected in manifest.files.items():
        if hash_file(folder / name) != expected:
            raise ArtifactError(f"{folder / name} is damaged (its hash differs from the manifest's); make the artifact again")


def check_same_inputs(folder: Path, manifest: Manifest, made_from: Mapping[str, str]) -> None:
    """Refuse an artifact that was made from other inputs than those at hand.

    Raises:
        ArtifactError: an input that both name has different hashes.
    """
    for name, expected in made_from.items():
        if name in manifest.made_from and manifest.made_from[name] != expected:
            raise ArtifactError(
                f"{folder} was made from other {name} ({manifest.made_from[name][:12]}) than the given ones "
                f"({expected[:12]}); make it again or pass the {name} it was made from"
            )

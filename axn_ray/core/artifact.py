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
HASH_LENGTH = 64


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

    After an exception nothing is left, and an artifact that stood at `folder` still stands. Where `folder` is a symbolic
    link, what it leads to is replaced.

    Raises:
        ArtifactError: see `check_replaceable`.
    """
    check_replaceable(folder, manifest.kind)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = f".{folder.name}.{uuid.uuid4().hex[:8]}"
    aside, older = folder.with_name(f"{name}.partial"), folder.with_name(f"{name}.older")
    aside.mkdir()
    try:
        yield aside
        seal(aside, manifest)
        if folder.exists():
            folder.replace(older)
        aside.replace(folder)
        shutil.rmtree(older, ignore_errors=True)
    finally:
        if older.exists() and not folder.exists():
            older.replace(folder)
        shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(folder: Path, kind: str, *, in_place: bool = False) -> None:
    """Refuse to overwrite anything but an older artifact of the same kind: what a stage reads is of another.

    `in_place`: its files are written there one by one, and not moved there as a folder.

    Raises:
        ArtifactError: the folder holds something else, is a file itself, or a mount point, which cannot be replaced.
    """
    if not in_place and folder.is_mount():
        raise ArtifactError(f"{folder} is a mount point; name a folder below it")
    if (folder / MANIFEST).is_file():
        try:
            found = json.loads((folder / MANIFEST).read_bytes())["kind"]
        except (ValueError, KeyError, TypeError):
            found = "foreign"
        if found != kind:
            raise ArtifactError(f"{folder} holds a {found} artifact, not an older {kind} artifact; choose another output folder")
    elif folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is not an axn-ray artifact; choose another output folder")


def read_manifest(folder: Path, kind: str) -> Manifest:
    """Read and check the manifest of an artifact of the given kind.

    Raises:
        ArtifactError: no manifest, another kind, a newer format, or a listed file that is missing.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a finished {kind} artifact (no {MANIFEST}); run the stage that makes it")
    content = path.read_bytes()
    _check_format(folder, content)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{path} cannot be read ({error.error_count()} bad fields); make the artifact again") from error
    if manifest.kind != kind:
        raise ArtifactError(f"{folder} holds a {manifest.kind} artifact, a {kind} artifact is needed; check the path")
    missing = [name for name in manifest.files if not (folder / name).is_file()]
    if missing:
        raise ArtifactError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more files; make the artifact again")
    return manifest


def _check_format(folder: Path, content: bytes) -> None:
    """A newer format may have fields that this version cannot read, so it is looked at first."""
    try:
        version = json.loads(content)["format_version"]
    except (ValueError, KeyError, TypeError):
        return  # what is wrong with it is for the caller to say
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(f"{folder} has format {version}, this version reads up to {FORMAT_VERSION}; upgrade axn-ray")


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
            known, given = (value[:12] if len(value) == HASH_LENGTH else value for value in (manifest.made_from[name], expected))
            raise ArtifactError(
                f"{folder} was made from other {name} ({known}) than the given ones ({given}); "
                f"make it again or pass the {name} it was made from"
            )

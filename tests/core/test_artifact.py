import json
import shutil
from pathlib import Path

import pytest

from axn_ray.core.artifact import Manifest, check_files, check_same_inputs, new_artifact, read_manifest
from axn_ray.errors import ArtifactError


def manifest(kind="scores"):
    return Manifest(kind=kind, config={"seed": 1}, counts={"rows": 2}, made_from={"items": "a" * 64})


def write(folder, content="hello"):
    with new_artifact(folder, manifest()) as aside:
        (aside / "data.txt").write_text(content)


def test_round_trip_and_replacement(tmp_path):
    write(tmp_path / "out")
    write(tmp_path / "out", "again")
    assert (tmp_path / "out/data.txt").read_text() == "again"
    read = read_manifest(tmp_path / "out", "scores")
    assert (read.config, read.counts, list(read.files)) == ({"seed": 1}, {"rows": 2}, ["data.txt"])
    check_files(tmp_path / "out", read)


def test_a_failure_leaves_the_old_artifact_and_no_rest(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(RuntimeError), new_artifact(tmp_path / "out", manifest()) as aside:
        (aside / "data.txt").write_text("half")
        raise RuntimeError
    assert (tmp_path / "out/data.txt").read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_artifact_of_another_kind_is_never_overwritten(tmp_path):
    write(tmp_path / "scores")
    with pytest.raises(ArtifactError, match="holds a scores artifact, not an older factorization artifact; choose another"):
        with new_artifact(tmp_path / "scores", manifest("factorization")):
            pass
    assert (tmp_path / "scores/data.txt").read_text() == "hello"


def test_what_cannot_be_removed_does_not_cost_the_new_artifact(tmp_path, monkeypatch):
    """As on NFS, where a file that another process reads stays behind."""
    write(tmp_path / "out")
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    write(tmp_path / "out", "again")
    assert (tmp_path / "out/data.txt").read_text() == "again"
    read_manifest(tmp_path / "out", "scores")


def test_what_cannot_be_moved_into_place_leaves_the_old_artifact(tmp_path, monkeypatch):
    write(tmp_path / "out")
    move = Path.replace

    def refuse(self, target):
        if self.suffix == ".partial":
            raise OSError("no")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "out", "again")
    assert (tmp_path / "out/data.txt").read_text() == "hello"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_symbolic_link_leads_to_the_new_artifact(tmp_path):
    write(tmp_path / "disk/out")
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    write(tmp_path / "out", "again")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk/out/data.txt").read_text() == "again"


def test_a_file_is_no_folder_to_write_into(tmp_path):
    (tmp_path / "out").write_text("dear")
    with pytest.raises(ArtifactError, match="is not an axn-ray artifact"):
        write(tmp_path / "out")


def test_a_newer_format_is_named_even_with_fields_that_nobody_knows(tmp_path):
    write(tmp_path / "out")
    newer = json.loads((tmp_path / "out/manifest.json").read_text()) | {"format_version": 99, "colour": "blue"}
    (tmp_path / "out/manifest.json").write_text(json.dumps(newer))
    with pytest.raises(ArtifactError, match="has format 99, this version reads up to 1; upgrade axn-ray"):
        read_manifest(tmp_path / "out", "scores")


def test_a_foreign_folder_is_never_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="is not an axn-ray artifact"):
        write(tmp_path / "home")
    assert (tmp_path / "home/thesis.txt").read_text() == "dear"


def test_reading_refuses_what_does_not_fit(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds a scores artifact, a factorization artifact is needed"):
        read_manifest(tmp_path / "out", "factorization")
    with pytest.raises(ArtifactError, match="run the stage that makes it"):
        read_manifest(tmp_path / "none", "scores")
    read = read_manifest(tmp_path / "out", "scores")
    with pytest.raises(ArtifactError, match="made from other items"):
        check_same_inputs(tmp_path / "out", read, {"items": "b" * 64})
    (tmp_path / "out/data.txt").write_text("hullo")
    with pytest.raises(ArtifactError, match="is damaged"):
        check_files(tmp_path / "out", read)
    (tmp_path / "out/data.txt").unlink()
    with pytest.raises(ArtifactError, match="lacks data.txt"):
        read_manifest(tmp_path / "out", "scores")
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_manifest(tmp_path / "out", "scores")

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

"""Faults that really happen to a scoring job, on one node: after each, the scores are those of an undisturbed run."""

import json
import subprocess

import numpy as np
import pytest

from axn_ray.command import find_axn_error
from axn_ray.core.score_store import load_scores, lock_folder, shard_path
from axn_ray.distributed import score as stage
from axn_ray.errors import ArtifactError, ModelError
from tests.distributed.scorers import Slow
from tests.distributed.scoring_driver import make_config, make_corpus, score_slowly


def same(mine, theirs):
    for name in ("indptr", "item_index", "scores"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))


def test_a_poisoned_item_is_quarantined_by_name_and_costs_no_other_pair(ray_session, tmp_path):
    corpus, out = make_corpus(40, 6, bad_item="poison ivy"), tmp_path / "scores"
    sealed = stage.score(corpus, make_config("Poisoned", shard_pairs=80), out)
    assert (sealed.counts["pairs"], sealed.counts["quarantined"]) == (6 * 39, 6)
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["query_id"], line["item_id"]) for line in lines] == [(f"q{n}", "i7") for n in range(6)]
    assert {line["reason"] for line in lines} == {"ValueError: this item breaks the model"}
    scores = load_scores(out).matrix
    for query in range(6):
        items, observed = scores.row(query)
        assert items.tolist() == [n for n in range(40) if n != 7]
        texts = [corpus.items.full_texts[n] for n in items]
        np.testing.assert_allclose(observed, Slow().score_texts([corpus.queries.texts[query]] * 39, texts), rtol=1e-6)


def test_a_model_that_fails_on_everything_stops_the_job(ray_session, tmp_path):
    with pytest.raises(Exception, match="pairs cannot be scored") as raised:
        stage.score(make_corpus(40, 6), make_config("Broken", shard_pairs=80), tmp_path / "scores")
    assert isinstance(find_axn_error(raised.value), ModelError)
    assert not (tmp_path / "scores" / "manifest.json").exists()


def test_a_shard_that_ends_every_worker_stops_the_job(ray_session, tmp_path):
    out = tmp_path / "scores"
    corpus = make_corpus(40, 6, bad_item="deadly nightshade")
    with pytest.raises(Exception, match="shard [0-5] ended 5 workers") as raised:
        stage.score(corpus, make_config("Deadly", shard_pairs=40, workers=1), out)
    assert isinstance(find_axn_error(raised.value), ModelError)


def test_a_full_disk_is_one_sentence_and_what_was_done_is_kept(ray_session, tmp_path):
    out = tmp_path / "scores"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(Exception, match="cannot be written") as raised:
            stage.score(make_corpus(), make_config("Slow"), out)
        assert isinstance(find_axn_error(raised.value), ArtifactError)
        done = sorted(out.glob("shards/*.json"))
        assert done and not (out / "manifest.json").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        kept = {path: path.stat().st_mtime_ns for path in done}
        stage.score(make_corpus(), make_config("Slow"), out)
        assert kept == {path: path.stat().st_mtime_ns for path in kept}
        np.testing.assert_array_equal(load_scores(out).dense(), score_slowly(make_corpus()))
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_folder_that_is_a_file_is_one_sentence(ray_session, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError, match="cannot be written"):
        stage.score(make_corpus(40, 6), make_config("Slow"), tmp_path / "file" / "scores")


def test_a_second_run_on_the_same_folder_is_refused(ray_session, tmp_path):
    with lock_folder(tmp_path / "scores"), pytest.raises(ArtifactError, match="another run is writing .*scores"):
        stage.score(make_corpus(40, 6), make_config("Slow"), tmp_path / "scores")
    stage.score(make_corpus(40, 6), make_config("Slow"), tmp_path / "scores")


def test_known_pairs_are_not_paid_for_again(ray_session, tmp_path):
    corpus = make_corpus(40, 6)
    half = make_config("Slow", choice="per_query", per_query=20)
    stage.score(corpus, half, tmp_path / "half")
    whole = make_config("Slow", known_scores=[str(tmp_path / "half")])
    sealed = stage.score(corpus, whole, tmp_path / "whole")
    assert (sealed.counts["pairs"], sealed.counts["known"]) == (240, 120)
    np.testing.assert_array_equal(load_scores(tmp_path / "whole").dense(), score_slowly(corpus))


def test_active_items_are_new_ones_and_a_cut_off_second_pass_ends_the_same(ray_session, tmp_path):
    corpus = make_corpus(60, 12)
    config = make_config("Slow", choice="per_query", per_query=20, random_share=0.1, active_share=0.3, shard_pairs=40)
    out = tmp_path / "scores"
    sealed = stage.score(corpus, config, out)
    whole = load_scores(out).matrix
    assert sealed.counts["pairs"] == 12 * 20
    assert np.diff(whole.indptr).tolist() == [20] * 12
    n_first = 6  # 12 queries x 14 items, 2 queries to a shard; the active shards follow
    (out / "manifest.json").unlink()
    for shard in (0, n_first, n_first + 1):
        shard_path(out, shard).unlink()
    stage.score(corpus, config, out)
    same(load_scores(out).matrix, whole)

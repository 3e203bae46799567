import numpy as np
import pytest

from axn_ray.core.artifact import Manifest, seal
from axn_ray.core.fit_share import StoredInputs, share_inputs
from axn_ray.core.fitting import FitInputs
from axn_ray.core.row_parts import RowParts, write_part
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import digest_texts, read_scored_queries, read_spans, write_ids, write_shard
from axn_ray.errors import ArtifactError, FitError, InputError

N_QUERIES, N_ITEMS, N_SHARDS = 40, 60, 9


@pytest.fixture(scope="module")
def inputs():
    """Queries 7 and 8 have no scores; a few have many."""
    rng = np.random.default_rng(0)
    counts = np.where(rng.random(N_QUERIES) < 0.2, 30, rng.integers(1, 6, N_QUERIES))
    counts[7:9] = 0
    rows = np.repeat(np.arange(N_QUERIES), counts)
    columns = np.concatenate([rng.permutation(N_ITEMS)[:count] for count in counts])
    scores = rng.normal(size=len(rows)).astype(np.float32)
    items, queries = (rng.normal(size=(n, 4)).astype(np.float32) for n in (N_ITEMS, N_QUERIES))
    return FitInputs(ScoreMatrix.from_triples(rows, columns, scores, N_QUERIES, N_ITEMS), items, queries)


@pytest.fixture(scope="module")
def stored(inputs, tmp_path_factory):
    """The same on disk: shards of ranges of queries, as two passes that cut the queries at different places leave them.

    The embeddings hold the queries in another order, and others between them.
    """
    folder = tmp_path_factory.mktemp("stored")
    (folder / "embeddings").mkdir()
    rows = np.random.default_rng(1).permutation(N_QUERIES + 10)[:N_QUERIES].astype(np.int64)
    every_query = np.full((N_QUERIES + 10, 4), np.nan, dtype=np.float32)
    every_query[rows] = inputs.query_embeddings
    np.save(folder / "embeddings" / "query_embeddings.npy", every_query)
    np.save(folder / "embeddings" / "item_embeddings.npy", inputs.item_embeddings)
    matrix, scores = inputs.score_matrix, folder / "scores"
    second_pass = np.random.default_rng(2).random(matrix.n_observed) < 0.3
    shard = np.where(second_pass, 5 + matrix.query_index // 10, matrix.query_index // 9)
    for number in range(N_SHARDS):
        at = shard == number
        write_shard(scores, number, matrix.query_index[at], matrix.item_index[at].astype(np.int32), matrix.scores[at], {})
    nothing = np.zeros(1, dtype=np.int32)
    write_shard(scores, N_SHARDS, nothing, nothing, np.array([np.nan], dtype=np.float32), {})  # all quarantined
    ids = [f"q{n}" for n in range(N_QUERIES)]
    write_ids(scores, "queries.parquet", "query_id", ids, ids)
    seal(scores, Manifest(kind="scores", config={}, counts={"pairs": matrix.n_observed}, made_from={}))
    return StoredInputs(folder / "embeddings", scores, rows, read_spans(scores))


def test_spans_and_ids_are_read_from_disk(inputs, stored):
    ids = [f"q{n}" for n in range(N_QUERIES)]
    assert read_scored_queries(stored.scores) == (ids, digest_texts(ids))
    assert sum(span.rows for span in stored.spans) == stored.n_observed == inputs.score_matrix.n_observed
    assert len(stored.spans) == N_SHARDS  # the empty one is left out
    assert all(span.first <= span.last for span in stored.spans)


def assert_same_triples(shares, matrix):
    """The shares one after another are the whole matrix, in its order."""
    assert [q for share in shares for q in share.queries] == list(range(N_QUERIES))
    assert [i for share in shares for i in share.items] == list(range(N_ITEMS))
    for share in shares:
        after = share.first_observation + share.matrix.n_observed
        own = slice(share.first_observation, after)
        if share.matrix.n_observed:
            np.testing.assert_array_equal(share.matrix.query_index + share.queries.start, matrix.query_index[own])
            np.testing.assert_array_equal(share.matrix.item_index, matrix.item_index[own])
            np.testing.assert_array_equal(share.matrix.scores, matrix.scores[own])
    assert sum(share.matrix.n_observed for share in shares) == matrix.n_observed


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
def test_shares_cover_the_matrix_once(inputs, stored, workers):
    for shares in (
        [share_inputs(inputs, rank, workers) for rank in range(workers)],
        [stored.share(rank, workers) for rank in range(workers)],
    ):
        assert_same_triples(shares, inputs.score_matrix)
        np.testing.assert_array_equal(np.concatenate([share.query_embeddings for share in shares]), inputs.query_embeddings)
        most = max(share.matrix.n_observed for share in shares)
        assert most <= inputs.score_matrix.n_observed / workers + 60


def test_a_share_reads_no_shard_of_others(stored):
    last = max(stored.spans, key=lambda span: span.first)
    path = stored.scores / "shards" / f"part-{last.shard:05d}.parquet"
    whole = path.read_bytes()
    try:
        path.write_bytes(b"PAR1")
        assert stored.share(0, 4).queries.stop < last.first
        with pytest.raises(ArtifactError, match="damaged"):
            stored.share(3, 4)
        with pytest.raises(ArtifactError, match="damaged"):
            read_spans(stored.scores)
    finally:
        path.write_bytes(whole)


def test_bad_embeddings_are_named_by_who_reads_them(stored, tmp_path):
    bad = np.load(stored.embeddings / "item_embeddings.npy")
    bad[5] = np.nan
    np.save(tmp_path / "item_embeddings.npy", bad)
    np.save(tmp_path / "query_embeddings.npy", np.load(stored.embeddings / "query_embeddings.npy"))
    spoilt = StoredInputs(tmp_path, stored.scores, stored.query_rows, stored.spans)
    spoilt.share(1, 2)
    with pytest.raises(InputError, match=r"1 item embeddings are NaN or infinite \(first: row 5\)"):
        spoilt.share(0, 2)


def test_parts_are_one_array(tmp_path):
    whole = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    for start, stop in [(20, 50), (0, 7), (7, 7), (7, 20)]:
        write_part(tmp_path, "items", start, whole[start:stop])
    write_part(tmp_path, "items-exp_avg", 0, whole[:2])  # another array
    parts = RowParts(tmp_path, "items")
    assert parts.shape == (50, 3)
    for start, stop in [(0, 50), (0, 0), (3, 21), (7, 20), (49, 50), (50, 50), (20, 20)]:
        np.testing.assert_array_equal(parts.read(range(start, stop)), whole[start:stop])
    rows = np.array([0, 6, 7, 19, 20, 49])
    np.testing.assert_array_equal(parts[rows], whole[rows])
    parts.join(tmp_path / "whole.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "whole.npy"), whole)


def test_parts_with_a_gap_or_a_nan_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="lacks rows of items"):
        RowParts(tmp_path, "items")
    write_part(tmp_path, "items", 0, np.zeros((2, 3), dtype=np.float32))
    write_part(tmp_path, "items", 3, np.full((2, 3), np.nan, dtype=np.float32))
    with pytest.raises(ArtifactError, match=r"lacks rows of items \(parts \[0, 3\] end at \[2, 5\]\)"):
        RowParts(tmp_path, "items")
    write_part(tmp_path, "items", 2, np.zeros((1, 3), dtype=np.float32))
    with pytest.raises(FitError, match="came out NaN or infinite"):
        RowParts(tmp_path, "items").join(tmp_path / "whole.npy")

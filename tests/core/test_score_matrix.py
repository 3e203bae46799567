import numpy as np
import pytest

from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.errors import InputError


def triples(*rows):
    query, item, score = zip(*rows, strict=True)
    return np.array(query, dtype=np.int32), np.array(item, dtype=np.int32), np.array(score, dtype=np.float32)


def test_rows_come_sorted_and_a_stored_zero_is_a_score():
    matrix = ScoreMatrix.from_triples(*triples((2, 1, 0.5), (0, 3, 1.0), (0, 1, 0.0)), n_queries=3, n_items=4)
    assert [array.tolist() for array in matrix.row(0)] == [[1, 3], [0.0, 1.0]]
    assert matrix.row(1)[0].tolist() == []
    assert (matrix.n_queries, matrix.n_observed, matrix.query_index.tolist()) == (3, 3, [0, 0, 2])


def test_taken_rows_come_in_their_order_with_all_that_was_observed():
    matrix = ScoreMatrix(np.array([0, 2, 2, 5]), np.array([0, 3, 1, 2, 3], np.int32), np.arange(5, dtype=np.float32), 4)
    taken = matrix.take(np.array([2, 1, 0]))
    assert [tuple(map(list, taken.row(query))) for query in range(3)] == [([1, 2, 3], [2, 3, 4]), ([], []), ([0, 3], [0, 1])]
    assert (taken.n_queries, taken.n_items, taken.n_observed) == (3, 4, 5)
    assert matrix.take(np.array([1])).n_observed == 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, 1.0), (0, 0, 2.0)], r"1 pairs come twice \(first: query index 0, item index 0\)"),
        ([(0, 4, 1.0)], "item_index 4 lies outside 0..3"),
        ([(-1, 0, 1.0)], "query_index -1 lies outside 0..2"),
        ([(0, 0, 1.0), (1, 2, np.nan)], r"1 scores are NaN or infinite \(first: query index 1, item index 2\)"),
    ],
)
def test_bad_triples_are_refused(rows, message):
    with pytest.raises(InputError, match=message):
        ScoreMatrix.from_triples(*triples(*rows), n_queries=3, n_items=4)


def test_scale_matches_mean_and_spread():
    rng = np.random.default_rng(0)
    scores, approx = rng.normal(-4, 3, 1000).astype(np.float32), rng.normal(0.3, 0.1, 1000).astype(np.float32)
    scaled = ScoreScale.fit(scores, approx).scale(scores)
    np.testing.assert_allclose([scaled.mean(), scaled.std()], [approx.mean(), approx.std()], rtol=1e-4)
    with pytest.raises(InputError, match="cannot be rescaled"):
        ScoreScale.fit(np.ones(5, dtype=np.float32), approx[:5])

import numpy as np
import pytest
import torch

from axn_ray.core.als import fit_als, join_columns, solve_rows, sum_squared_errors, transpose
from axn_ray.core.factorization import fit
from axn_ray.core.fit_share import share_rows
from axn_ray.core.fitting import FactorizationConfig, FitInputs
from axn_ray.core.row_parts import RowParts, write_part
from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.errors import FitError

DIM, RIDGE = 6, 0.2
SCALE = ScoreScale(alpha=-4.0, beta=0.3)


@pytest.fixture(scope="module")
def world():
    """Rows with none, one, fewer than DIM, just DIM and many more observations; a stored zero among the scores."""
    rng = np.random.default_rng(0)
    counts = np.array([0, 1, 3, DIM - 1, DIM, DIM + 1, 40, 2, 0, 17, 4, 5, 4])
    rows = np.repeat(np.arange(len(counts)), counts)
    columns = np.concatenate([rng.permutation(50)[:count] for count in counts])
    scores = rng.normal(-4, 3, len(rows)).astype(np.float32)
    scores[3] = 0.0
    items, queries = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (50, len(counts)))
    return ScoreMatrix.from_triples(rows, columns, scores, len(counts), 50), items, queries


def one_row(matrix, row, columns, prior):
    """The slow twin: the normal equations of one row, in double precision."""
    at, scores = matrix.row(row)
    a, y = columns[at].astype(np.float64), SCALE.beta * (scores.astype(np.float64) - SCALE.alpha)
    left = a.T @ a + RIDGE * len(at) * np.eye(DIM)
    return prior if not len(at) else np.linalg.solve(left, a.T @ y + RIDGE * len(at) * prior)


def one_by_one(matrix, columns, priors):
    return np.array([one_row(matrix, row, columns, priors[row].astype(np.float64)) for row in range(matrix.n_queries)])


def test_rows_are_those_of_the_slow_twin(world):
    matrix, items, queries = world
    solved = solve_rows(matrix, SCALE, items, queries, RIDGE)
    np.testing.assert_allclose(solved, one_by_one(matrix, items, queries), atol=1e-4)
    np.testing.assert_array_equal(solved[[0, 8]], queries[[0, 8]])
    assert (solved[1:8] != queries[1:8]).any(axis=1).all()


def test_a_solved_row_is_the_least_of_its_objective(world):
    """Free oracle: the gradient of the objective vanishes."""
    matrix, items, queries = world
    u = torch.tensor(solve_rows(matrix, SCALE, items, queries, RIDGE)[6], dtype=torch.float64, requires_grad=True)
    at, scores = matrix.row(6)
    errors = torch.tensor(items[at], dtype=torch.float64) @ u - torch.tensor(SCALE.scale(scores), dtype=torch.float64)
    loss = errors.square().sum() + RIDGE * len(at) * (u - torch.tensor(queries[6], dtype=torch.float64)).square().sum()
    loss.backward()
    assert u.grad.abs().max() < 1e-3


def test_blocks_do_not_change_the_rows(world, monkeypatch):
    matrix, items, queries = world
    whole = solve_rows(matrix, SCALE, items, queries, RIDGE)
    monkeypatch.setattr("axn_ray.core.als.BLOCK", 5 * DIM)
    np.testing.assert_allclose(solve_rows(matrix, SCALE, items, queries, RIDGE), whole, atol=1e-5)


def test_columns_may_lie_on_disk_in_parts(world, tmp_path):
    matrix, items, queries = world
    for rows in share_rows(50, 3):
        write_part(tmp_path, "items", rows.start, items[rows.start : rows.stop])
    on_disk = RowParts(tmp_path, "items")
    expected = solve_rows(matrix, SCALE, items, queries, RIDGE)
    np.testing.assert_array_equal(solve_rows(matrix, SCALE, on_disk, queries, RIDGE), expected)
    pairs = [(q, i, s) for q in range(13) for i, s in zip(*matrix.row(q), strict=True)]
    errors = [float(expected[q] @ items[i]) - SCALE.beta * (s + 4) for q, i, s in pairs]
    assert sum_squared_errors(matrix, SCALE, expected, on_disk) == pytest.approx(np.square(errors).sum(), rel=1e-5)


def test_transposed_twice_is_the_same_and_zeros_stay(world):
    matrix = world[0]
    turned = transpose(matrix)
    assert (turned.n_queries, turned.n_items, turned.n_observed) == (50, 13, matrix.n_observed)
    triples = {(q, i, s) for q in range(13) for i, s in zip(*(part.tolist() for part in matrix.row(q)), strict=True)}
    assert {(q, i, s) for i in range(50) for q, s in zip(*(part.tolist() for part in turned.row(i)), strict=True)} == triples
    again = transpose(turned)
    np.testing.assert_array_equal(again.item_index, matrix.item_index)
    halves = [matrix.rows(range(0, 7)), matrix.rows(range(7, 13))]
    joined = join_columns([transpose(half) for half in halves])
    for name in ("indptr", "item_index", "scores", "n_items"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(turned, name))


def test_the_fit_alternates_as_the_slow_twin_does(world):
    matrix, items, queries = world
    config = FactorizationConfig(method="als", ridge=RIDGE, epochs=2, patience=2)
    inputs = FitInputs(matrix, items, queries)
    known = matrix.keep(~inputs.held_out(config))
    v = items.astype(np.float64)
    by_epoch = []
    for _ in range(2):
        u = one_by_one(known, v, queries)
        v = one_by_one(transpose(known), u, items)
        by_epoch.append(v)
    fitted, epochs = fit_als(inputs, SCALE, config)
    best = min(range(2), key=lambda n: epochs[n].held_out_rmse)
    np.testing.assert_allclose(fitted, by_epoch[best], atol=1e-3)
    never = ~np.isin(np.arange(50), known.item_index)
    assert never.any()
    np.testing.assert_array_equal(fitted[never], items[never])


def test_scores_that_overflow_name_the_cure(world):
    matrix, items, queries = world
    wild = ScoreMatrix(matrix.indptr, matrix.item_index, np.where(np.arange(matrix.n_observed) % 2, 3e38, -3e38).astype("f4"), 50)
    with np.errstate(all="ignore"), pytest.raises(FitError, match=r"of \d+ rows have no solution; raise ridge"):
        fit_als(FitInputs(wild, items, queries), SCALE, FactorizationConfig(method="als"))


def test_defaults_are_its_own(world):
    assert FactorizationConfig(method="als").patience == 1
    fitted = fit(*world, FactorizationConfig(method="als"))
    assert fitted.query_tower is None and fitted.query_map is None
    assert fitted.index_ce_calls == world[0].n_observed

import numpy as np
import pytest

from axn_ray.core.bayes import BayesInputs, BayesModel, e_step, fit_bayes, held_out_rmse, whiten
from axn_ray.core.estimators import Ridge
from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.errors import InputError

N_ITEMS, N_QUERIES, DIM, FEATURES = 120, 300, 6, 5
RAW = ScoreScale()


@pytest.fixture(scope="module")
def world():
    """Scores drawn from the model itself, 12 per query, with its true parameters."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=(N_ITEMS, DIM)).astype(np.float32)
    queries = rng.normal(size=(N_QUERIES, FEATURES)).astype(np.float32)
    root = rng.normal(size=(DIM, DIM)) * 0.4
    truth = BayesModel(np.eye(DIM, FEATURES) + 0.3 * rng.normal(size=(DIM, FEATURES)), root @ root.T + 0.05 * np.eye(DIM), 0.09)
    u = queries @ truth.weights.T + rng.multivariate_normal(np.zeros(DIM), truth.covariance, N_QUERIES)
    query_index = np.repeat(np.arange(N_QUERIES, dtype=np.int32), 12)
    item_index = np.concatenate([rng.choice(N_ITEMS, 12, replace=False) for _ in range(N_QUERIES)]).astype(np.int32)
    noise = 0.3 * rng.normal(size=len(item_index))
    scores = np.einsum("nd,nd->n", u[query_index], items[item_index]) + noise
    matrix = ScoreMatrix.from_triples(query_index, item_index, scores.astype(np.float32), N_QUERIES, N_ITEMS)
    return items, queries, matrix, truth


def posterior(model, items, x, anchors, scores):
    """The slow twin: the posterior in precision form, by plain inverses."""
    a = items[anchors].astype(np.float64)
    precision = np.linalg.inv(model.covariance) + a.T @ a / model.noise_variance
    prior = model.weights @ x
    covariance = np.linalg.inv(precision)
    return prior + covariance @ a.T @ (scores - a @ prior) / model.noise_variance, covariance


def test_e_step_equals_plain_inverses(world):
    items, queries, matrix, truth = world
    total = e_step(truth, BayesInputs(items, queries, matrix, RAW), range(20))
    moment_mx, spread, squared_error = np.zeros((DIM, FEATURES)), np.zeros((DIM, DIM)), 0.0
    for query in range(20):
        anchors, scores = matrix.row(query)
        mean, covariance = posterior(truth, items, queries[query], anchors, scores)
        a = items[anchors].astype(np.float64)
        moment_mx += np.outer(mean, queries[query])
        spread += covariance + np.outer(mean, mean)
        squared_error += ((scores - a @ mean) ** 2).sum() + np.trace(a @ covariance @ a.T)
    np.testing.assert_allclose(total.moment_mx, moment_mx, rtol=1e-8)
    np.testing.assert_allclose(total.spread, spread, rtol=1e-8)
    assert total.squared_error == pytest.approx(squared_error, rel=1e-8)
    assert (total.n_queries, total.n_observed) == (20, 240)


def test_log_evidence_is_the_density_of_the_scores(world):
    from scipy.stats import multivariate_normal

    items, queries, matrix, truth = world
    expected = 0.0
    for query in range(5):
        anchors, scores = matrix.row(query)
        a = items[anchors].astype(np.float64)
        covariance = a @ truth.covariance @ a.T + truth.noise_variance * np.eye(len(a))
        expected += multivariate_normal.logpdf(scores, a @ (truth.weights @ queries[query]), covariance)
    assert e_step(truth, BayesInputs(items, queries, matrix, RAW), range(5)).log_evidence == pytest.approx(expected, rel=1e-6)


def test_statistics_of_disjoint_queries_add_up(world):
    items, queries, matrix, truth = world
    whole = e_step(truth, BayesInputs(items, queries, matrix, RAW), range(30))
    parts = e_step(truth, BayesInputs(items, queries, matrix, RAW), range(11)) + e_step(
        truth, BayesInputs(items, queries, matrix, RAW), range(11, 30)
    )
    for name in whole.__dataclass_fields__:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9)


def test_em_climbs_and_finds_the_parameters_that_made_the_scores(world):
    items, queries, matrix, truth = world
    evidence = []
    for iterations in (1, 3, 10, 40):
        model = fit_bayes(BayesInputs(items, queries, matrix, RAW), iterations=iterations, weight_penalty=1e-3)
        evidence.append(e_step(model, BayesInputs(items, queries, matrix, RAW), range(N_QUERIES)).log_evidence)
    assert evidence == sorted(evidence)
    assert evidence[-1] > e_step(truth, BayesInputs(items, queries, matrix, RAW), range(N_QUERIES)).log_evidence
    assert model.noise_variance == pytest.approx(truth.noise_variance, rel=0.1)
    np.testing.assert_allclose(model.weights, truth.weights, atol=0.2)
    np.testing.assert_allclose(model.covariance, truth.covariance, atol=0.35)


def test_whitened_ridge_is_the_posterior_mean(world):
    items, queries, matrix, truth = world
    embeddings, query_map = whiten(truth, items)
    anchors, scores = matrix.row(3)
    ridge = Ridge(embeddings, RAW, (query_map @ queries[3]).astype(np.float32), truth.noise_variance)
    mean, _ = posterior(truth, items, queries[3], anchors, scores)
    ridge.observe(anchors, scores)
    np.testing.assert_allclose(embeddings @ ridge.query_embedding, items @ mean, atol=1e-3)


def test_a_strong_penalty_keeps_the_identity(world):
    items, queries, matrix, _ = world
    model = fit_bayes(BayesInputs(items, queries, matrix, RAW), iterations=2, weight_penalty=1e9)
    np.testing.assert_allclose(model.weights, np.eye(DIM, FEATURES), atol=1e-5)


def test_an_empty_matrix_is_refused(world):
    items, queries, _, _ = world
    none = np.empty(0, dtype=np.int32)
    empty = ScoreMatrix.from_triples(none, none, np.empty(0, dtype=np.float32), N_QUERIES, N_ITEMS)
    with pytest.raises(InputError, match="score matrix is empty"):
        fit_bayes(BayesInputs(items, queries, empty, RAW))


def test_held_out_error_of_the_true_model_is_near_the_noise(world):
    items, queries, matrix, truth = world
    held_out = np.zeros(matrix.n_observed, dtype=np.bool_)
    held_out[::12] = True
    inputs = BayesInputs(items, queries, matrix.keep(~held_out), RAW)
    assert inputs.matrix.n_observed == 11 * N_QUERIES
    error = held_out_rmse(truth, inputs, matrix.keep(held_out))
    prior = np.einsum("nd,nd->n", (queries @ truth.weights.T)[matrix.query_index], items[matrix.item_index])
    prior_only = np.sqrt(np.mean((matrix.scores - prior) ** 2))
    assert np.sqrt(truth.noise_variance) < error < 0.5 * prior_only

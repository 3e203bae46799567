import numpy as np
import pytest
from scipy.stats import multivariate_normal

from axn_ray.core.bayes import BayesInputs, BayesModel, e_step, iterate_em, start_model, whiten
from axn_ray.core.estimators import Ridge
from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.errors import FitError

N_ITEMS, N_QUERIES, DIM, FEATURES = 120, 300, 6, 5
RAW = ScoreScale()
START = np.eye(DIM, FEATURES)


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


def inputs_of(items, queries, matrix, span=range(N_QUERIES)):
    return BayesInputs(items, queries[span.start : span.stop], matrix.rows(span), RAW)


def fit(items, queries, matrix, **settings):
    inputs = inputs_of(items, queries, matrix)
    start = start_model(START, float(np.var(matrix.scores)))
    *_, model = iterate_em(lambda model: e_step(model, inputs), start, START, **settings)
    return model


def posterior(model, items, x, anchors, scores):
    """The slow twin: the posterior in precision form, by plain inverses."""
    a = items[anchors].astype(np.float64)
    precision = np.linalg.inv(model.covariance) + a.T @ a / model.noise_variance
    prior = model.weights @ x
    covariance = np.linalg.inv(precision)
    return prior + covariance @ a.T @ (scores - a @ prior) / model.noise_variance, covariance


@pytest.mark.parametrize("per_query", [4, 12])  # fewer than there are numbers, and more: two ways to the same
def test_e_step_equals_plain_inverses(world, per_query):
    items, queries, matrix, truth = world
    items = items.astype(np.float64)
    matrix = matrix.keep(np.arange(matrix.n_observed) % 12 < per_query)
    total = e_step(truth, inputs_of(items, queries, matrix, range(20)))
    moment_mx, spread, squared_error, evidence = np.zeros((DIM, FEATURES)), np.zeros((DIM, DIM)), 0.0, 0.0
    for query in range(20):
        anchors, scores = matrix.row(query)
        mean, covariance = posterior(truth, items, queries[query], anchors, scores)
        a = items[anchors].astype(np.float64)
        moment_mx += np.outer(mean, queries[query])
        spread += covariance + np.outer(mean, mean)
        squared_error += ((scores - a @ mean) ** 2).sum() + np.trace(a @ covariance @ a.T)
        of_scores = a @ truth.covariance @ a.T + truth.noise_variance * np.eye(len(a))
        evidence += multivariate_normal.logpdf(scores, a @ (truth.weights @ queries[query]), of_scores)
    np.testing.assert_allclose(total.moment_mx, moment_mx, rtol=1e-8)
    np.testing.assert_allclose(total.spread, spread, rtol=1e-8)
    assert total.squared_error == pytest.approx(squared_error, rel=1e-8)
    assert total.log_evidence == pytest.approx(evidence, rel=1e-8)
    assert (total.n_queries, total.n_observed) == (20, 20 * per_query)


def test_batches_of_unlike_queries_add_up(world, monkeypatch):
    items, queries, matrix, truth = world
    items, kept = items.astype(np.float64), np.random.default_rng(1).random(matrix.n_observed) < 0.5
    inputs = inputs_of(items, queries, matrix.keep(kept))
    whole = e_step(truth, inputs)
    monkeypatch.setattr("axn_ray.core.bayes.BATCH_NUMBERS", 3 * DIM * 8)  # some of them of one query, some of many
    for name, value in vars(e_step(truth, inputs)).items():
        np.testing.assert_allclose(value, getattr(whole, name), rtol=1e-9)


def test_em_says_how_many_iterations_it_took(world):
    assert fit(*world[:3], iterations=2).iterations == 2
    assert 2 < fit(*world[:3], iterations=200).iterations < 200


def test_log_evidence_is_the_density_of_the_scores(world):
    items, queries, matrix, truth = world
    expected = 0.0
    for query in range(5):
        anchors, scores = matrix.row(query)
        a = items[anchors].astype(np.float64)
        covariance = a @ truth.covariance @ a.T + truth.noise_variance * np.eye(len(a))
        expected += multivariate_normal.logpdf(scores, a @ (truth.weights @ queries[query]), covariance)
    assert e_step(truth, inputs_of(items, queries, matrix, range(5))).log_evidence == pytest.approx(expected, rel=1e-6)


def test_uneven_queries_and_one_without_scores_equal_plain_inverses(world):
    items, queries, matrix, truth = world
    items, kept = items.astype(np.float64), np.random.default_rng(1).random(matrix.n_observed) < 0.4
    kept[matrix.indptr[3] : matrix.indptr[4]] = False
    uneven = matrix.keep(kept)
    counts = np.diff(uneven.indptr)[:20]
    total = e_step(truth, inputs_of(items, queries, uneven, range(20)))
    whole = np.zeros((DIM, FEATURES))
    evidence = 0.0
    for query in range(20):
        anchors, scores = uneven.row(query)
        prior = truth.weights @ queries[query]
        mean = posterior(truth, items, queries[query], anchors, scores)[0] if len(anchors) else prior
        whole += np.outer(mean, queries[query])
        covariance = items[anchors] @ truth.covariance @ items[anchors].T + truth.noise_variance * np.eye(len(anchors))
        evidence += multivariate_normal.logpdf(scores, items[anchors] @ prior, covariance) if len(anchors) else 0.0
    assert counts[3] == 0 and len(set(counts)) > 3
    np.testing.assert_allclose(total.moment_mx, whole, rtol=1e-8)
    assert total.log_evidence == pytest.approx(evidence, rel=1e-8)
    assert (total.n_queries, total.n_observed) == (20, counts.sum())


def test_statistics_of_disjoint_queries_add_up(world):
    items, queries, matrix, truth = world
    items = items.astype(np.float64)
    whole, *parts = (e_step(truth, inputs_of(items, queries, matrix, span)) for span in (range(30), range(11), range(11, 30)))
    for name in whole.__dataclass_fields__:
        np.testing.assert_allclose(getattr(parts[0] + parts[1], name), getattr(whole, name), rtol=1e-9)


def test_float32_features_give_the_same_model(world):
    items, queries, matrix, _ = world
    exact, fast = (fit(items.astype(dtype), queries, matrix, weight_penalty=1e-3) for dtype in (np.float64, np.float32))
    np.testing.assert_allclose(fast.covariance, exact.covariance, atol=1e-4)
    np.testing.assert_allclose(fast.weights, exact.weights, atol=1e-4)
    assert fast.noise_variance == pytest.approx(exact.noise_variance, rel=1e-4)


def test_em_climbs_and_finds_the_parameters_that_made_the_scores(world):
    items, queries, matrix, truth = world
    evidence = []
    for iterations in (1, 3, 10, 40):
        model = fit(items, queries, matrix, iterations=iterations, weight_penalty=1e-3)
        evidence.append(e_step(model, inputs_of(items, queries, matrix)).log_evidence)
    assert evidence == sorted(evidence)
    assert evidence[-1] > e_step(truth, inputs_of(items, queries, matrix)).log_evidence
    assert model.noise_variance == pytest.approx(truth.noise_variance, rel=0.1)
    np.testing.assert_allclose(model.weights, truth.weights, atol=0.2)
    np.testing.assert_allclose(model.covariance, truth.covariance, atol=0.35)


def test_whitened_ridge_is_the_posterior_mean(world):
    items, queries, matrix, truth = world
    item_map, query_map = whiten(truth)
    embeddings = (items @ item_map).astype(np.float32)
    anchors, scores = matrix.row(3)
    ridge = Ridge(embeddings, RAW, (query_map @ queries[3]).astype(np.float32), truth.noise_variance)
    mean, _ = posterior(truth, items, queries[3], anchors, scores)
    ridge.observe(anchors, scores)
    np.testing.assert_allclose(embeddings @ ridge.query_embedding, items @ mean, atol=1e-3)


def test_a_strong_penalty_keeps_the_identity(world):
    items, queries, matrix, _ = world
    model = fit(items, queries, matrix, iterations=2, weight_penalty=1e9)
    np.testing.assert_allclose(model.weights, np.eye(DIM, FEATURES), atol=1e-5)


def test_a_fit_ends_when_the_evidence_hardly_grows(world, caplog):
    items, queries, matrix, _ = world
    with caplog.at_level("INFO", logger="axn_ray.core.bayes"):
        fit(items, queries, matrix, iterations=500, weight_penalty=1e-3)
    evidence = [float(message.split("log evidence ")[1].split()[0]) for message in caplog.messages]
    gains = np.diff(evidence)
    assert 3 < len(evidence) < 200
    assert gains[:-1].min() >= 0.0009
    assert gains[-1] <= 0.0011


def test_scores_that_a_fit_cannot_bear_are_named(world):
    items, queries, matrix, _ = world
    with pytest.raises(FitError, match="log evidence is nan in iteration 1|not positive definite, at noise"):
        fit(items * np.float32("nan"), queries, matrix)

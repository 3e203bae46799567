import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from axn_ray.core import estimators
from axn_ray.core.estimators import RESOLUTION, Pinv, Ridge, Tour, least_squares, tour_gradient
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.errors import InputError

DIM = 32
RAW = ScoreScale()


def random_items(n=200, dim=DIM, seed=0):
    rng = np.random.default_rng(seed)
    items = rng.standard_normal((n, dim)).astype(np.float32)
    return items / np.linalg.norm(items, axis=1, keepdims=True)


def approx_scores(estimator, items, anchor_items, scores):
    """The scores of all items, given those of some."""
    estimator.observe(anchor_items, scores)
    embedding = estimator.query_embedding
    assert embedding.dtype == np.float32 and embedding.shape == items.shape[1:]
    return items @ embedding


def reference(anchors, targets):
    return np.linalg.pinv(anchors, rtol=RESOLUTION * max(anchors.shape)) @ targets


def anchors_with(kind, m):
    anchors = random_items(m).astype(np.float64)
    if kind == "duplicate rows":
        anchors[m // 2 :] = anchors[: m - m // 2]
    elif kind == "zero row":
        anchors[0] = 0.0
    elif kind == "dead dimensions":  # all-MiniLM-L6-v2 has three: two at 1e-33, one at 1e-8
        anchors[:, :2] *= 1e-33
        anchors[:, 2] *= 1e-9
    elif kind == "steep spectrum":
        anchors *= np.arange(1, DIM + 1) ** -2.0
    return anchors


@pytest.mark.parametrize("m", [1, 2, 7, DIM - 1, DIM, DIM + 1, 2 * DIM, 150])
@pytest.mark.parametrize("kind", ["random", "duplicate rows", "zero row", "dead dimensions", "steep spectrum"])
def test_least_squares_is_the_pseudo_inverse(kind, m):
    anchors, targets = anchors_with(kind, m), np.random.default_rng(1).standard_normal(m)
    expected = reference(anchors, targets)
    np.testing.assert_allclose(least_squares(anchors, targets), expected, atol=1e-6 * max(1.0, np.abs(expected).max()))


@settings(deadline=None)
@given(m=st.integers(1, 24), dim=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 999))
def test_least_squares_is_the_pseudo_inverse_at_any_rank(m, dim, rank, seed):
    rng = np.random.default_rng(seed)
    anchors = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, dim))
    targets = rng.standard_normal(m)
    expected = reference(anchors, targets)
    np.testing.assert_allclose(least_squares(anchors, targets), expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("m", [5, DIM - 2, 60])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_cholesky_and_svd_agree(m, penalty):
    anchors, targets = random_items(m).astype(np.float64), np.random.default_rng(1).standard_normal(m)
    by_svd = estimators._least_squares_by_svd(anchors, targets, penalty)
    np.testing.assert_allclose(least_squares(anchors, targets, penalty), by_svd, rtol=1e-7, atol=1e-10)


def test_a_dead_direction_is_dropped_and_not_amplified():
    anchors = anchors_with("dead dimensions", 100)
    u = least_squares(anchors, np.random.default_rng(1).standard_normal(100))
    assert np.abs(u[:3]).max() < 1e-6


def test_pinv_reproduces_the_anchors_scores_while_they_are_fewer_than_dim():
    items, scores = random_items(), np.random.default_rng(2).standard_normal(20).astype(np.float32)
    scale = ScoreScale(alpha=-3.0, beta=0.25)
    anchor_items = np.arange(50, 70, dtype=np.int32)
    approx = approx_scores(Pinv(items, scale), items, anchor_items, scores)
    np.testing.assert_allclose(approx[anchor_items], scale.scale(scores), atol=1e-5)


def test_pinv_gives_duplicated_anchors_their_mean():
    items = random_items()
    items[1] = items[0]
    approx = approx_scores(Pinv(items, RAW), items, np.array([0, 1, 2], np.int32), np.array([1, 3, 5], np.float32))
    np.testing.assert_allclose(approx[:3], [2, 2, 5], atol=1e-5)


def test_blend_mixes_in_the_query_embedding():
    items, u_param = random_items(), random_items(1, seed=3)[0]
    anchor_items, scores = np.arange(40, dtype=np.int32), np.random.default_rng(2).standard_normal(40).astype(np.float32)
    plain = approx_scores(Pinv(items, RAW), items, anchor_items, scores)
    np.testing.assert_array_equal(approx_scores(Pinv(items, RAW, 0.0, u_param), items, anchor_items, scores), plain)
    blended = approx_scores(Pinv(items, RAW, 0.3, u_param), items, anchor_items, scores)
    np.testing.assert_allclose(blended, 0.7 * plain + 0.3 * items @ u_param, atol=1e-5)
    only_prior = approx_scores(Pinv(items, RAW, 1.0, u_param), items, anchor_items, scores)
    np.testing.assert_allclose(only_prior, items @ u_param, atol=1e-6)


@pytest.mark.parametrize("m", [3, DIM, 90])
def test_ridge_is_the_posterior_mean(m):
    items, u_param = random_items(), random_items(1, seed=3)[0].astype(np.float64)
    scale, noise, prior = ScoreScale(alpha=1.0, beta=0.5), 0.4, 1.7
    anchor_items, scores = np.arange(m, dtype=np.int32), np.random.default_rng(2).standard_normal(m).astype(np.float32)
    a, v = scale.scale(scores).astype(np.float64), items[:m].astype(np.float64)
    k = prior * v @ v.T + noise * np.eye(m)
    u = u_param + prior * v.T @ np.linalg.solve(k, a - v @ u_param)
    got = approx_scores(Ridge(items, scale, u_param.astype(np.float32), noise, prior), items, anchor_items, scores)
    np.testing.assert_allclose(got, items @ u, atol=1e-5)


def test_a_prior_variance_for_each_direction_is_the_same_posterior_in_other_units():
    rng, scale = np.random.default_rng(4), ScoreScale(alpha=1.0, beta=0.5)
    items, u_param, units = random_items(), random_items(1, seed=3)[0], rng.uniform(0.1, 3.0, DIM).astype(np.float32)
    plain, other = Ridge(items, scale, u_param, 0.4), Ridge(items / units, scale, u_param * units, 0.4, units**2)
    scores = rng.standard_normal(60).astype(np.float32)
    for ridge in (plain, other):
        for anchors in np.arange(60, dtype=np.int32).reshape(2, 30):
            ridge.observe(anchors, scores[anchors])
    np.testing.assert_allclose(other.query_embedding / units, plain.query_embedding, atol=1e-5)
    asked = np.arange(90, 200, dtype=np.int32)
    np.testing.assert_allclose(other.variance(asked), plain.variance(asked), rtol=1e-4)
    with pytest.raises(InputError, match=r"a prior variance of shape \(3,\) for dim 32; give one, or one each"):
        Ridge(items, scale, u_param, 0.4, np.ones(3, np.float32))
    with pytest.raises(InputError, match=r"noise_variance=0.4, prior_variance=-1.0 must both be positive"):
        Ridge(items, scale, u_param, 0.4, np.where(np.arange(DIM) == 5, -1, 1).astype(np.float32))


@settings(deadline=None)
@given(
    shares=st.lists(st.integers(1, 40), min_size=1, max_size=6), prior=st.sampled_from([0.3, 1.0, 2.0]), seed=st.integers(0, 99)
)
def test_ridge_round_by_round_is_the_dense_posterior(shares, prior, seed):
    """Mean and variance from the full covariance matrix of u, by an explicit inverse, whatever the rounds."""
    rng, noise, scale = np.random.default_rng(seed), 0.4, ScoreScale(alpha=1.0, beta=0.5)
    items, u_param = random_items(300), random_items(1, seed=3)[0]
    items[5] = items[7]
    anchor_items, scores = rng.permutation(300)[: sum(shares)].astype(np.int32), rng.normal(-8, 3, sum(shares)).astype(np.float32)
    ridge = Ridge(items, scale, u_param, noise, prior)
    for start, end in itertools.pairwise([0, *np.cumsum(shares)]):
        ridge.observe(anchor_items[start:end], scores[start:end])
    anchors = items[anchor_items].astype(np.float64)
    covariance = np.linalg.inv(anchors.T @ anchors / noise + np.eye(DIM) / prior)
    mean = covariance @ (anchors.T @ scale.scale(scores) / noise + u_param / prior)
    np.testing.assert_allclose(ridge.query_embedding, mean, atol=1e-4)
    asked = np.arange(0, 300, 7, dtype=np.int32)
    np.testing.assert_allclose(
        ridge.variance(asked), np.einsum("id,de,ie->i", *[items[asked], covariance, items[asked]]), atol=1e-6
    )


def test_an_offset_is_what_the_embeddings_need_not_explain():
    items, u_param, scale = random_items(), random_items(1, seed=3)[0], ScoreScale(alpha=1.0, beta=0.5)
    offset = np.random.default_rng(4).standard_normal(len(items)).astype(np.float32)
    anchor_items, scores = np.arange(3, 40, dtype=np.int32), np.random.default_rng(2).standard_normal(37).astype(np.float32)
    shifted = Ridge(items, scale, u_param, 0.4, offset=offset)
    plain = Ridge(items, scale, u_param, 0.4)
    for part in (slice(0, 20), slice(20, 37)):
        shifted.observe(anchor_items[part], scores[part] + offset[anchor_items[part]] / scale.beta)
        plain.observe(anchor_items[part], scores[part])
    np.testing.assert_allclose(shifted.query_embedding, plain.query_embedding, atol=1e-4)
    np.testing.assert_array_equal(shifted.variance(anchor_items), plain.variance(anchor_items))
    with pytest.raises(InputError, match=r"an offset of shape \(4,\) for"):
        Ridge(items, scale, u_param, 0.4, offset=offset[:4])


def test_before_any_score_the_posterior_is_the_prior():
    items, u_param = random_items(), random_items(1, seed=3)[0]
    ridge = Ridge(items, RAW, u_param, 0.4, 2.0)
    np.testing.assert_array_equal(ridge.query_embedding, u_param)
    np.testing.assert_allclose(ridge.variance(np.arange(9, dtype=np.int32)), np.full(9, 2.0), rtol=1e-5)
    np.testing.assert_array_equal(Pinv(items, RAW, 0.3, u_param).query_embedding, u_param)
    assert Pinv(items, RAW).query_embedding is None


@pytest.mark.parametrize("m", [1, 20, DIM, 100])
def test_ridge_without_noise_around_zero_is_pinv(m):
    items = random_items()
    items[3] = items[0]
    anchor_items, scores = np.arange(m, dtype=np.int32), np.random.default_rng(2).standard_normal(m).astype(np.float32)
    ridge = approx_scores(Ridge(items, RAW, np.zeros(DIM, np.float32), noise_variance=1e-9), items, anchor_items, scores)
    np.testing.assert_allclose(ridge, approx_scores(Pinv(items, RAW), items, anchor_items, scores), atol=1e-3)


def test_ridge_with_all_noise_is_the_query_embedding_alone():
    items, u_param = random_items(), random_items(1, seed=3)[0]
    got = approx_scores(
        Ridge(items, RAW, u_param, noise_variance=1e9), items, np.arange(9, dtype=np.int32), np.ones(9, np.float32)
    )
    np.testing.assert_allclose(got, items @ u_param, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v, u: Pinv(v, RAW, 1.5, u), "blend=1.5 must lie in 0..1"),
        (lambda v, u: Pinv(v, RAW, 0.5), "needs a query embedding"),
        (lambda v, u: Pinv(v, RAW, 0.5, u[:3]), r"u_param \(3,\)"),
        (lambda v, u: Ridge(v, RAW, u, 0.0), "noise_variance=0.0, prior_variance=1.0 must both be positive"),
        (lambda v, u: Ridge(v, RAW, u, 1.0, float("nan")), "must both be positive"),
        (lambda v, u: Ridge(v, RAW, u * np.nan, 1.0), "u_param is NaN"),
        (lambda v, u: Tour(v, u, 0.0, 1.0), "learning_rate=0.0, temperature=1.0 must both be positive"),
        (lambda v, u: Tour(v, u, 1.0, -1.0), "must both be positive"),
        (lambda v, u: Tour(v, u[:3], 1.0, 1.0), r"u_param \(3,\)"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(random_items(), random_items(1)[0])


ESTIMATORS = [
    Pinv(random_items(), RAW),
    Ridge(random_items(), RAW, random_items(1)[0], 0.5),
    Tour(random_items(), random_items(1)[0], 1.0, 1.0),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
@pytest.mark.parametrize(
    ("items", "scores", "message"),
    [
        ([], [], "0 anchor items with 0 scores"),
        ([1, 2], [0.5], "2 anchor items with 1 scores"),
        ([1, 2], [0.5, np.nan], "item 2 has a score"),
    ],
)
def test_bad_anchors_are_refused(estimator, items, scores, message):
    with pytest.raises(InputError, match=message):
        estimator.observe(np.array(items, np.int32), np.array(scores, np.float32))


def test_a_broken_embedding_is_named():
    items = random_items()
    items[7, 3] = np.inf
    with pytest.raises(InputError, match="item 7 has a score or an embedding"):
        approx_scores(Pinv(items, RAW), items, np.array([6, 7], np.int32), np.ones(2, np.float32))


def test_without_a_scale_pinv_fits_one_to_its_anchors():
    rng = np.random.default_rng(3)
    items, u_param = rng.normal(size=(40, 6)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    anchors, scores = np.arange(12, dtype=np.int32), rng.normal(-8, 3, 12).astype(np.float32)
    fitted = ScoreScale.fit(scores, items[anchors] @ u_param)
    expected = approx_scores(Pinv(items, fitted), items, anchors, scores)
    np.testing.assert_allclose(approx_scores(Pinv(items, None, 0.0, u_param), items, anchors, scores), expected, rtol=1e-5)
    with pytest.raises(InputError, match="give u_param or a scale"):
        Pinv(items, None)


@pytest.mark.parametrize("scores", [[3.0, 3.0, 3.0], [3.0]], ids=["alike", "one"])
def test_without_a_scale_scores_that_do_not_differ_teach_nothing(scores):
    items, u_param = random_items(), np.ones(DIM, dtype=np.float32)
    estimator = Pinv(items, None, 0.0, u_param)
    estimator.observe(np.arange(len(scores), dtype=np.int32), np.array(scores, dtype=np.float32))
    np.testing.assert_array_equal(estimator.query_embedding, u_param)
    estimator.observe(np.array([7], dtype=np.int32), np.array([5.0], dtype=np.float32))
    assert np.isfinite(estimator.query_embedding).all() and (estimator.query_embedding != u_param).any()


def tour_loss(u, anchors, scores, temperature):
    labels = torch.softmax(scores / temperature, 0)
    return torch.nn.functional.cross_entropy((anchors @ u)[None], labels[None])


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("m", [1, 7, 60])
def test_tours_gradient_is_autograds(m, temperature):
    anchors, scores = torch.tensor(random_items(m)).double(), torch.randn(m, generator=torch.Generator().manual_seed(0)).double()
    u = torch.tensor(random_items(1, seed=3)[0]).double().requires_grad_()
    tour_loss(u, anchors, scores * 5, temperature).backward()
    got = tour_gradient(u.detach().numpy(), anchors.numpy(), scores.numpy() * 5, temperature)
    np.testing.assert_allclose(got, u.grad.numpy(), atol=1e-12)


def test_tour_takes_a_step_a_round_over_all_that_was_scored_by_then():
    items, u_param = random_items(), random_items(1, seed=3)[0]
    anchor_items = np.random.default_rng(1).permutation(200)[:10].astype(np.int32)
    scores = np.random.default_rng(2).normal(-8, 4, 10).astype(np.float32)
    tour = Tour(items, u_param, learning_rate=0.7, temperature=2.0)
    u = torch.tensor(u_param).double().requires_grad_()
    optimizer = torch.optim.SGD([u], lr=0.7)
    for start, end in ((0, 4), (4, 7), (7, 10)):
        optimizer.zero_grad()
        tour_loss(u, torch.tensor(items[anchor_items[:end]]).double(), torch.tensor(scores[:end]).double(), 2.0).backward()
        optimizer.step()
        got = approx_scores(tour, items, anchor_items[start:end], scores[start:end])
        np.testing.assert_allclose(got, items @ u.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(u_param, random_items(1, seed=3)[0])  # the prior is left as it was


def test_tour_does_not_care_where_the_ces_scores_begin():
    items, u_param = random_items(), random_items(1, seed=3)[0]
    anchor_items, scores = np.arange(20, dtype=np.int32), np.random.default_rng(2).standard_normal(20).astype(np.float32)
    two = [Tour(items, u_param, learning_rate=2.0, temperature=1.0) for _ in range(2)]
    moved = approx_scores(two[0], items, anchor_items, scores - 50.0)
    np.testing.assert_allclose(moved, approx_scores(two[1], items, anchor_items, scores), atol=1e-4)

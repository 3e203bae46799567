import numpy as np
import pytest

from axn_ray.core.bayes import iterate_em, start_model, whiten
from axn_ray.core.closed_form import (
    CONSTANT,
    VIEW_SCALE,
    Embedded,
    ItemFeatures,
    TrainData,
    embed,
    fit_model,
    in_one_process,
)
from axn_ray.core.estimators import Ridge
from axn_ray.core.held_out import Watch, fit_lexical_weight, held_out_rmse
from axn_ray.core.score_matrix import ScoreMatrix, ScoreScale
from axn_ray.errors import FitError, InputError

N_ITEMS, N_QUERIES, DIM, PER_QUERY = 400, 300, 5, 20
RAW = ScoreScale()


def unit(rng, n, dim):
    rows = rng.normal(size=(n, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    """Scores of which half come from what the dual-encoder sees, half from a view that it does not."""
    rng = np.random.default_rng(0)
    items, queries, view = unit(rng, N_ITEMS, DIM), unit(rng, N_QUERIES, DIM), unit(rng, N_ITEMS, 7)
    u = np.column_stack([queries + 0.2 * rng.normal(size=(N_QUERIES, DIM)), 0.5 * rng.normal(size=(N_QUERIES, 7))])
    scores = u @ np.column_stack([items, view]).T + 0.05 * rng.normal(size=(N_QUERIES, N_ITEMS))
    rows = np.repeat(np.arange(N_QUERIES, dtype=np.int32), PER_QUERY)
    columns = np.concatenate([rng.permutation(N_ITEMS)[:PER_QUERY] for _ in range(N_QUERIES)]).astype(np.int32)
    matrix = ScoreMatrix.from_triples(rows, columns, scores[rows, columns].astype(np.float32), N_QUERIES, N_ITEMS)
    return items, queries, view.astype(np.float16), matrix


def split(matrix):
    held_out = np.zeros(matrix.n_observed, dtype=np.bool_)
    held_out[::PER_QUERY] = True
    return matrix.keep(~held_out), matrix.keep(held_out)


def fitted(world, views, width=99):
    items, queries, _, matrix = world
    observed, held_out = split(matrix)
    features = ItemFeatures(items, views).reduce(width)
    embedded = embed(fit_model(TrainData(features, queries, observed, RAW), 8), features)
    return embedded, held_out_rmse(embedded, queries, RAW, observed, held_out)


def test_features_stand_side_by_side(world):
    items, _, view, _ = world
    features = ItemFeatures(items, [view, items])
    rows = np.array([7, 3])
    expected = np.column_stack([items[rows], VIEW_SCALE * view[rows], VIEW_SCALE * items[rows], [CONSTANT, CONSTANT]])
    np.testing.assert_allclose(features.take(rows), expected, rtol=1e-6)
    everything = np.concatenate([block for _, block in features.blocks()])
    np.testing.assert_allclose(features.moment(), everything.T.astype(np.float64) @ everything / N_ITEMS, atol=1e-6)


def test_reduced_features_keep_the_directions_in_which_items_differ(world):
    items, queries, view, _ = world
    whole = ItemFeatures(items, [view])
    assert whole.reduce(13) is whole
    reduced = whole.reduce(9)
    everything = np.arange(N_ITEMS)
    _, singular, right = np.linalg.svd(whole.take(everything), full_matrices=False)
    np.testing.assert_allclose(
        reduced.take(everything) @ reduced.basis.T, whole.take(everything) @ right[:9].T @ right[:9], atol=1e-4
    )
    lost = whole.take(everything) - reduced.take(everything) @ reduced.basis.T
    assert np.sum(lost**2) == pytest.approx(np.sum(singular[9:] ** 2), rel=1e-3)
    x = np.column_stack([queries, np.ones(N_QUERIES)])
    np.testing.assert_allclose(whole.take(everything) @ (x @ whole.start_weights().T).T, items @ queries.T, atol=1e-5)
    np.testing.assert_allclose(
        reduced.take(everything) @ reduced.start_weights(), (whole.take(everything) - lost) @ whole.start_weights(), atol=1e-4
    )


def test_a_share_holds_its_own_queries_and_their_items(world):
    items, queries, view, matrix = world
    data = TrainData(ItemFeatures(items, [view]), queries, matrix, ScoreScale(1.0, 2.0))
    share = data.share(range(100, 103))
    for row, query in enumerate(range(100, 103)):
        columns, scores = share.matrix.row(row)
        observed, expected = matrix.row(query)
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(share.item_features[columns], data.features.take(observed))
        np.testing.assert_array_equal(share.query_features[row], [*queries[query], 1.0])
    assert len(share.item_features) == len(set(np.concatenate([matrix.row(query)[0] for query in range(100, 103)])))


def test_an_empty_matrix_is_refused(world):
    items, queries, _, matrix = world
    empty = matrix.keep(np.zeros(matrix.n_observed, dtype=np.bool_))
    with pytest.raises(InputError, match="score matrix is empty"):
        fit_model(TrainData(ItemFeatures(items), queries, empty, RAW), 3)


def test_a_view_of_other_items_is_refused(world):
    items, _, view, _ = world
    with pytest.raises(InputError, match="a view of 399 items beside embeddings of 400"):
        ItemFeatures(items, [view[1:]])


def test_a_view_teaches_what_the_dual_encoder_does_not_see(world):
    alone, error_alone = fitted(world, [])
    embedded, error = fitted(world, [world[2]])
    assert error < 0.5 * error_alone
    assert error < 2 * 0.05  # the noise of the scores is 0.05
    assert alone.noise_variance > 4 * embedded.noise_variance
    assert embedded.item_embeddings.shape == (N_ITEMS, DIM + 7 + 1)


def test_items_stand_in_steps_of_each_direction(world, monkeypatch):
    items, queries, view, matrix = world
    features = ItemFeatures(items, [view])
    model = fit_model(TrainData(features, queries, matrix, RAW), 3)
    item_map, query_map = whiten(model)
    item_map[:, 4] = query_map[4] = 0.0  # a direction in which no item lies
    monkeypatch.setattr("axn_ray.core.closed_form.whiten", lambda model: (item_map, query_map))
    exact = features.take(slice(None)) @ item_map
    found = embed(model, features)
    assert found.item_embeddings.dtype == np.int8
    assert np.abs(found.item_embeddings).max(axis=0).tolist() == [127] * 4 + [0] + [127] * 8
    steps = np.sqrt(found.prior_variance)
    np.testing.assert_allclose(steps * found.item_embeddings, exact, atol=0.502 * np.abs(exact).max() / 127)
    np.testing.assert_allclose(np.delete(steps, 4), np.delete(np.abs(exact).max(axis=0), 4) / 127, rtol=1e-5)
    x = np.column_stack([queries, np.ones(N_QUERIES)])
    np.testing.assert_allclose(found.embed_queries(queries) / steps, x @ query_map.T, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("axn_ray.core.closed_form.SAMPLE", 2)  # the first and the last item say how long a step is
    few = embed(model, features)
    largest = np.abs(exact[[0, -1]]).max(axis=0)
    assert (np.abs(exact) > largest).any()
    within = np.clip(exact, -largest, largest)
    np.testing.assert_allclose(np.sqrt(few.prior_variance) * few.item_embeddings, within, atol=0.502 * largest.max() / 127)


def test_rounding_to_8_bits_costs_no_accuracy(world):
    items, queries, view, matrix = world
    observed, held_out = split(matrix)
    features = ItemFeatures(items, [view])
    model = fit_model(TrainData(features, queries, observed, RAW), 8)
    item_map, query_map = whiten(model)
    ones = np.ones(len(item_map), np.float32)
    exact = Embedded(features.take(slice(None)) @ item_map, query_map.astype(np.float32), ones, model.noise_variance)
    errors = [held_out_rmse(part, queries, RAW, observed, held_out) for part in (exact, embed(model, features))]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("sampled", [True, False])
def test_an_item_without_numbers_is_refused(world, monkeypatch, sampled):
    items, queries, view, matrix = world
    features = ItemFeatures(items, [view])
    model = fit_model(TrainData(features, queries, matrix, RAW), 1)
    broken = view.copy()
    broken[0 if sampled else 7] = np.inf
    monkeypatch.setattr("axn_ray.core.closed_form.SAMPLE", 2)
    with pytest.raises(FitError, match="item embeddings are NaN or infinite; check the scores"):
        embed(model, ItemFeatures(items, [broken]))


def test_fewer_numbers_are_more_noise(world):
    fits = [fitted(world, [world[2]], width) for width in (13, 8, 2)]
    errors, noises = [error for _, error in fits], [embedded.noise_variance for embedded, _ in fits]
    assert errors == sorted(errors)
    assert noises == sorted(noises)
    assert [embedded.item_embeddings.shape[1] for embedded, _ in fits] == [13, 8, 2]
    assert errors[2] > 3 * errors[0]


def test_held_out_error_is_that_of_the_posterior_by_plain_inverses(world):
    items, queries, view, matrix = world
    embedded, error = fitted(world, [view])
    observed, held_out = split(matrix)
    squared = 0.0
    for query in range(N_QUERIES):
        (anchors, scores), (others, expected) = observed.row(query), held_out.row(query)
        a, prior = embedded.item_embeddings[anchors].astype(np.float64), embedded.embed_queries(queries[[query]])[0]
        precision = np.diag(1 / embedded.prior_variance) + a.T @ a / embedded.noise_variance
        u = prior + np.linalg.inv(precision) @ a.T @ (scores - a @ prior) / embedded.noise_variance
        squared += np.sum((embedded.item_embeddings[others].astype(np.float64) @ u - expected) ** 2)
    assert error == pytest.approx(np.sqrt(squared / held_out.n_observed), rel=1e-6)
    assert isinstance(embedded, Embedded)


def test_held_out_error_of_many_queries_is_that_of_a_few_evenly_spaced(world, monkeypatch):
    _, queries, view, matrix = world
    embedded, every = fitted(world, [view])
    observed, held_out = split(matrix)
    monkeypatch.setattr("axn_ray.core.held_out.JUDGED", 3)
    few = held_out_rmse(embedded, queries, RAW, observed, held_out)
    chosen = np.isin(held_out.query_index, [0, (N_QUERIES - 1) // 2, N_QUERIES - 1])
    monkeypatch.undo()
    assert few == pytest.approx(held_out_rmse(embedded, queries, RAW, observed, held_out.keep(chosen)))
    assert few != pytest.approx(every)


def test_the_weight_of_a_feature_is_found_beside_the_embeddings(world):
    items, queries, view, matrix = world
    embedded, error = fitted(world, [view])
    observed, held_out = split(matrix)
    values = np.random.default_rng(5).random((N_QUERIES, N_ITEMS)).astype(np.float32)

    def weigh(true_weight):
        shifted = [
            ScoreMatrix(
                part.indptr, part.item_index, part.scores + true_weight * values[part.query_index, part.item_index], N_ITEMS
            )
            for part in (observed, held_out)
        ]
        weight = fit_lexical_weight(embedded, queries, RAW, shifted[0], values.__getitem__)
        errors = [
            held_out_rmse(embedded, queries, RAW, *shifted, offset)
            for offset in (None, lambda query: np.float32(true_weight) * values[query])
        ]
        return weight, errors

    weight, (without, with_feature) = weigh(0.3)
    assert weight == pytest.approx(0.3, abs=0.03)
    assert with_feature == pytest.approx(error, rel=1e-4)
    assert without > 1.2 * error
    assert weigh(0.0)[0] < 0.03
    assert weigh(-0.3)[0] == 0.0, "words that are shared never count against an item"


@pytest.mark.parametrize(("n_queries", "expected"), [(60, 60), (300, 100), (1000, 250)])
def test_the_first_iteration_reads_a_fourth_of_the_queries_that_have_scores(world, n_queries, expected):
    items, *_ = world
    rng = np.random.default_rng(1)
    queries = unit(rng, 2 * n_queries, DIM)
    rows = np.repeat(np.arange(0, 2 * n_queries, 2, dtype=np.int32), 3)  # every other query has none
    columns = np.tile(np.arange(3, dtype=np.int32), n_queries)
    matrix = ScoreMatrix.from_triples(rows, columns, rows.astype(np.float32), 2 * n_queries, N_ITEMS)
    part = TrainData(ItemFeatures(items), queries, matrix, RAW).scored().first_part()
    assert part.matrix.n_queries == len(part.query_embeddings) == expected
    chosen = part.matrix.scores.reshape(-1, 3)[:, 0].astype(int)  # each score is its query's number
    np.testing.assert_array_equal(part.query_embeddings, queries[chosen])
    assert len(set(chosen)) == expected
    assert chosen[-1] == 2 * n_queries - 2


def test_queries_without_scores_change_nothing(world):
    items, queries, view, matrix = world
    features = ItemFeatures(items, [view])
    model = fit_model(TrainData(features, queries, matrix, RAW), 3)
    indptr = np.concatenate([matrix.indptr, np.full(N_QUERIES, matrix.indptr[-1])])
    padded = ScoreMatrix(indptr, matrix.item_index, matrix.scores, N_ITEMS)
    same = fit_model(TrainData(features, np.concatenate([queries, queries]), padded, RAW), 3)
    np.testing.assert_array_equal(same.covariance, model.covariance)
    assert same.noise_variance == model.noise_variance


@pytest.mark.parametrize(
    ("errors", "patience", "best", "judged"),
    [([5, 4, 3, 2, 1, 0], 3, 6, 6), ([5, 1, 2, 2, 0, 0], 2, 2, 4), ([1, 1, 1, 1, 1, 1], 9, 1, 6)],
)
def test_the_best_iteration_is_kept_and_patience_ends_the_fit(world, errors, patience, best, judged):
    items, queries, view, matrix = world
    seen = []

    def judge(model):
        seen.append(model)
        return errors[len(seen) - 1]

    model = fit_model(TrainData(ItemFeatures(items, [view]), queries, matrix, RAW), 6, judge=judge, patience=patience)
    assert model.iterations == best
    assert len(seen) == judged


@pytest.mark.parametrize("watched", [3, 500])
def test_an_iteration_is_watched_by_the_held_out_error_of_its_model(world, monkeypatch, watched):
    items, queries, view, matrix = world
    observed, held_out = split(matrix)
    features = ItemFeatures(items, [view])
    model = fit_model(TrainData(features, queries, observed, RAW), 3)
    item_map, query_map = (part.astype(np.float32) for part in whiten(model))
    ones = np.ones(len(item_map), np.float32)
    exact = Embedded(features.take(slice(None)) @ item_map, query_map, ones, model.noise_variance)
    chosen = np.isin(held_out.query_index, [0, (N_QUERIES - 1) // 2, N_QUERIES - 1]) | (watched > N_QUERIES)
    expected = held_out_rmse(exact, queries, RAW, observed, held_out.keep(chosen))
    monkeypatch.setattr("axn_ray.core.held_out.WATCHED", watched)
    assert Watch(features, queries, RAW, observed, held_out).rmse(model) == pytest.approx(expected, rel=1e-4)


def test_held_out_error_of_a_query_with_very_many_scores_is_by_some_of_them(world, monkeypatch):
    _, queries, view, matrix = world
    embedded, every = fitted(world, [view])
    observed, held_out = split(matrix)
    monkeypatch.setattr("axn_ray.core.held_out.MOST_ANCHORS", 4)
    few = held_out_rmse(embedded, queries, RAW, observed, held_out)
    places = np.linspace(0, PER_QUERY - 2, 4).astype(int)
    some = observed.keep(np.isin(np.arange(observed.n_observed) % (PER_QUERY - 1), places))
    monkeypatch.undo()
    assert few == pytest.approx(held_out_rmse(embedded, queries, RAW, some, held_out))
    assert few > every


def test_dimensions_that_no_item_uses_do_not_end_in_a_prior_of_zero(world):
    items, queries, view, matrix = world
    zeros = np.zeros((N_ITEMS, 10), np.float32)
    for seed in range(12):
        used = np.random.default_rng(seed).permutation(DIM + 10)
        wide, wide_queries = (
            np.column_stack([part, np.zeros((len(part), 10), np.float32)])[:, used] for part in (items, queries)
        )
        features = ItemFeatures(wide, [view, zeros])
        found = embed(fit_model(TrainData(features, wide_queries, matrix, RAW), 3), features)
        assert (found.prior_variance > 0).all()
        prior = found.embed_queries(wide_queries[:1])[0]
        learned = Ridge(found.item_embeddings, RAW, prior, found.noise_variance, prior_variance=found.prior_variance)
        learned.observe(*matrix.row(0))
        assert np.isfinite(learned.query_embedding).all()


def test_from_a_part_of_the_queries_em_comes_to_the_same_model(world):
    items, queries, view, matrix = world
    data = TrainData(ItemFeatures(items, [view]), queries, matrix, RAW)
    prior = data.features.start_weights()
    *_, from_all = iterate_em(in_one_process(data), start_model(prior, float(np.var(matrix.scores))), prior, iterations=60)
    from_part = fit_model(data, 60)
    assert from_part.noise_variance == pytest.approx(from_all.noise_variance, rel=0.03)
    np.testing.assert_allclose(from_part.weights, from_all.weights, atol=0.02)

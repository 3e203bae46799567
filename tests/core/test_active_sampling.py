import numpy as np
import pytest

from axn_ray.core import active_sampling
from axn_ray.core.active_sampling import ActiveModel, choose_actively
from axn_ray.core.score_matrix import ScoreMatrix

N_ITEMS, DIM = 60, 6


@pytest.fixture
def world():
    """Items, queries, and some scores of each query: low-rank, and noise."""
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (N_ITEMS, 40))
    hidden = queries + 0.5 * rng.normal(size=queries.shape)
    exact = (hidden @ items.T + 0.01 * rng.normal(size=(40, N_ITEMS))).astype(np.float32)
    chosen = np.sort(np.argsort(rng.random((40, N_ITEMS)), axis=1)[:, :12], axis=1).astype(np.int32)
    rows = np.repeat(np.arange(40, dtype=np.int32), 12)
    observed = ScoreMatrix.from_triples(rows, chosen.ravel(), exact[rows, chosen.ravel()], 40, N_ITEMS)
    return items, queries, observed, exact


def test_of_many_queries_the_fit_looks_at_some_evenly_spaced(world, monkeypatch):
    items, queries, observed, _ = world
    every = ActiveModel.fit(observed, items, queries)
    monkeypatch.setattr(active_sampling, "FITTED", 14)
    some = ActiveModel.fit(observed, items, queries)
    rows = np.linspace(0, 39, 14).astype(np.int64)
    alone = ActiveModel.fit(observed.take(rows), items, queries[rows])
    np.testing.assert_array_equal(some.model.weights, alone.model.weights)
    assert some.scale == alone.scale != every.scale


def test_asks_for_new_items_and_finds_better_ones_than_chance(world):
    items, queries, observed, exact = world
    tempting = [next(item for item in np.argsort(-row) if item not in observed.row(n)[0]) for n, row in enumerate(exact)]
    failed = np.column_stack([np.arange(40), tempting]).astype(np.int32)
    space = ActiveModel.fit(observed, items, queries).space(items, queries, observed, failed)
    running, asked = choose_actively(space, range(5, 9), 10), []
    scores = None
    while True:
        try:
            query, item = running.send(scores)
        except StopIteration:
            break
        asked += list(zip(query.tolist(), item.tolist(), strict=True))
        scores = exact[query, item]
    assert len(asked) == len(set(asked)) == 40
    for query in range(5, 9):
        found = {item for asker, item in asked if asker == query}
        known = observed.row(query)[0].tolist()
        assert len(found) == 10 and not found & {*known, tempting[query]}
        best = set(np.argsort(-exact[query])[:10].tolist()) - {*known, tempting[query]}
        assert len(found & best) / len(best) > 0.5  # 10 of the 48 that are left, by chance: 0.21

import numpy as np
import pytest

from axn_ray import sample
from axn_ray.core.artifact import hash_json
from axn_ray.core.corpus import Items, read_items, read_queries
from axn_ray.core.known_scores import KnownFirst, KnownScores
from axn_ray.core.pairs import PairScorer, PairScores
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import Scores, digest_texts, load_scores
from axn_ray.errors import ArtifactError, InputError

CE = {"model": "m", "dtype": "float32"}


def store(queries, items, triples, fingerprint=CE):
    """Scores in memory, of these texts: triples of (query row, item row, score)."""
    q, i, s = (np.array(column) for column in zip(*triples, strict=True))
    matrix = ScoreMatrix.from_triples(
        q.astype(np.int32), i.astype(np.int32), s.astype(np.float32), n_queries=len(queries), n_items=len(items)
    )
    ids = [tuple(f"{side}{row}" for row in range(len(texts))) for side, texts in (("q", queries), ("i", items))]
    digests = [tuple(digest_texts(texts)) for texts in (queries, items)]
    return Scores(matrix, *ids, *digests, {"cross_encoder": hash_json(fingerprint)}, {"fingerprint": fingerprint})


def every_pair(n_queries, n_items):
    return np.repeat(np.arange(n_queries, dtype=np.int32), n_items), np.tile(np.arange(n_items, dtype=np.int32), n_queries)


class Counter(PairScorer):
    """Scores 100 * query + item, fails where told to, and remembers what it was asked."""

    def __init__(self, failing=()):
        self.fingerprint, self.asked, self.failing = CE, [], set(failing)

    def tokenize(self, texts):
        return tuple(texts)

    def score_pairs(self, queries, items, query_index, item_index):
        pairs = list(zip(query_index.tolist(), item_index.tolist(), strict=True))
        self.asked += pairs
        failures = {row: "no" for row, pair in enumerate(pairs) if pair in self.failing}
        scores = np.array([np.nan if p in self.failing else 100 * p[0] + p[1] for p in pairs], dtype=np.float32)
        return PairScores(scores, failures, n_truncated=1)


def test_pairs_are_found_by_text_in_another_order_and_another_subset():
    made = store(["q a", "q b", "q c"], ["x", "y", "z"], [(0, 0, 1.0), (0, 2, 0.0), (1, 1, 3.0), (2, 0, 4.0)])
    known = KnownScores.of([made], hash_json(CE), ["new", "q b", "q a"], ["z", "w", "y", "x"])
    found, scores = known.lookup(*every_pair(3, 4))
    expected = np.full((3, 4), np.nan)
    expected[1, 2], expected[2, 0], expected[2, 3] = 3.0, 0.0, 1.0
    np.testing.assert_array_equal(scores.reshape(3, 4), expected.astype(np.float32))
    np.testing.assert_array_equal(found.reshape(3, 4), ~np.isnan(expected))
    assert (len(known), scores.dtype, known.keys.dtype) == (3, np.float32, np.int64)


def test_a_text_that_comes_twice_is_one_text_on_both_sides():
    made = store(["q", "q"], ["x", "x", "y"], [(0, 0, 1.0), (1, 1, 2.0), (1, 2, 3.0)])
    known = KnownScores.of([made], hash_json(CE), ["q", "r", "q"], ["y", "x", "y", "x"])
    _, scores = known.lookup(*every_pair(3, 4))
    nan = np.nan
    np.testing.assert_array_equal(scores.reshape(3, 4), np.array([[3, 1, 3, 1], [nan] * 4, [3, 1, 3, 1]], dtype=np.float32))


def test_the_first_store_wins():
    first, second = (store(["q"], ["x", "y"], triples) for triples in ([(0, 1, 1.0)], [(0, 0, 5.0), (0, 1, 6.0)]))
    for stores, expected in [([first, second], [5.0, 1.0]), ([second, first], [5.0, 6.0])]:
        known = KnownScores.of(stores, hash_json(CE), ["q"], ["x", "y"])
        assert known.lookup(*every_pair(1, 2))[1].tolist() == expected


def test_equals_a_dictionary_of_texts_on_random_stores():
    rng = np.random.default_rng(0)
    texts = np.array([f"text {n}" for n in range(40)])
    stores, expected = [], {}
    for _ in range(3):
        queries, items = rng.choice(texts, 12, replace=False).tolist(), rng.choice(texts, 30, replace=False).tolist()
        chosen = rng.permutation(12 * 30)[:150]
        triples = [(c // 30, c % 30, rng.normal()) for c in chosen]
        stores.append(store(queries, items, triples))
        for q, i, s in triples:
            expected.setdefault((queries[q], items[i]), np.float32(s))
    queries, items = rng.permutation(texts)[:30].tolist(), rng.permutation(texts)[:25].tolist()
    known = KnownScores.of(stores, hash_json(CE), queries, items)
    query_index, item_index = every_pair(30, 25)
    found, scores = known.lookup(query_index, item_index)
    for q, i, hit, score in zip(query_index, item_index, found, scores, strict=True):
        assert hit == ((queries[q], items[i]) in expected)
        assert not hit or score == expected[queries[q], items[i]]
    for query in range(30):
        rows = np.zeros(25, dtype=np.int32)
        alone = known.of_query(query).lookup(rows, np.arange(25, dtype=np.int32))[1]
        np.testing.assert_array_equal(alone, scores.reshape(30, 25)[query])


def test_nothing_known_and_indices_of_another_job():
    known = KnownScores.of([], hash_json(CE), ["q"], ["x", "y"])
    found, scores = known.lookup(*every_pair(1, 2))
    assert (found.tolist(), np.isnan(scores).all(), len(known)) == ([False, False], True, 0)
    assert len(known.of_query(None)) == len(known.of_query(0)) == 0
    with pytest.raises(InputError, match="item index outside the 2 texts"):
        known.lookup(*every_pair(1, 3))


def test_scores_of_another_cross_encoder_are_refused_and_both_are_named():
    other = store(["q"], ["x"], [(0, 0, 1.0)], fingerprint={"imported": "their model"})
    mine = store(["q"], ["x"], [(0, 0, 1.0)])
    with pytest.raises(ArtifactError, match=f"number 2 .*{hash_json({'imported': 'their model'})[:12]}.*their model.*") as raised:
        KnownScores.of([mine, other], hash_json(CE), ["q"], ["x"])
    assert hash_json(CE)[:12] in str(raised.value)


def test_known_first_pays_only_for_the_rest_and_puts_failures_in_their_rows():
    known = KnownScores.of([store(["a", "b"], ["x", "y", "z"], [(0, 0, -1.0), (1, 1, -2.0)])], hash_json(CE), "ab", "xyz")
    inner = Counter(failing=[(0, 2), (1, 2)])
    scorer = KnownFirst(inner, known)
    assert scorer.fingerprint == CE and scorer.hit_rate == 0
    scored = scorer.score_pairs(scorer.tokenize("ab"), scorer.tokenize("xyz"), *every_pair(2, 3))
    assert inner.asked == [(0, 1), (0, 2), (1, 0), (1, 2)]
    np.testing.assert_array_equal(scored.scores, np.array([-1, 1, np.nan, 100, -2, np.nan], dtype=np.float32))
    assert (dict(scored.failures), scored.n_truncated) == ({2: "no", 5: "no"}, 1)
    again = scorer.score_pairs("ab", "xyz", np.array([1], dtype=np.int32), np.array([1], dtype=np.int32))
    assert (again.scores.tolist(), len(inner.asked), scorer.n_known, scorer.n_asked, scorer.hit_rate) == ([-2.0], 4, 3, 4, 3 / 7)


def test_the_bundled_scores_in_a_shuffled_and_renamed_corpus():
    stored = load_scores(sample.EXACT_SCORES)
    items, queries = read_items(sample.ITEMS, ["verb"]), read_queries(sample.QUERIES, ["verb"])
    rng = np.random.default_rng(0)
    item_rows = rng.permutation(len(items))[:5000]
    query_rows = rng.permutation([queries.index_of[i] for i in stored.query_ids])[:40].tolist()
    renamed = Items(
        tuple(f"other-{n}" for n in range(5000)),
        tuple(items.titles[r] for r in item_rows),
        tuple(items.texts[r] for r in item_rows),
    )
    texts = [queries.texts[r] for r in query_rows] + ["a query that nobody has [scored]"]
    known = KnownScores.of([stored], stored.made_from["cross_encoder"], texts, renamed.full_texts)
    found, scores = known.lookup(*every_pair(41, 5000))
    assert found.reshape(41, 5000)[:40].all() and not found.reshape(41, 5000)[40].any()
    row_of = {query_id: row for row, query_id in enumerate(stored.query_ids)}
    wanted = [row_of[queries.ids[r]] for r in query_rows]
    np.testing.assert_array_equal(scores.reshape(41, 5000)[:40], stored.dense()[np.ix_(wanted, item_rows)])

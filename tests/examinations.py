"""A small synthetic world in which dual-encoder and cross-encoder agree in part: for the tests of search and examiner."""

import numpy as np

from axn_ray.core.evaluation import EvaluationPlan, ExactScores, Examination
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.graph_search import neighbour_graph
from axn_ray.core.methods import METHODS, choose_methods
from axn_ray.core.score_matrix import ScoreScale
from axn_ray.core.search_space import Embeddings, SearchSpace, cur_embeddings

WORDS = ("run", "walk", "eat", "sleep", "throw", "catch", "sing", "paint", "climb", "swim")


def make_world(n_queries=6, n_items=300, dim=16, seed=0):
    """Search space and exact scores; every CE score is finite and distinct."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal((n_items, dim)).astype(np.float32)
    wishes = rng.standard_normal((n_queries, dim)).astype(np.float32)
    exact = (wishes @ truth.T + rng.standard_normal((n_queries, n_items))).astype(np.float32)

    def seen(x, noise):
        return (x + noise * rng.standard_normal(x.shape)).astype(np.float32)

    def score(n):  # other queries against every item
        noise = rng.standard_normal((n, n_items))
        return (rng.standard_normal((n, dim)) @ truth.T + noise).astype(np.float32)

    scale = ScoreScale(alpha=0.5, beta=0.8)
    embeddings = {
        "de": Embeddings(seen(truth, 1.0), seen(wishes, 1.0), scale, index_ce_calls=0),
        "mf_trns": Embeddings(seen(truth, 0.2), seen(wishes, 1.0), scale, index_ce_calls=9000),
        "mf_ind": Embeddings(seen(truth, 0.3), seen(wishes, 0.5), ScoreScale(), index_ce_calls=9000),
        "bayes": Embeddings(seen(truth, 0.3), seen(wishes, 0.5), ScoreScale(), noise_variance=1.0, index_ce_calls=6000),
    }
    graphs = {"de": neighbour_graph(embeddings["de"].items, 16)}
    texts = tuple(" ".join(rng.choice(WORDS, 4)) for _ in range(n_items))
    queries = tuple(" ".join(rng.choice(WORDS, 2)) for _ in range(n_queries))
    embeddings["cur"] = cur_embeddings(score(40))
    space = SearchSpace(embeddings, queries, Bm25Index(texts), graphs)
    return space, ExactScores(tuple(f"q{i}" for i in range(n_queries)), exact)


def small_rounds(rounds=4):
    """All methods of the table, those that search with few rounds."""
    return choose_methods([*METHODS], [rounds])


def make_examination(labels=True, budgets=(20, 60), ks=(1, 10, 20), **world):
    """An evaluation of all methods; the labelled item is the CE's second best."""
    space, exact = make_world(**world)
    second = np.argsort(-exact.scores, axis=1)[:, 1].astype(np.int32) if labels else None
    return Examination(space, exact, EvaluationPlan(small_rounds(), budgets, ks), second)


def untimed(table):
    """An evaluation's table without what the clock says."""
    return table.drop_columns(["search_seconds"]).combine_chunks()

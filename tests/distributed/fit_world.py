"""A small world for fits, in memory and as the artifacts that the factorize stage reads."""

import numpy as np

from axn_ray.core.artifact import Manifest, seal
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.embedded_corpus import EmbeddedCorpus, save_embedded_corpus
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import write_ids, write_shard

QUERIES_PER_SHARD = 40


def make_world(n_queries=300, n_items=2000, dim=32, per_query=60):
    """Scores that a linear distortion of the embeddings explains: matrix, items, queries."""
    rng = np.random.default_rng(0)
    items, queries = (rng.normal(scale=dim**-0.5, size=(n, dim)).astype(np.float32) for n in (n_items, n_queries))
    distortion = np.eye(dim) + 0.25 * rng.normal(size=(dim, dim))
    scores = (3 * queries @ distortion @ items.T - 4).astype(np.float32)
    rows = np.repeat(np.arange(n_queries), per_query)
    columns = np.concatenate([rng.permutation(n_items)[:per_query] for _ in range(n_queries)])
    return ScoreMatrix.from_triples(rows, columns, scores[rows, columns], n_queries, n_items), items, queries


def save_world(folder, matrix, items, queries, item_texts=None, query_texts=None):
    """Artifacts `embeddings` and `scores` in `folder`; the embeddings hold a query that has no scores before the others.

    Without texts the ids are the texts.
    """
    item_ids, query_ids = ([f"{side}{n}" for n in range(count)] for side, count in (("i", len(items)), ("q", len(queries))))
    every = ["unscored", *query_ids]
    corpus = EmbeddedCorpus(
        items=Items(ids=tuple(item_ids), texts=tuple(item_texts or item_ids), titles=("",) * len(items)),
        queries=Queries(ids=tuple(every), texts=("unscored", *(query_texts or query_ids))),
        splits=("test",) + ("train",) * len(queries),
        item_embeddings=items,
        query_embeddings=np.vstack([queries[:1], queries]),
        dual_encoder="de",
    )
    embeddings, scores = folder / "embeddings", folder / "scores"
    embeddings.mkdir()
    save_embedded_corpus(embeddings, corpus)
    seal(embeddings, Manifest(kind="embeddings", config={"dual_encoder": "de"}, counts={}, made_from={}))
    for shard in range(-(-len(queries) // QUERIES_PER_SHARD)):
        at = matrix.query_index // QUERIES_PER_SHARD == shard
        write_shard(scores, shard, matrix.query_index[at], matrix.item_index[at], matrix.scores[at], {})
    write_ids(scores, "queries.parquet", "query_id", query_ids, query_texts or query_ids)
    write_ids(scores, "items.parquet", "item_id", item_ids, item_ids)
    made_from = {"items": corpus.items.fingerprint, "queries": corpus.queries.fingerprint}
    seal(scores, Manifest(kind="scores", config={}, counts={"pairs": matrix.n_observed}, made_from=made_from))
    return embeddings, scores

"""A driver to be killed: `python -m tests.distributed.scoring_driver OUT` scores the corpus of the fault tests."""

import sys
from pathlib import Path

import numpy as np

from axn_ray.core.corpus import Items, Queries
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.score import ScoreConfig, score
from tests.distributed.scorers import Slow

WORDS = "run walk close open bank dog house river slow fast eat drink speak shut move stand".split()


def make_corpus(n_items=300, n_queries=100, bad_item=None):
    """Random words; `bad_item` goes into item 7."""
    rng = np.random.default_rng(0)
    texts = [f"{n} " + " ".join(rng.choice(WORDS, rng.integers(4, 30))) for n in range(n_items + n_queries)]
    if bad_item:
        texts[7] = bad_item
    items = Items(tuple(f"i{n}" for n in range(n_items)), ("",) * n_items, tuple(texts[:n_items]))
    queries = Queries(tuple(f"q{n}" for n in range(n_queries)), tuple(texts[n_items:]))
    embeddings = rng.normal(size=(len(texts), 8)).astype(np.float32)
    return EmbeddedCorpus(items, queries, ("train",) * n_queries, embeddings[:n_items], embeddings[n_items:], "given")


def make_config(scorer="Slow", **settings):
    """Every pair, 50 shards."""
    given = {"choice": "all", "shard_pairs": 600, "workers": 2, "random_share": 0.0, "active_share": 0.0, **settings}
    return ScoreConfig(cross_encoder=f"python:tests.distributed.scorers:{scorer}", **given)


def score_slowly(corpus):
    """What `Slow` gives for every pair (queries, items), without Ray: the slow twin, which does not wait."""
    scorer = Slow()
    scorer.seconds = 0
    rows = [scorer.score_texts([text] * len(corpus.items), corpus.items.full_texts) for text in corpus.queries.texts]
    return np.array(rows, dtype=np.float32)


if __name__ == "__main__":
    join_cluster()
    score(make_corpus(), make_config(), Path(sys.argv[1]))

"""`make bench-search`: what a round costs outside the cross-encoder, by number of items, and which index should answer it.

Rounds: the index's answer and the estimator's update of b searches at once, beside the bare product of the same size and
the cross-encoder's time for the pairs that the round chooses. Kinds: a synthetic world that the fitted model describes
(clustered items, queries around a prior), searched to the end over each kind of index. All on this machine's cores.
"""

import sys
import time
from dataclasses import replace

import faiss
import numpy as np
import torch

from axn_ray import sample
from axn_ray.core.adaptive import run_search, search
from axn_ray.core.corpus import read_items, read_queries
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.estimators import Ridge
from axn_ray.core.index import ItemIndex, Retrieve, Retrieved
from axn_ray.core.metrics import exact_top_k, recall_at_k
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.score_matrix import ScoreScale
from tests.benchmarks.common import record

DIM, PER_ROUND, SCORED = 128, 10, 50  # a budget of 100 in ten rounds, half way
SIZES = [(10_000, "float32"), (100_000, "float32"), (1_000_000, "float32"), (1_000_000, "int8")]
SIZES += [(10_000_000, "float16"), (10_000_000, "int8")]
BATCHES = (1, 8, 32)
BUDGET, ROUNDS, NOISE = 100, 10, 0.05
SEARCHED = {100_000: 20, 1_000_000: 20, 10_000_000: 10}  # queries
PER_LIST = 40  # items that train a list of IVF; FAISS asks for 39
LARGEST_HNSW = 1_000_000  # ten times the items take it 29 times as long to build


def seconds(work, repeats=5):
    """The best of a few runs, after one that warms up."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def ce_seconds_per_pair(n=320):
    """The sample's cross-encoder on pairs of its own corpus."""
    scorer = open_cross_encoder(CrossEncoderConfig())
    items, queries = read_items(sample.ITEMS), read_queries(sample.QUERIES)
    tokens = scorer.tokenize_queries(queries.texts[:32]), scorer.tokenize(items.full_texts[:5000])
    rng = np.random.default_rng(0)
    pairs = np.repeat(np.arange(32, dtype=np.int32), n // 32), rng.permutation(5000)[:n].astype(np.int32)
    return seconds(lambda: scorer.score(*tokens, *pairs), repeats=2) / n


def draw(n, rng, dtype=np.float32):
    """n items of unit norm, of norm 127 in int8: clusters of fifty, variance that falls with the dimension; made in blocks."""
    spread = (np.arange(1, DIM + 1) ** -0.5).astype(np.float32)
    centres = rng.standard_normal((max(1, n // 50), DIM), dtype=np.float32)
    items = np.empty((n, DIM), dtype=dtype)
    for start in range(0, n, 1 << 17):
        block = items[start : start + (1 << 17)]
        drawn = centres[rng.integers(len(centres), size=len(block))] + rng.standard_normal(block.shape, dtype=np.float32)
        drawn *= spread
        drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
        block[:] = drawn if dtype != np.int8 else np.rint(127 * drawn)
    return items


def time_rounds(ce_second):
    """A row per size and batch."""
    rows = []
    for n_items, dtype in SIZES:
        rng = np.random.default_rng(0)
        items = draw(n_items, rng, np.dtype(dtype))
        index, tensor = ItemIndex(items), torch.from_numpy(items)
        for batch in BATCHES:
            queries = rng.standard_normal((batch, DIM), dtype=np.float32)
            scored = rng.choice(n_items, SCORED, replace=False).astype(np.int32)
            requests = [Retrieve(query, PER_ROUND, scored) for query in queries]
            repeats = 5 if n_items < 10_000_000 else 2
            retrieve = seconds(lambda index=index, requests=requests: index.retrieve(requests), repeats)
            update = min(update_seconds(items, queries, scored) for _ in range(5))
            by = torch.from_numpy(queries).to(tensor.dtype)
            bare = seconds(lambda by=by, tensor=tensor: by @ tensor.T, repeats) if dtype == "float32" else None
            ms = {"retrieve": retrieve, "update": update, "bare_product": bare, "cross_encoder": ce_second * PER_ROUND * batch}
            row = {"items": n_items, "dtype": dtype, "batch": batch}
            row |= {f"{name}_ms_per_query": value and round(1e3 * value / batch, 3) for name, value in ms.items()}
            rows.append(row)
    return rows


def update_seconds(items, queries, scored):
    """The update of each query's search by one round's scores, half way through its budget."""
    ridges = [Ridge(items, ScoreScale(), query, NOISE) for query in queries]
    for ridge in ridges:
        ridge.observe(scored, np.zeros(SCORED, np.float32))
    start = time.perf_counter()
    for ridge in ridges:
        ridge.observe(scored[:PER_ROUND], np.zeros(PER_ROUND, np.float32))
    return time.perf_counter() - start


class Faiss:
    """A FAISS index that answers as `ItemIndex` does: it finds as many more as are excluded."""

    def __init__(self, index):
        self.index = index

    def retrieve(self, requests):
        wanted = max(request.n + len(request.excluded) for request in requests)
        scores, found = self.index.search(np.stack([request.query_embedding for request in requests]), wanted)
        replies = []
        for request, row, score in zip(requests, found, scores, strict=True):
            new = np.flatnonzero(~np.isin(row, request.excluded) & (row >= 0))[: request.n]
            replies.append(Retrieved(row[new].astype(np.int32), score[new]))
        return replies


class Steps:
    """`ItemIndex` over int8 as `bayes` keeps it: each direction in steps of its own, which the queries take in."""

    def __init__(self, items):
        blocks = [slice(start, start + (1 << 17)) for start in range(0, len(items), 1 << 17)]
        self._steps = np.max([np.abs(items[block]).max(axis=0) for block in blocks], axis=0) / 127
        self._index = ItemIndex(np.concatenate([np.rint(items[block] / self._steps).astype(np.int8) for block in blocks]))

    def retrieve(self, requests):
        return self._index.retrieve([replace(each, query_embedding=each.query_embedding * self._steps) for each in requests])


def kinds(n_items):
    """Ways to hold the items, each as a function that builds it from them (n_items, DIM), and bytes per item."""

    def ivf(items):
        lists = int(4 * n_items**0.5)
        coarse = "_HNSW32" if n_items > LARGEST_HNSW else ""  # finds the lists sooner, of very many
        index = faiss.index_factory(DIM, f"IVF{lists}{coarse},Flat", faiss.METRIC_INNER_PRODUCT)
        index.train(items[:: max(1, n_items // (PER_LIST * lists))])
        index.add(items)
        index.nprobe = 32
        return Faiss(index)

    def factory(name, train=False):
        def build(items):
            index = faiss.index_factory(DIM, name, faiss.METRIC_INNER_PRODUCT)
            if train:
                index.train(items[:50_000])
            index.add(items)
            return Faiss(index)

        return build

    ways = {
        "ItemIndex float32": (ItemIndex, 4 * DIM),
        "ItemIndex float16": (lambda items: ItemIndex(items.astype(np.float16)), 2 * DIM),
        "ItemIndex int8": (Steps, DIM),
        "FAISS Flat": (factory("Flat"), 4 * DIM),
        "FAISS SQfp16": (factory("SQfp16"), 2 * DIM),
        "FAISS SQ8": (factory("SQ8", train=True), DIM),
        "FAISS IVF, nprobe 32": (ivf, 4 * DIM + 8),
    }
    if n_items <= LARGEST_HNSW:
        ways["FAISS HNSW32"] = (factory("HNSW32"), 4 * DIM + 2 * 32 * 4)
    return ways


def compare_kinds():
    """A row per size and kind: build seconds, bytes, milliseconds, and the recall at the end of whole searches."""
    rows = []
    for n_items, n_queries in SEARCHED.items():
        rng = np.random.default_rng(1)
        items = draw(n_items, rng)
        scale = np.float32(1 / (items[:10_000] @ items[:100].T).std())  # u's components
        prior = scale * items[rng.choice(n_items, n_queries)] + rng.standard_normal((n_queries, DIM), dtype=np.float32)
        u = prior + rng.standard_normal((n_queries, DIM), dtype=np.float32)
        exact = u @ items.T
        exact += np.float32(NOISE**0.5) * rng.standard_normal(exact.shape, dtype=np.float32)
        requests = [Retrieve(query, PER_ROUND, np.empty(0, np.int32)) for query in prior]
        for kind, (build, size) in kinds(n_items).items():
            start = time.perf_counter()
            index = build(items)
            built = time.perf_counter() - start
            recalls = [whole_search(index, items, prior[query], exact[query]) for query in range(n_queries)]
            rows.append(
                {
                    "items": n_items,
                    "kind": kind,
                    "build_seconds": round(built, 1),
                    "megabytes": round(size * n_items / 2**20),
                    "ms_per_query_alone": round(1e3 * seconds(lambda i=index, r=requests: i.retrieve(r[:1]), 3), 2),
                    "ms_per_query_of_8": round(1e3 * seconds(lambda i=index, r=requests: i.retrieve(r[:8]), 3) / 8, 2),
                    "recall_at_10": round(float(np.mean(recalls)), 4),
                    "queries": n_queries,
                }
            )
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
    return rows


def whole_search(index, items, prior, exact):
    """Recall@10 of one adaptive search over this index."""
    running = search(Ridge(items, ScoreScale(), prior, NOISE), None, n_items=len(items), budget=BUDGET, rounds=ROUNDS)
    result = run_search(running, lambda chosen: exact[chosen], lambda request: index.retrieve([request])[0])
    return recall_at_k(result.item_index, exact_top_k(exact, 10))


def main():
    """Time, compare, record."""
    ce_second = ce_seconds_per_pair()
    rounds, ways = time_rounds(ce_second), compare_kinds()
    million = next(row for row in rounds if (row["items"], row["dtype"], row["batch"]) == (1_000_000, "float32", 8))
    outside = million["retrieve_ms_per_query"] + million["update_ms_per_query"]
    record(
        "search",
        {"dim": DIM, "items_per_round": PER_ROUND, "ce_ms_per_pair": round(1e3 * ce_second, 2), "rounds": rounds, "kinds": ways},
        million_of_8_ms=round(outside, 2),
        bare_product_ms=million["bare_product_ms_per_query"],
        cross_encoder_ms=million["cross_encoder_ms_per_query"],
    )


if __name__ == "__main__":
    main()

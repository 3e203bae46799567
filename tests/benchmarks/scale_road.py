"""The stages of `make bench-scale`, each in a process of its own: `python -m tests.benchmarks.scale_road SIZE STAGE`.

The corpus is the sample's, repeated: a repetition's text goes on with "; see" and the title of another item. Two stand-ins
cost little: the cross-encoder (`tests.benchmarks.stand_in`) and the dual-encoder (all-MiniLM-L6-v2 cut after its first layer).
"""

import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import torch
from sentence_transformers import SentenceTransformer

from axn_ray import sample
from axn_ray.core.corpus import read_items, read_queries
from axn_ray.core.cross_encoder import CrossEncoder
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.embedded_corpus import load_embedded_corpus
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.models import MINILM, locate_model
from axn_ray.core.searcher import SearchConfig, Searcher
from axn_ray.distributed.cluster import join_cluster
from axn_ray.distributed.embed import EmbedConfig, embed, embed_texts
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from tests.benchmarks.stand_in import SharedWords

OUT = Path("runs/bench-scale")
STAND_IN = "python:tests.benchmarks.stand_in:SharedWords"
ONE_LAYER = OUT / "one-layer"
PER_QUERY, SHARD_PAIRS, TEST_QUERIES = 500, 50_000, 10
SEARCHES, BUDGET, ROUNDS = 20, 100, 10
SAMPLE = 4096  # texts or pairs in the rates of what a stand-in replaces


@dataclass(frozen=True)
class Size:
    """So many items, train queries x `PER_QUERY` pairs, and the stages that are measured."""

    items: int
    queries: int
    stages: tuple[str, ...] = ("corpus", "embed", "score", "factorize", "search", "truth", "evaluate")


SIZES = {
    "1e4": Size(10_000, 200),
    "1e5": Size(100_000, 2_000),
    "1e6": Size(1_000_000, 20_000),
    "1e5-1e7": Size(100_000, 20_000, ("corpus", "embed", "score", "factorize")),  # ten times the pairs of as many items
}


class Road:
    """One size's artifacts, and a method for each stage; each returns figures of its own."""

    def __init__(self, name):
        self.size, self.folder = SIZES[name], OUT / name
        self.embeddings, self.scores, self.bayes = (self.folder / part for part in ("embeddings", "scores", "bayes"))

    def corpus(self):
        """The two files of texts."""
        ONE_LAYER.parent.mkdir(parents=True, exist_ok=True)
        model = SentenceTransformer(locate_model(MINILM), device="cpu")
        model[0].auto_model.encoder.layer = model[0].auto_model.encoder.layer[:1]
        model[0].auto_model.config.num_hidden_layers = 1
        model.save(str(ONE_LAYER))
        items, queries = read_items(sample.ITEMS), read_queries(sample.QUERIES, split="train")
        n, rows = len(items), range(self.size.items)
        texts = [items.texts[row % n] + see(items.titles, *divmod(row, n)) for row in rows]
        ids, titles = [f"{items.ids[row % n]}-{row // n}" for row in rows], [items.titles[row % n] for row in rows]
        write(self.folder / "items.parquet", item_id=ids, title=titles, text=texts)
        kept = spread(len(queries), self.size.queries + TEST_QUERIES)
        splits = ["test"] * TEST_QUERIES + ["train"] * self.size.queries
        found = [queries.texts[row] for row in kept]
        write(self.folder / "queries.parquet", query_id=[queries.ids[row] for row in kept], text=found, split=splits)
        return {"text_bytes": sum(len(text.encode()) for text in texts)}

    def embed(self):
        """The embed stage with the cut dual-encoder."""
        texts = {"items": self.folder / "items.parquet", "queries": self.folder / "queries.parquet"}
        embed(EmbedConfig(**texts, dual_encoder=str(ONE_LAYER.resolve())), self.embeddings)

    def score(self):
        """The score stage with the stand-in cross-encoder, as its defaults are but for the sizes."""
        config = ScoreConfig(cross_encoder=STAND_IN, per_query=PER_QUERY, shard_pairs=SHARD_PAIRS)
        counts = score(load_embedded_corpus(self.embeddings), config, self.scores).counts
        shards = [json.loads(path.read_text()) for path in sorted((self.scores / "shards").glob("*.json"))]
        first = -(-self.size.queries // (SHARD_PAIRS // config.shares.first))
        seconds = [shard["seconds"] for shard in shards]
        passes = {"first": round(sum(seconds[:first]), 1), "active": round(sum(seconds[first:]), 1)}
        return {"pairs": counts["pairs"], "shards": len(shards), "worker_seconds": passes}

    def factorize(self):
        """The factorize stage: `bayes` over the embeddings alone, without views."""
        config = FactorizationConfig(method="bayes", views=[])
        fitted = factorize_scores(self.embeddings, self.scores, config, self.bayes)
        return {"width": fitted.item_embeddings.shape[1], "iterations": fitted.record.epochs}

    def search(self):
        """One searcher: the seconds until it is open, and those of a search."""
        begun = time.monotonic()
        config = SearchConfig(cross_encoder=STAND_IN, budget=BUDGET, rounds=ROUNDS)
        searcher = Searcher(corpus := load_embedded_corpus(self.embeddings), self.bayes, config)
        opened = time.monotonic()
        for row in itertools.islice(itertools.cycle(corpus.rows_of("test").tolist()), SEARCHES):
            if searcher.search(corpus.queries.texts[row]).n_ce_calls != BUDGET:
                raise SystemExit("a search did not spend its budget")
        return {"open_seconds": opened - begun, "seconds_per_search": (time.monotonic() - opened) / SEARCHES}

    def truth(self):
        """Every pair of the test queries."""
        config = ScoreConfig(cross_encoder=STAND_IN, split="test", choice="all", shard_pairs=SHARD_PAIRS)
        return {"pairs": score(load_embedded_corpus(self.embeddings), config, self.folder / "truth").counts["pairs"]}

    def evaluate(self):
        """The evaluate stage."""
        plan = {"methods": ["rnr_de", "axn_bayes"], "budgets": [100, 500], "rounds": [ROUNDS]}
        config, out = EvaluateConfig(cross_encoder=STAND_IN, **plan), self.folder / "evaluation"
        summary = examine(config, self.embeddings, self.folder / "truth", {"bayes": self.bayes}, out)
        return {"rows": len(summary)}


def measure_rates():
    """What the stand-ins replace and what they cost, a second: of two workers or threads."""
    items, queries = read_items(sample.ITEMS), read_queries(sample.QUERIES, split="train")
    texts, asked = ([part[row] for row in spread(len(part), SAMPLE)] for part in (items.full_texts, queries.texts))
    join_cluster()
    rates = {}
    for name, model in (("dual_encoder", MINILM), ("cut_dual_encoder", str(ONE_LAYER.resolve()))):
        begun = time.monotonic()
        embed_texts(texts[:8], [], model, "auto", workers=2)
        between = time.monotonic()
        embed_texts(texts * 2, [], model, "auto", workers=2)
        rates[f"{name}_texts"] = 2 * SAMPLE / (time.monotonic() - between - (between - begun))
    torch.set_num_threads(1)
    cross_encoder = CrossEncoder(CrossEncoderConfig())
    rates["tokenized_texts_of_one_process"] = SAMPLE / timed(lambda: cross_encoder.tokenize(texts))
    rates["stand_in_pairs_of_one_process"] = SAMPLE / timed(lambda: SharedWords().score_texts(asked, texts))
    return {"rates": {name: round(rate) for name, rate in rates.items()}}


def timed(work):
    """Seconds."""
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def see(titles, repetition, row):
    """What a repetition adds to the text of a row; nothing to the first."""
    return f"; see {titles[(31 * row + 7919 * repetition) % len(titles)]}" if repetition else ""


def spread(n, kept):
    """`kept` of the rows 0..n-1, evenly."""
    return [row * n // kept for row in range(kept)]


def write(path, **columns):
    """One Parquet file of strings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(columns), path, compression="zstd")


def main():
    """Do one stage and say its figures in the file named."""
    size, stage, figures = sys.argv[1:]
    if stage == "rates":
        found = measure_rates()
    else:
        road = Road(size)
        if stage not in ("corpus", "search"):
            join_cluster()
        found = getattr(road, stage)() or {}
    Path(figures).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

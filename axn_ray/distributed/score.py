"""Scores (query, item) pairs with the cross-encoder on Ray Data: one shard in, one file out, done shards skipped.

A shard is a range of queries with the items chosen for them. Nothing depends on Ray's block layout.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import ray
import torch
from pydantic import Field
from ray.data import ActorPoolStrategy

from axn_ray.core.artifact import MANIFEST, Manifest, check_replaceable, hash_json, seal
from axn_ray.core.corpus import TEMPLATE
from axn_ray.core.cross_encoder import CrossEncoder, CrossEncoderConfig, load_adapter_or_model
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.sampling import PairChoice, check_per_query, choose_items
from axn_ray.core.score_store import Scores, load_scores, read_shard_facts, write_shard
from axn_ray.core.tokens import TokenTable
from axn_ray.distributed.cluster import split_evenly
from axn_ray.distributed.progress import track
from axn_ray.errors import ArtifactError

logger = logging.getLogger(__name__)


class ScoreConfig(CrossEncoderConfig):
    """Which pairs to score, with which cross-encoder, on how many workers."""

    split: Literal["train", "dev", "test"] = Field("train", description="score this split's queries")
    choice: PairChoice = Field("nearest", description="items per query: the DE's nearest, random, or all (exact truth)")
    per_query: int = Field(100, ge=1, description="items per query, unless choice is all")
    shard_pairs: int = Field(5000, ge=1, description="about how many pairs make one shard (one file)")
    workers: int = Field(2, ge=1, description="processes that hold the cross-encoder")
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    seed: int = 0


class ScoreActor:
    """One cross-encoder in one process; chooses, scores and writes one shard at a time."""

    def __init__(self, config: ScoreConfig, folder: str, fingerprint: str, inputs: dict[str, Any]) -> None:
        torch.set_num_threads(config.threads)
        self._config, self._folder, self._fingerprint = config, Path(folder), fingerprint
        self._cross_encoder = CrossEncoder(config)
        values = ray.get(list(inputs.values()))
        self._inputs = dict(zip(inputs, values, strict=True))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do one shard: `shard`, `start` and `stop` are the only row of the batch."""
        shard, start, stop = (int(batch[name][0]) for name in ("shard", "start", "stop"))
        query_index, item_index = self._pairs(shard, range(start, stop))
        inputs = self._inputs
        scored = self._cross_encoder.score_pairs(inputs["query_tokens"], inputs["item_tokens"], query_index, item_index)
        facts = {"fingerprint": self._fingerprint, "truncated": scored.n_truncated}
        write_shard(self._folder, shard, query_index, item_index, scored.scores, facts)
        return {"shard": [shard], "rows": [len(scored.scores)], "truncated": [scored.n_truncated]}

    def _pairs(self, shard: int, queries: range) -> tuple[np.ndarray, np.ndarray]:
        config, inputs = self._config, self._inputs
        rng = np.random.default_rng([config.seed, shard])
        near = inputs["query_embeddings"][queries.start : queries.stop]
        chosen = choose_items(config.choice, config.per_query, inputs["item_embeddings"], near, rng)
        return np.repeat(np.array(queries, dtype=np.int32), chosen.shape[1]), chosen.ravel()


def describe(config: ScoreConfig) -> dict[str, Any]:
    """The cross-encoder's fingerprint, as the workers will run it."""
    return dict(CrossEncoder(config).fingerprint)


def tokenize(config: ScoreConfig, query_texts: list[str], item_texts: list[str]) -> tuple[TokenTable, TokenTable]:
    """Query tokens and item tokens, made once for all workers."""
    _, tokenizer = load_adapter_or_model(config.cross_encoder)
    return TokenTable.from_texts(query_texts, tokenizer), TokenTable.from_texts(item_texts, tokenizer)


@dataclass(frozen=True)
class _Plan:
    """One run: its shards (ranges of query rows), what every actor reads, and what makes its scores what they are."""

    shards: Sequence[range]
    pairs_per_query: int
    query_ids: tuple[str, ...]
    inputs: dict[str, Any]
    fingerprint: str
    described: dict[str, Any]
    made_from: dict[str, str]


def score(corpus: EmbeddedCorpus, config: ScoreConfig, out: Path) -> Scores:
    """Write, or finish, the `scores` artifact `out`; shards that are done and whole are not scored again.

    Raises:
        ArtifactError: `out` holds scores of another model, corpus or setting.
        InputError, ModelError: see `choose_items` and `CrossEncoder`.
    """
    plan = _plan(corpus, config)
    check_replaceable_or_unfinished(out)
    facts = {n: f for n in range(len(plan.shards)) if (f := read_shard_facts(out, n, plan.fingerprint)) is not None}
    if facts:
        logger.info("%d of %d shards are done already", len(facts), len(plan.shards))
    out.mkdir(parents=True, exist_ok=True)
    for result in _run(plan, [n for n in range(len(plan.shards)) if n not in facts], config, out):
        facts[int(result["shard"][0])] = {"rows": int(result["rows"][0]), "truncated": int(result["truncated"][0])}
    pa.parquet.write_table(pa.table({"query_id": plan.query_ids}), out / "queries.parquet", compression="zstd")
    counts = {
        "pairs": sum(f["rows"] for f in facts.values()),
        "truncated": sum(f["truncated"] for f in facts.values()),
        "n_queries": len(plan.query_ids),
        "n_items": len(corpus.items),
    }
    asked = len(plan.query_ids) * plan.pairs_per_query
    if counts["pairs"] != asked:
        raise ArtifactError(f"{counts['pairs']} pairs scored of {asked}; run the scoring again")
    seal(out, Manifest(kind="scores", config=plan.described, counts=counts, made_from=plan.made_from))
    logger.info("scored %d pairs into %s, %d of them truncated", counts["pairs"], out, counts["truncated"])
    return load_scores(out)


def _plan(corpus: EmbeddedCorpus, config: ScoreConfig) -> _Plan:
    """Check the request, tokenize once, and put what the actors share into the object store."""
    rows, n_items = corpus.rows_of(config.split), len(corpus.items)
    if config.choice != "all":
        check_per_query(config.per_query, n_items)
    queries = corpus.queries.take(rows.tolist())
    gpus = 1 if torch.cuda.is_available() else 0
    model = ray.get(ray.remote(num_gpus=gpus)(describe).remote(config))
    query_tokens, item_tokens = ray.remote(num_returns=2)(tokenize).remote(config, queries.texts, corpus.items.full_texts)
    made_from = {"items": corpus.items.fingerprint, "queries": queries.fingerprint, "cross_encoder": hash_json(model)}
    settings = config.model_dump(include={"split", "choice", "per_query", "shard_pairs", "seed"})
    nearest = {"dual_encoder": corpus.dual_encoder} if config.choice == "nearest" else {}
    pairs_per_query = n_items if config.choice == "all" else config.per_query
    return _Plan(
        shards=split_evenly(len(queries), max(1, config.shard_pairs // pairs_per_query)),
        pairs_per_query=pairs_per_query,
        query_ids=queries.ids,
        inputs={
            "query_tokens": query_tokens,
            "item_tokens": item_tokens,
            "query_embeddings": ray.put(np.asarray(corpus.query_embeddings[rows])),
            "item_embeddings": ray.put(np.asarray(corpus.item_embeddings)),
        },
        fingerprint=hash_json({**made_from, **settings, **nearest}),
        described={**settings, **nearest, "cross_encoder": config.cross_encoder, "template": TEMPLATE, "fingerprint": model},
        made_from=made_from,
    )


def check_replaceable_or_unfinished(out: Path) -> None:
    """An unfinished run has shards and no manifest: it may be continued. Anything else foreign is refused."""
    if not (out / "shards").is_dir() or (out / MANIFEST).exists():
        check_replaceable(out)


def _run(plan: _Plan, todo: list[int], config: ScoreConfig, out: Path) -> Iterator[dict[str, Any]]:
    """Score these shards on an actor pool; yields each shard's counts as it is written."""
    if not todo:
        return
    rows = [{"shard": n, "start": plan.shards[n].start, "stop": plan.shards[n].stop} for n in todo]
    scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ScoreActor,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(config.workers, len(rows))),
        num_cpus=config.threads,
        num_gpus=1 if torch.cuda.is_available() else 0,
        fn_constructor_kwargs={
            "config": config,
            "folder": str(out.resolve()),
            "fingerprint": plan.fingerprint,
            "inputs": plan.inputs,
        },
    )
    total = plan.pairs_per_query * sum(len(plan.shards[n]) for n in todo)
    batches = scored.iter_batches(batch_size=None, batch_format="numpy")
    yield from track(batches, total, "score pairs", size=lambda b: int(b["rows"].sum()))

"""Scores (query, item) pairs with the cross-encoder on Ray Data: one shard in, one file out, done shards skipped.

A shard is a range of queries with the items chosen for them. Nothing depends on Ray's block layout.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import ray
from pydantic import Field, model_validator
from ray.data import ActorPoolStrategy

from axn_ray.core.active_sampling import ActiveModel
from axn_ray.core.artifact import MANIFEST, Manifest, check_replaceable, hash_json, locate_folder, seal
from axn_ray.core.corpus import TEMPLATE, Queries
from axn_ray.core.cross_encoder_config import CrossEncoderConfig, with_whole_path
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.known_scores import KnownScores
from axn_ray.core.open_cross_encoder import open_cross_encoder
from axn_ray.core.pairs import FloatArray
from axn_ray.core.sampling import Shares, check_per_query, choose_queries, draw_queries
from axn_ray.core.score_store import (
    ITEMS,
    QUARANTINE,
    QUERIES,
    load_scores,
    lock_folder,
    read_shard_facts,
    read_shards,
    write_ids,
    write_into,
    write_quarantine,
)
from axn_ray.distributed.bayes_fit import spread_on_ray
from axn_ray.distributed.cluster import gpus_per_worker, split_evenly
from axn_ray.distributed.progress import track
from axn_ray.distributed.score_worker import ListedPairs, PairChooser, ScoreActor
from axn_ray.errors import ArtifactError, FitError, InputError

logger = logging.getLogger(__name__)

ACTIVE_MODEL = "active_model.npz"


class ScoreConfig(CrossEncoderConfig):
    """Which pairs to score, with which cross-encoder, on how many workers."""

    split: Literal["train", "dev", "test"] = Field("train", description="score this split's queries")
    n_queries: int | None = Field(None, ge=1, description="of the split, drawn with the seed; default: all of them")
    choice: Literal["per_query", "per_item", "all"] = Field(
        "per_query", description="so many items of each query, so many queries of each item, or every pair (exact truth)"
    )
    per_query: int = Field(100, ge=1, description="items per query: the dual-encoder's nearest, but for the two shares")
    random_share: float = Field(0.1, ge=0, le=1, description="of per_query, drawn at random")
    active_share: float = Field(0.3, ge=0, lt=1, description="of per_query, found by the search after a fit on the others")
    per_item: int = Field(5, ge=1, description="nearest queries of each item, where choice is per_item")
    known_scores: list[str] = Field([], description="scores artifacts to look pairs up in before paying for them")
    shard_pairs: int = Field(5000, ge=1, description="about how many pairs make one shard (one file)")
    workers: int = Field(2, ge=1, description="processes that hold the cross-encoder")
    threads: int = Field(1, ge=1, description="CPU threads of each worker")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_shares(self) -> "ScoreConfig":
        if self.random_share + self.active_share > 1:
            raise ValueError(f"random_share={self.random_share} and active_share={self.active_share} exceed 1 together")
        return self

    @property
    def shares(self) -> Shares:
        """Items of each query by how they are chosen."""
        return Shares.of(self.per_query, self.random_share, self.active_share)

    @property
    def described(self) -> dict[str, Any]:
        """The part that decides which pairs are scored, and in which shard."""
        return self.model_dump(
            include={"split", "choice", "per_query", "random_share", "active_share", "per_item", "shard_pairs", "seed"}
        )


@dataclass(frozen=True)
class Job:
    """One run: its queries, the cross-encoder's fingerprint, and what every worker reads, as references."""

    corpus: EmbeddedCorpus
    config: ScoreConfig
    rows: npt.NDArray[np.int64]
    queries: Queries
    cross_encoder: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def embeddings(self) -> tuple[FloatArray, FloatArray]:
        """The dual-encoder's, of all items and of the job's queries."""
        return np.asarray(self.corpus.item_embeddings), np.asarray(self.corpus.query_embeddings[self.rows])

    @property
    def made_from(self) -> dict[str, str]:
        """Hashes of what the scores depend on."""
        return {
            "items": self.corpus.items.fingerprint,
            "queries": self.queries.fingerprint,
            "cross_encoder": hash_json(self.cross_encoder),
        }


@dataclass(frozen=True)
class Pass:
    """One go over the queries: its shards (number -> range of queries), how many pairs, what its workers read."""

    shards: dict[int, range]
    n_pairs: int
    fingerprint: str
    n_active: int
    inputs: dict[str, Any]


def score(corpus: EmbeddedCorpus, config: ScoreConfig, out: Path) -> Manifest:
    """Write, or finish, the `scores` artifact `out`; shards that are done and whole are not scored again.

    Raises:
        ArtifactError: `out` holds scores of another model, corpus or setting, is in use, or cannot be written.
        InputError, ModelError: see `choose_items`, `choose_queries` and `open_cross_encoder`; a worker's come wrapped.
    """
    with lock_folder(out):
        if not (out / "shards").is_dir() or (out / MANIFEST).exists():  # an unfinished run may be continued
            check_replaceable(out, "scores", in_place=True)
        job = prepare_job(corpus, config)
        first = plan_first_pass(job)
        second = plan_second_pass(job, first)
        facts = _run_pass(job, first, out)
        if second.n_pairs:
            failed = [(query, item) for shard in facts.values() for query, item, _ in shard["failed"]]
            facts |= _run_pass(job, _find_second_pairs(job, first, second, out, failed), out)
        return _finish(job, facts, first.n_pairs + second.n_pairs, out)


def prepare_job(corpus: EmbeddedCorpus, config: ScoreConfig) -> Job:
    """Check the request, tokenize once, look up what is known, and put what the workers share into the object store."""
    config = with_whole_path(config)
    rows = draw_queries(corpus.rows_of(config.split), config.n_queries, config.seed)
    if config.choice == "per_query":
        check_per_query(config.per_query, len(corpus.items))
    queries = corpus.queries.take(rows.tolist())
    prepare = ray.remote(num_gpus=gpus_per_worker(), num_returns=3)(_open_and_tokenize)
    described, query_tokens, item_tokens = prepare.remote(config, queries.texts, corpus.items.full_texts)
    cross_encoder = ray.get(described)
    stores = [load_scores(locate_folder(name)) for name in config.known_scores]
    known = KnownScores.of(stores, hash_json(cross_encoder), queries.texts, corpus.items.full_texts)
    inputs = {"query_tokens": query_tokens, "item_tokens": item_tokens, "known": ray.put(known)}
    return Job(corpus, config, rows, queries, cross_encoder, inputs)


def _open_and_tokenize(config: CrossEncoderConfig, queries: Sequence[str], items: Sequence[str]) -> tuple[Any, Any, Any]:
    """The cross-encoder's fingerprint as the workers will run it; query and item texts as it reads them."""
    cross_encoder = open_cross_encoder(config)
    return dict(cross_encoder.fingerprint), cross_encoder.tokenize_queries(queries), cross_encoder.tokenize(items)


def plan_first_pass(job: Job) -> Pass:
    """The pairs that can be chosen before anything has been scored."""
    config, corpus, n_queries = job.config, job.corpus, len(job.queries)
    item_embeddings, query_embeddings = job.embeddings
    chooser: PairChooser | ListedPairs
    if config.choice == "per_item":
        chooser = ListedPairs(*choose_queries(config.per_item, item_embeddings, query_embeddings))
        n_pairs = config.per_item * len(item_embeddings)
    else:
        shares = config.shares if config.choice == "per_query" else None
        chooser = PairChooser(shares, config.seed, item_embeddings, query_embeddings)
        n_pairs = n_queries * (shares.first if shares else len(item_embeddings))
    ranges = split_evenly(n_queries, max(1, config.shard_pairs * n_queries // max(1, n_pairs)))
    near = {} if config.choice == "all" else {"dual_encoder": corpus.dual_encoder}
    fingerprint = hash_json({**job.made_from, **config.described, **near})
    return Pass(dict(enumerate(ranges)), n_pairs, fingerprint, 0, {**job.inputs, "chooser": ray.put(chooser)})


def plan_second_pass(job: Job, first: Pass) -> Pass:
    """The pairs that the search will find once the first ones are scored; its shards follow the first's."""
    n_queries, n_active = len(job.queries), job.config.shares.active if job.config.choice == "per_query" else 0
    ranges = split_evenly(n_queries, max(1, job.config.shard_pairs // n_active)) if n_active else []
    shards = {len(first.shards) + number: queries for number, queries in enumerate(ranges)}
    return Pass(shards, n_queries * n_active, hash_json([first.fingerprint, "active"]), n_active, job.inputs)


def _find_second_pairs(job: Job, first: Pass, second: Pass, out: Path, failed: list[tuple[int, int]]) -> Pass:
    """The second pass with what its workers choose by: the first scores, fitted, and the first pairs that have none."""
    item_embeddings, query_embeddings = job.embeddings
    observed = read_shards(out, first.shards, len(job.queries), len(item_embeddings))
    if not (out / ACTIVE_MODEL).exists():
        logger.info("fitting the first %d scores, to choose %d more items of each query", observed.n_observed, second.n_active)
        spread = spread_on_ray(job.config.workers, job.config.threads)
        try:
            fitted = ActiveModel.fit(observed, item_embeddings, query_embeddings, spread)
        except (InputError, FitError) as error:
            advice = "active_share=0 chooses all items beforehand"
            raise type(error)(f"the first scores do not tell which items to score next: {error}; {advice}") from error
        write_into(out, out / ACTIVE_MODEL, fitted.to_bytes())
    model = ActiveModel.from_bytes((out / ACTIVE_MODEL).read_bytes())
    space = model.space(item_embeddings, query_embeddings, observed, np.array(failed, dtype=np.int32).reshape(-1, 2))
    return replace(second, inputs={**second.inputs, "active": ray.put(space)})


def read_done(this: Pass, out: Path) -> dict[int, dict[str, Any]]:
    """The facts of the shards that are done and whole.

    Raises:
        ArtifactError: `out` holds scores of another model, corpus or setting.
    """
    return {n: f for n in this.shards if (f := read_shard_facts(out, n, this.fingerprint)) is not None}


def _run_pass(job: Job, this: Pass, out: Path) -> dict[int, dict[str, Any]]:
    """Score the shards that are not there yet; returns the facts of all of them."""
    facts = read_done(this, out)
    if facts:
        logger.info("%d of %d shards are done already", len(facts), len(this.shards))
    for path in (out / "shards").glob("part-*.started"):  # what an earlier run began says nothing against a shard
        path.unlink(missing_ok=True)
    todo = [{"shard": n, "start": r.start, "stop": r.stop} for n, r in this.shards.items() if n not in facts]
    for batch in _score_shards(job, this, todo, out):
        for number, described in zip(batch["shard"], batch["facts"], strict=True):
            facts[int(number)] = json.loads(described)
    return facts


def _score_shards(job: Job, this: Pass, todo: list[dict[str, int]], out: Path) -> Iterable[dict[str, Any]]:
    """Score these shards on an actor pool; yields each shard's facts as it is written."""
    if not todo:
        return ()
    config = job.config
    scored = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
        ScoreActor,
        batch_size=1,
        compute=ActorPoolStrategy(size=min(config.workers, len(todo))),
        num_cpus=config.threads,
        num_gpus=gpus_per_worker(),
        fn_constructor_kwargs={
            "config": config,
            "threads": config.threads,
            "folder": str(out if "://" in str(out) else out.resolve()),
            "fingerprint": this.fingerprint,
            "n_active": this.n_active,
            "inputs": this.inputs,
        },
    )
    batches: Iterator[dict[str, Any]] = scored.iter_batches(batch_size=None, batch_format="numpy")
    share = sum(row["stop"] - row["start"] for row in todo) / len(job.queries)
    return track(batches, round(this.n_pairs * share), "score pairs", size=lambda b: count_done(map(json.loads, b["facts"])))


def count_done(shards: Iterable[dict[str, Any]]) -> int:
    """The pairs of shards with these facts, those included that could not be scored."""
    return sum(facts["rows"] + len(facts["failed"]) for facts in shards)


def _finish(job: Job, facts: dict[int, dict[str, Any]], asked: int, out: Path) -> Manifest:
    """Reconcile what was asked for with what is there, name what failed, and seal the artifact."""
    items, queries = job.corpus.items, job.queries
    failed = [pair for number in sorted(facts) for pair in facts[number]["failed"]]
    counts: dict[str, int | float] = {
        "pairs": sum(f["rows"] for f in facts.values()),
        "quarantined": len(failed),
        "truncated": sum(f["truncated"] for f in facts.values()),
        "known": sum(f["known"] for f in facts.values()),
        "n_queries": len(queries),
        "n_items": len(items),
    }
    if counts["pairs"] + counts["quarantined"] != asked:
        raise ArtifactError(f"{counts['pairs']} pairs scored and {len(failed)} quarantined of {asked}; run the scoring again")
    write_ids(out, QUERIES, "query_id", queries.ids, queries.texts)
    write_ids(out, ITEMS, "item_id", items.ids, items.full_texts)
    if failed:
        write_quarantine(out, ((queries.ids[q], items.ids[i], reason) for q, i, reason in failed))
        logger.warning("%d pairs could not be scored; %s names them", len(failed), out / QUARANTINE)
    config = {
        **job.config.described,
        "cross_encoder": job.config.cross_encoder,
        "dual_encoder": job.corpus.dual_encoder,
        "template": TEMPLATE,
        "fingerprint": job.cross_encoder,
    }
    sealed = seal(out, Manifest(kind="scores", config=config, counts=counts, made_from=job.made_from))
    paid = counts["pairs"] - counts["known"]
    logger.info(
        "scored %d pairs into %s: %d CE calls, %d known beforehand, %d truncated",
        *(counts["pairs"], out, paid, counts["known"], counts["truncated"]),
    )
    return sealed

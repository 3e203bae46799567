"""Where the index of a search stands, and how the bundled one is made: from the sample's exact scores, no CE call.

Knows no Ray and no HTTP.
"""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

import axn_ray
from axn_ray import sample
from axn_ray.core.artifact import Manifest, check_same_inputs, hash_file, hash_json, new_artifact, read_manifest
from axn_ray.core.corpus import Items, read_items, read_queries
from axn_ray.core.dual_encoder import DualEncoder
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus, save_embedded_corpus
from axn_ray.core.factorization import (
    Factorization,
    describe_factorization,
    fit,
    load_factorization,
    name_scorer,
    save_factorization,
)
from axn_ray.core.first_round import Bm25Index
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.lexical import Words
from axn_ray.core.models import MINILM
from axn_ray.core.pairs import PairScorer
from axn_ray.core.ranking import top_items
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import load_scores
from axn_ray.core.tokens import TokenTable
from axn_ray.errors import ArtifactError
from serve_app.config import SAMPLE, AppArgs

logger = logging.getLogger(__name__)

FACTORIZATIONS = ("bayes", "mf_ind", "mf_trns")  # the first that is there
WORLD = "verb"
EXAMPLES = 6
BEST, OTHERS = 100, 50  # of each sample query's exact scores: what the sample index is fitted to


@dataclass(frozen=True)
class Index:
    """A corpus, its factorization and what that was made from, and a version that changes with either."""

    corpus: EmbeddedCorpus
    factorization: Factorization
    made_from: Mapping[str, str]
    version: str


def open_index(args: AppArgs) -> Index:
    """Open the index that the arguments name; the sample's is made first where it is not there yet.

    Raises:
        ArtifactError: no such folder, or parts that were made from different items or over different dual-encoders.
    """
    embeddings, factorization = locate_index(args)
    corpus = load_embedded_corpus(embeddings)
    manifest = read_manifest(factorization, "factorization")
    check_same_inputs(factorization, manifest, {"items": corpus.items.fingerprint, "dual_encoder": corpus.dual_encoder})
    version = hash_json([hash_file(folder / "manifest.json") for folder in (embeddings, factorization)])[:12]
    return Index(corpus, load_factorization(factorization), manifest.made_from, version)


def locate_index(args: AppArgs) -> tuple[Path, Path]:
    """The folders of embeddings and factorization.

    Raises:
        ArtifactError: one of them is not there.
    """
    if args.index == SAMPLE:
        folder = args.cache.expanduser() / f"sample-{axn_ray.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".lock"):
            if not (folder / FACTORIZATIONS[0] / "manifest.json").is_file():
                make_sample_index(folder)
    else:
        folder = Path(args.index)
    found = [folder / name for name in FACTORIZATIONS if (folder / name).is_dir()]
    if not found or not (folder / "embeddings").is_dir():
        wanted = "`embeddings` and one of " + ", ".join(FACTORIZATIONS)
        raise ArtifactError(f"{folder} is no index: it must hold {wanted}; give a folder such as runs/demo, or `sample`")
    return folder / "embeddings", found[0]


def make_sample_index(folder: Path) -> None:
    """Embed the sample's verb world and fit `bayes` to a part of its exact scores: no CE call."""
    items, queries = read_items(sample.ITEMS, [WORLD]), read_queries(sample.QUERIES, [WORLD])
    logger.info("making the sample index in %s: embedding %d items (once)", folder, len(items))
    scores = load_scores(sample.EXACT_SCORES)
    fitted_to = [queries.index_of[name] for name in scores.query_ids]
    others = read_queries(sample.QUERIES, [WORLD], split="dev").ids[:EXAMPLES]
    queries = queries.take([*fitted_to, *(queries.index_of[name] for name in others)])
    model = DualEncoder(MINILM)
    corpus = EmbeddedCorpus(
        items=items,
        queries=queries,
        splits=("train",) * len(fitted_to) + ("dev",) * len(others),
        item_embeddings=model.embed_items(items.full_texts),
        query_embeddings=model.embed_queries(queries.texts),
        dual_encoder=MINILM,
    )
    made_from = {"items": items.fingerprint, "queries": queries.fingerprint}
    counts: dict[str, int | float] = {"items": len(items), "queries": len(queries)}
    described = Manifest(kind="embeddings", config={"dual_encoder": MINILM, "world": [WORLD]}, counts=counts, made_from=made_from)
    with new_artifact(folder / "embeddings", described) as aside:
        save_embedded_corpus(aside, corpus)
    logger.info("fitting the sample index to %d exact scores of each of %d queries", BEST + OTHERS, len(queries))
    config = FactorizationConfig.model_validate({"method": FACTORIZATIONS[0]})
    train_embeddings = corpus.query_embeddings[: len(fitted_to)]
    words = Words(Bm25Index(items.full_texts), queries.texts[: len(fitted_to)])
    fitted = fit(_choose_scores(scores.matrix), corpus.item_embeddings, train_embeddings, config, words)
    made_from |= {"dual_encoder": MINILM, "scorer": str(name_scorer(scores.config["fingerprint"]))}
    with new_artifact(folder / FACTORIZATIONS[0], describe_factorization(fitted, config, made_from)) as aside:
        save_factorization(aside, fitted)


def _choose_scores(exact: ScoreMatrix) -> ScoreMatrix:
    """Of each query's scores its highest and some at random."""
    rng = np.random.default_rng(0)
    chosen = np.zeros(exact.n_observed, dtype=np.bool_)
    for query in range(exact.n_queries):
        start, stop = exact.indptr[query], exact.indptr[query + 1]
        chosen[start + top_items(exact.scores[start:stop], BEST)] = True
        chosen[start + rng.permutation(stop - start)[:OTHERS]] = True
    return exact.keep(chosen)


def prepare_items(items: Items, scorer: PairScorer, cache: Path) -> Any:
    """The items' texts as the CE wants them; token ids are kept on disk, so that a node's replicas share their memory."""
    key = hash_json([items.fingerprint, scorer.fingerprint])[:16]
    folder = cache.expanduser() / f"tokens-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not (folder / "manifest.json").is_file():
            prepared = scorer.tokenize(items.full_texts)
            if not isinstance(prepared, TokenTable):
                return prepared
            counts: dict[str, int | float] = {"items": len(items)}
            made_from = {"items": items.fingerprint}
            described = Manifest(kind="tokens", config=dict(scorer.fingerprint), counts=counts, made_from=made_from)
            with new_artifact(folder, described) as aside:
                np.save(aside / "ids.npy", prepared.ids, allow_pickle=False)
                np.save(aside / "offsets.npy", prepared.offsets, allow_pickle=False)
    parts = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("ids", "offsets")]
    return TokenTable(*parts)


def example_queries(corpus: EmbeddedCorpus) -> list[str]:
    """A few queries of the corpus that the index was not fitted to, for a person who does not know what to ask."""
    held_out = (text for text, split in zip(corpus.queries.texts, corpus.splits, strict=True) if split != "train")
    return list(itertools.islice(held_out, EXAMPLES)) or list(corpus.queries.texts[:EXAMPLES])

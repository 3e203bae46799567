"""The exact scores that an evaluation judges by: read, or scored first, and held to the split that it may look at."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from axn_ray.core.artifact import MANIFEST
from axn_ray.core.cross_encoder_config import CrossEncoderConfig
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.score_store import Scores, load_scores, match_rows
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.score import ScoreConfig, score
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)


def find_truth(corpus: EmbeddedCorpus, config: EvaluateConfig, folder: Path) -> Scores:
    """Exact scores of queries that this evaluation may look at: `folder`'s, which is scored, or finished, where it must be.

    Raises:
        InputError: a query of them is of another split.
        ArtifactError: a query of them is not in the corpus, or has another text there.
        ArtifactError, ModelError: see `score` and `load_scores`.
    """
    if not (folder / MANIFEST).is_file():
        n_queries = min(len(corpus.rows_of(config.split)), config.max_queries or len(corpus.queries))
        logger.info("scoring every item for %d %s queries into %s", n_queries, config.split, folder)
        cross_encoder = config.model_dump(include=set(CrossEncoderConfig.model_fields))
        shared = config.model_dump(include={"known_scores", "workers", "threads"})
        score(corpus, ScoreConfig(split=config.split, choice="all", n_queries=n_queries, **cross_encoder, **shared), folder)
    exact = load_scores(folder)
    logger.info("judging by the exact scores in %s, of %s", folder, exact.config.get("cross_encoder", "imported scores"))
    rows = match_rows("query", exact.query_ids, exact.query_digests, corpus.queries.index_of, corpus.queries.texts)
    check_split([corpus.splits[row] for row in rows], config)
    return exact


def check_split(splits: Sequence[str], config: EvaluateConfig) -> None:
    """Refuse to choose on test queries, to judge on dev queries, and either on train queries; `splits` has each query's.

    Raises:
        InputError: a query of another split.
    """
    wrong = sorted(set(splits) - {config.split})
    if wrong:
        others = f"{splits.count(wrong[0])} {wrong[0]} queries"
        if config.choose:
            raise InputError(f"the truth holds {others}, settings are chosen on dev queries; score --split dev, or drop --choose")
        raise InputError(f"the truth holds {others}, methods are judged on test queries; score --split test, or add --choose")


def calls_per_second(folder: Path) -> float | None:
    """CE calls that a worker made per second when these scores were made; None where their shards do not say."""
    shards = [json.loads(path.read_bytes()) for path in sorted((folder / "shards").glob("part-*.json"))]
    timed = [shard for shard in shards if "seconds" in shard and shard["rows"] > shard["known"]]
    seconds = sum(shard["seconds"] for shard in timed)
    return sum(shard["rows"] - shard["known"] for shard in timed) / seconds if seconds else None

"""Scores that users already have become a `scores` artifact: ids turn into rows of the corpus, what is bad is quarantined.

Knows no model: the scores' cross-encoder (CE) is a name that the user gives.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from axn_ray.core.artifact import Manifest, check_replaceable, hash_json, is_local, new_artifact, seal
from axn_ray.core.corpus import TEMPLATE
from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.pairs import FloatArray
from axn_ray.core.score_formats import ScoredIds, find_format, read_scored_ids
from axn_ray.core.score_store import ITEMS, QUERIES, write_ids, write_quarantine, write_shard
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ArtifactError, InputError

logger = logging.getLogger(__name__)

Failure = tuple[str, str, str]
Triples = tuple[Int32Array, Int32Array, FloatArray]


class ImportScoresConfig(BaseModel):
    """Where the scores come from and what a row of them is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="name of the model that gave the scores; the artifact says so")
    format: Literal["parquet", "trec"] | None = Field(None, description="default: by the ending, .parquet or a TREC run")
    query_column: str = Field("query_id", description="of a Parquet file")
    item_column: str = Field("item_id", description="of a Parquet file")
    score_column: str = Field("score", description="of a Parquet file; higher is better")
    shard_pairs: int = Field(1_000_000, ge=1, description="about how many pairs make one shard (one file)")
    max_quarantined: int = Field(1_000_000, ge=0, description="give up when more rows than this cannot be used")


def import_scores(corpus: EmbeddedCorpus, source: Path, config: ImportScoresConfig, out: Path) -> Manifest:
    """Write the `scores` artifact `out`: a row for each query that has a score, in the corpus's order.

    A row with an unknown id, without a finite score or malformed goes to `quarantine.jsonl` with the reason. Strings pass
    through in pieces; 12 bytes a pair stay in memory until they are sorted.

    Raises:
        InputError: see `read_scored_ids`; a pair that comes twice; no usable row, or too many that are not.
        ArtifactError: `out` holds something else.
    """
    check_replaceable(out, "scores", in_place=not is_local(out))
    failures: list[Failure] = []
    rows, query_index, item_index, scores = _read_triples(corpus, source, config, failures)
    if not len(rows):
        first = f" (first: {failures[0][2]})" if failures else ""
        raise InputError(f"{source} has no score that can be used{first}; check its ids, its columns and its format")
    queries = corpus.queries.take(rows.tolist())
    fingerprint = {"imported": config.model}
    made_from = {"items": corpus.items.fingerprint, "queries": queries.fingerprint, "cross_encoder": hash_json(fingerprint)}
    settings = {"imported_from": source.name, "shard_pairs": config.shard_pairs, "template": TEMPLATE}
    sizes = {"pairs": len(scores), "n_queries": len(rows), "n_items": len(corpus.items)}
    manifest = Manifest(
        kind="scores",
        config={**settings, "fingerprint": fingerprint},
        counts={**sizes, "truncated": 0, "quarantined": len(failures)},
        made_from=made_from,
    )
    with _new_folder(out, manifest) as folder:
        write_ids(folder, QUERIES, "query_id", queries.ids, queries.texts)
        write_ids(folder, ITEMS, "item_id", corpus.items.ids, corpus.items.full_texts)
        facts = {"fingerprint": hash_json({**made_from, **settings}), "truncated": 0}
        for shard, part in enumerate(_split(query_index, config.shard_pairs)):
            write_shard(folder, shard, query_index[part], item_index[part], scores[part], facts)
        if failures:
            write_quarantine(folder, failures)
    logger.info("imported %d scores of %d queries into %s, %d rows quarantined", len(scores), len(rows), out, len(failures))
    return manifest


def _read_triples(
    corpus: EmbeddedCorpus, source: Path, config: ImportScoresConfig, failures: list[Failure]
) -> tuple[npt.NDArray[np.int64], Int32Array, Int32Array, FloatArray]:
    """Rows of the corpus's queries that have a score, ascending, and triples (n,) sorted by (place in those, item)."""
    columns = (config.query_column, config.item_column, config.score_column)
    parts: list[Triples] = []
    for scored in read_scored_ids(source, config.format or find_format(source), columns):
        parts.append(_to_indices(scored, corpus, failures))
        if len(failures) > config.max_quarantined:
            raise InputError(
                f"more than {config.max_quarantined} rows of {source} cannot be used (first: {failures[0][2]}); check its ids "
                "and columns, or raise max_quarantined"
            )
    if not parts:
        parts.append((np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)))
    query_index, item_index, scores = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((item_index, query_index))
    query_index, item_index, scores = query_index[order], item_index[order], scores[order]
    twice = np.flatnonzero((np.diff(query_index) == 0) & (np.diff(item_index) == 0))
    if len(twice):
        pair = f"query {corpus.queries.ids[query_index[twice[0]]]!r}, item {corpus.items.ids[item_index[twice[0]]]!r}"
        raise InputError(f"{source} has {len(twice)} pairs more than once (first: {pair}); keep one score per pair")
    rows, places = np.unique(query_index, return_inverse=True)
    return rows.astype(np.int64), places.astype(np.int32), item_index, scores


def _to_indices(scored: ScoredIds, corpus: EmbeddedCorpus, failures: list[Failure]) -> Triples:
    """Indices and scores of the usable rows; the others go to `failures`."""
    failures += [("", "", f"row {row}: {reason}") for row, reason in scored.malformed]
    query_index = _look_up(scored.query_id, corpus.queries.index_of)
    item_index = _look_up(scored.item_id, corpus.items.index_of)
    usable = (query_index >= 0) & (item_index >= 0) & np.isfinite(scored.score)
    for place in np.flatnonzero(~usable):
        query_id, item_id = (ids[int(place)].as_py() or "" for ids in (scored.query_id, scored.item_id))
        if query_index[place] < 0:
            reason = f"query {query_id!r} is not in the corpus"
        elif item_index[place] < 0:
            reason = f"item {item_id!r} is not in the corpus"
        else:
            reason = f"the score is {scored.score[place]}"
        failures.append((query_id, item_id, f"row {scored.row[place]}: {reason}"))
    return query_index[usable], item_index[usable], scored.score[usable]


def _look_up(ids: pa.Array, index_of: Mapping[str, int]) -> Int32Array:
    """The index of each id, (n,), -1 where it is null or unknown; each distinct id is looked up once."""
    encoded = ids.dictionary_encode()
    known = [index_of.get(value, -1) for value in encoded.dictionary.to_pylist()]
    codes = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False)
    return np.array([*known, -1], dtype=np.int32)[codes]


def _split(query_index: Int32Array, shard_pairs: int) -> Iterator[slice]:
    """Slices of sorted triples, each of whole queries and of about `shard_pairs` pairs."""
    starts = np.flatnonzero(np.diff(query_index, prepend=-1))
    first_of_shard = starts[np.flatnonzero(np.diff(starts // shard_pairs, prepend=-1))]
    for start, stop in zip(first_of_shard, [*first_of_shard[1:], len(query_index)], strict=True):
        yield slice(int(start), int(stop))


@contextmanager
def _new_folder(out: Path, manifest: Manifest) -> Iterator[Path]:
    """`new_artifact`, or on an object store, which cannot rename, a new folder that is sealed last."""
    if is_local(out):
        with new_artifact(out, manifest) as folder:
            yield folder
        return
    if out.exists() and any(out.iterdir()):
        raise ArtifactError(f"{out} is not empty; choose another output folder")
    yield out
    seal(out, manifest)

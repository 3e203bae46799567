"""A `scores` artifact as files for others: TREC runs, and Parquet training sets as sentence-transformers' losses take them.

Knows no model. Columns stand in the order that the losses read them in, and there is no column of ids: the library
would train on it as text.
"""

import gzip
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from axn_ray.core.embedded_corpus import EmbeddedCorpus
from axn_ray.core.pairs import FloatArray
from axn_ray.core.ranking import order_by_score
from axn_ray.core.score_formats import find_blank, format_trec_lines, write_parquet_atomically, write_stream_atomically
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.score_store import Scores, match_rows
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)

BLOCK_ROWS = 1 << 15
FORMATS = "trec: a run; pairs: query, item, score; hard_negatives: query, positive, negative_1, ..., label"


class ExportScoresConfig(BaseModel):
    """Which file to make of the scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["trec", "pairs", "hard_negatives"] = Field("trec", description=FORMATS)
    top: int | None = Field(None, ge=1, description="of trec and pairs: so many of each query's highest scores; default: all")
    tag: str | None = Field(None, description="of trec: the run's name; default: the imported model's, or the CE's hash")
    positives: Literal["label", "best"] | None = Field(
        None, description="of hard_negatives: the labelled item, or the highest-scored; default: label where there are labels"
    )
    negatives: int = Field(5, ge=1, description="of hard_negatives: so many of the highest-scored other items")
    min_margin: float | None = Field(None, description="of hard_negatives: negatives score so much less than the positive")
    label: Literal["scores", "margins"] = Field(
        "scores", description="of hard_negatives: raw scores of positive and negatives, or positive minus each negative"
    )


def export_scores(scores: Scores, config: ExportScoresConfig, out: Path, corpus: EmbeddedCorpus | None = None) -> int:
    """Write the file `out`; returns its rows. Training sets hold texts: they need the corpus.

    Raises:
        InputError: no corpus or labels where they are needed, an id that a run cannot hold, or nothing to write.
        ArtifactError: the corpus lacks a text that was scored.
    """
    if config.format == "trec":
        return _write_run(scores, config, out)
    if corpus is None:
        raise InputError(f"format {config.format} holds texts; give the embeddings artifact that the scores belong to")
    if out.suffix != ".parquet":
        raise InputError(f"{out} will be a Parquet file; name it so (.parquet)")
    query_texts, item_texts, labels = _find_texts(scores, corpus)
    if config.format == "pairs":
        query_index, item_index, values = _best_first(scores.matrix, config.top)
        return _write_pairs(scores, query_texts.take(query_index), item_texts, item_index, values, out)
    positives = config.positives or ("best" if labels is None else "label")
    if positives == "label" and labels is None:
        raise InputError("positives=label, but the corpus has no labels (column item_id of the queries); set positives=best")
    rows, items, values = _choose_negatives(scores, config, labels if positives == "label" else None)
    described = {"positives": positives, "label": config.label, "cross_encoder": scores.config.get("fingerprint")}
    return _write_hard_negatives(config, described, query_texts.take(rows), item_texts, items, values, out)


def name_cross_encoder(scores: Scores) -> str:
    """The name under which the scores were imported, or the start of their CE's hash; without blanks."""
    name = (scores.config.get("fingerprint") or {}).get("imported") or scores.made_from["cross_encoder"][:12]
    return "_".join(str(name).split())


def _best_first(matrix: ScoreMatrix, top: int | None) -> tuple[Int32Array, Int32Array, FloatArray]:
    """Query, item and score of each pair, (n,): by query, then descending score, ties by item; the first `top` of each query."""
    query_index = matrix.query_index
    order = np.lexsort((matrix.item_index, -matrix.scores, query_index))
    if top is not None:
        kept = np.arange(len(order)) - matrix.indptr[query_index] < top
        order, query_index = order[kept], query_index[kept]
    return query_index, matrix.item_index[order], matrix.scores[order]


def _write_run(scores: Scores, config: ExportScoresConfig, out: Path) -> int:
    tag = config.tag or name_cross_encoder(scores)
    for name, names in (("the tag", [tag]), ("query id", scores.query_ids), ("item id", scores.item_ids)):
        if (blank := find_blank(names)) is not None:
            raise InputError(f"{name} {blank!r} is empty or has a blank, which a TREC run cannot hold; export another format")
    query_index, item_index, values = _best_first(scores.matrix, config.top)
    ends = np.searchsorted(query_index, np.arange(len(scores.query_ids) + 1))
    item_ids = pa.array(scores.item_ids, pa.string())
    with write_stream_atomically(out) as stream:
        lines = cast(IO[bytes], gzip.GzipFile(fileobj=stream, mode="wb", mtime=0)) if out.suffix == ".gz" else stream
        for query, query_id in enumerate(scores.query_ids):
            part = slice(ends[query], ends[query + 1])
            lines.write(format_trec_lines(query_id, item_ids.take(item_index[part]), values[part], tag))
        if lines is not stream:
            lines.close()
    return len(values)


def _find_texts(scores: Scores, corpus: EmbeddedCorpus) -> tuple[pa.Array, pa.Array, list[int | None] | None]:
    """Texts of the scores' queries and items, and each query's labelled item among those items (None: it has none there)."""
    queries, items = corpus.queries, corpus.items
    query_rows = match_rows("query", scores.query_ids, scores.query_digests, queries.index_of, queries.texts)
    item_rows = match_rows("item", scores.item_ids, scores.item_digests, items.index_of, items.full_texts)
    labels: list[int | None] | None = None
    if queries.labels is not None:
        place_of = {item_id: place for place, item_id in enumerate(scores.item_ids)}
        labels = [place_of.get(queries.labels[row]) for row in query_rows]
    texts = [queries.texts[row] for row in query_rows], [items.full_texts[row] for row in item_rows]
    return pa.array(texts[0], pa.string()), pa.array(texts[1], pa.large_string()), labels


def _write_pairs(
    scores: Scores, queries: pa.Array, item_texts: pa.Array, item_index: Int32Array, values: FloatArray, out: Path
) -> int:
    """`query`, `item`, `score`: what CrossEncoder's MSELoss takes, `score` being a label column's name."""
    described = {"cross_encoder": scores.config.get("fingerprint")}
    schema = _schema([("query", pa.string()), ("item", pa.string()), ("score", pa.float32())], described)
    with write_parquet_atomically(out, schema) as writer:
        for start in range(0, len(values), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            items = item_texts.take(item_index[part]).cast(pa.string())
            writer.write_table(pa.table([queries[part], items, values[part]], schema=schema))
    return len(values)


def _choose_negatives(
    scores: Scores, config: ExportScoresConfig, labels: Sequence[int | None] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], FloatArray]:
    """Queries (m,), their positive and negatives (m, negatives + 1) and those items' scores; others are counted and left out."""
    same_text = np.unique(np.array(scores.item_digests, dtype="S16"), return_inverse=True)[1]
    rows: list[tuple[int, Int32Array, FloatArray]] = []
    left_out: Counter[str] = Counter()
    for query in range(scores.matrix.n_queries):
        items, values = scores.matrix.row(query)
        order = order_by_score(items, values)
        place = order[:1] if labels is None else np.flatnonzero(items == (-1 if labels[query] is None else labels[query]))
        if not len(place):
            left_out["their labelled item has no score" if labels is not None else "they have no score"] += 1
            continue
        allowed = same_text[items[order]] != same_text[items[place[0]]]
        if config.min_margin is not None:
            allowed &= values[order] <= values[place[0]] - np.float32(config.min_margin)
        chosen = np.concatenate([place, order[allowed][: config.negatives]])
        if len(chosen) <= config.negatives:
            left_out[f"they have fewer than {config.negatives} negatives"] += 1
            continue
        rows.append((query, items[chosen], values[chosen]))
    reasons = ", ".join(f"{n} because {reason}" for reason, n in left_out.items())
    if not rows:
        raise InputError(
            f"no query has a positive and {config.negatives} negatives ({reasons}); score more pairs or ask for fewer"
        )
    if left_out:
        logger.warning("%d of %d queries are left out: %s", left_out.total(), scores.matrix.n_queries, reasons)
    columns = zip(*rows, strict=True)
    return np.array(next(columns)), np.stack(next(columns)), np.stack(next(columns))


def _write_hard_negatives(
    config: ExportScoresConfig,
    described: dict[str, Any],
    queries: pa.Array,
    item_texts: pa.Array,
    items: npt.NDArray[np.int32],
    values: FloatArray,
    out: Path,
) -> int:
    """`query`, `positive`, `negative_1`, ..., `label`: what MarginMSELoss takes, and with label=scores DistillKLDivLoss."""
    names = ["query", "positive", *(f"negative_{n}" for n in range(1, config.negatives + 1))]
    schema = _schema([*((name, pa.string()) for name in names), ("label", pa.list_(pa.float32()))], described)
    label = values if config.label == "scores" else values[:, :1] - values[:, 1:]
    with write_parquet_atomically(out, schema) as writer:
        for start in range(0, len(items), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            texts = [item_texts.take(column).cast(pa.string()) for column in items[part].T]
            writer.write_table(pa.table([queries[part], *texts, pa.array(list(label[part]), schema.field("label").type)], schema))
    return len(items)


def _schema(fields: Sequence[tuple[str, pa.DataType]], described: dict[str, Any]) -> pa.Schema:
    """The columns, and in the file's metadata, under `axn_ray`, what made them."""
    return pa.schema(list(fields), metadata={"axn_ray": json.dumps(described)})

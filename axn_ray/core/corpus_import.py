"""A corpus from elsewhere becomes a folder that the embed stage reads: items, queries, judgements, what was bad.

Read and written in pieces: an id's hash is all that stays of an item. Knows no model.
"""

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field

from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus_formats import CorpusSource, Record, beir, ms_marco, read_any, read_qrels, table, zeshel
from axn_ray.core.score_store import ITEMS, QUARANTINE, QUERIES
from axn_ray.errors import InputError

logger = logging.getLogger(__name__)

QRELS = "qrels.parquet"
QRELS_SCHEMA = pa.schema([("query_id", pa.string()), ("item_id", pa.string()), ("relevance", pa.int32()), ("split", pa.string())])
WRITE_ROWS = 4096
FORMATS = {"beir": "corpus*", "msmarco": "collection.tsv*", "zeshel": "documents"}


class ImportCorpusConfig(BaseModel):
    """What the files are and which of their columns mean what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["beir", "msmarco", "zeshel", "table"] | None = Field(None, description="default: by what is there")
    queries: Path | None = Field(None, description="table: file of the queries")
    qrels: Path | None = Field(None, description="table: file of judgements, TREC qrels")
    item_id: str = Field("item_id", description="table: column of the item's id")
    item_text: str = Field("text", description="table: column of the item's text, or a template of columns: '{name}. {summary}'")
    query_id: str = Field("query_id", description="table: column of the query's id")
    query_text: str = Field("text", description="table: column of the query's text, or a template")
    context_words: int = Field(64, ge=1, description="zeshel: words of context on either side of a mention")
    max_quarantined: int = Field(100_000, ge=0, description="give up when more lines than this cannot be used")


def open_source(path: Path, config: ImportCorpusConfig) -> CorpusSource:
    """The streams of a folder, or of a table.

    Raises:
        InputError: nothing there, or nothing that has one of the formats.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; check the path")
    form = config.format or ("table" if path.is_file() else find_format(path))
    match form:
        case "beir":
            return beir(path)
        case "msmarco":
            return ms_marco(path)
        case "zeshel":
            return zeshel(path, config.context_words)
    if config.queries is None:
        raise InputError(f"{path} is a table of items; name the file of the queries, too (--queries)")
    return CorpusSource(
        items=table(read_any(path), config.item_id, config.item_text, "item_id"),
        queries=table(read_any(config.queries), config.query_id, config.query_text, "query_id"),
        qrels=read_qrels(config.qrels) if config.qrels else (),
    )


def find_format(folder: Path) -> str:
    """Which of the formats a folder has.

    Raises:
        InputError: none.
    """
    for name, sign in FORMATS.items():
        if any(folder.glob(sign)):
            return name
    raise InputError(f"{folder} has none of {', '.join(FORMATS.values())}; name its format, or give a file of items")


def import_corpus(path: Path, config: ImportCorpusConfig, out: Path) -> Manifest:
    """Write the `corpus` artifact `out`: `items.parquet`, `queries.parquet`, `qrels.parquet`, `quarantine.jsonl`.

    A line without id or text, or with an id that stood before, goes to `quarantine.jsonl` with its place and the reason.
    A query's label is its best judged item, and its split that of its judgements: see `_Judgements.label`.

    Raises:
        InputError: a file that cannot be read, no usable items or queries, or too much that cannot be used.
        ArtifactError: `out` holds something else.
    """
    source = open_source(path, config)
    settings = config.model_dump(mode="json", exclude={"queries", "qrels"})
    manifest = Manifest(kind="corpus", config={**settings, "imported_from": path.name}, counts={}, made_from={})
    with new_artifact(out, manifest) as folder, (folder / QUARANTINE).open("w", encoding="utf-8") as stream:
        quarantine = _Quarantine(stream, config.max_quarantined)
        items, queries, judgements = _Seen("item_id"), _Seen("query_id"), _Judgements()
        item_columns = _strings("item_id", "title", "text", "world")
        n_items = _write(folder / ITEMS, items.check(source.items, quarantine), item_columns)
        kept = list(queries.check(source.queries, quarantine))
        n_qrels = _write(folder / QRELS, judgements.check(source.qrels, items, queries, quarantine), QRELS_SCHEMA)
        labelled = judgements.label(kept)
        query_columns = dict.fromkeys(name for row in labelled for name in row)
        n_queries = _write(folder / QUERIES, labelled, _strings(*query_columns))
        if not n_items or not n_queries:
            what = "items" if not n_items else "queries"
            raise InputError(f"{path} has no {what} that can be used{quarantine.first}; check its format and columns")
        found = {"items": n_items, "queries": n_queries, "qrels": n_qrels, "quarantined": quarantine.n}
        manifest.counts.update(found)  # known only now; sealed when this block ends
    logger.info("imported %s into %s", ", ".join(f"{n} {name}" for name, n in found.items()), out)
    return manifest


class _Quarantine:
    """The lines that cannot be used, written as they come."""

    def __init__(self, stream: IO[str], at_most: int) -> None:
        self._stream, self._at_most, self.n, self.first = stream, at_most, 0, ""

    def add(self, record: Record, reason: str) -> None:
        """Note one.

        Raises:
            InputError: there are too many.
        """
        self.n += 1
        self.first = self.first or f" (first: {record.place}: {reason})"
        self._stream.write(json.dumps({"place": record.place, "reason": reason}, ensure_ascii=False) + "\n")
        if self.n > self._at_most:
            raise InputError(f"more than {self._at_most} lines cannot be used{self.first}; check the format or raise the limit")


class _Seen:
    """Lets records with an id and a text through, each id once; remembers the ids' hashes."""

    def __init__(self, id_name: str) -> None:
        self._id_name = id_name
        self._hashes: set[int] = set()

    def __contains__(self, value: str) -> bool:
        return hash(value) in self._hashes

    def check(self, records: Iterable[Record], quarantine: _Quarantine) -> Iterator[dict[str, Any]]:
        """The values of what can be used."""
        for record in records:
            values = {name: str(value) for name, value in record.values.items() if value is not None}
            identity = values.get(self._id_name, "")
            if record.wrong:
                quarantine.add(record, record.wrong)
            elif not identity.strip() or not values.get("text", "").strip():
                quarantine.add(record, f"no {'text' if identity.strip() else self._id_name}")
            elif broken := next((name for name, value in values.items() if not _is_unicode(value)), None):
                quarantine.add(record, f"{broken} holds half a character, which is no Unicode")
            elif identity in self:
                quarantine.add(record, f"{self._id_name} {identity!r} stood before")
            else:
                self._hashes.add(hash(identity))
                yield values


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: what remains of an emoji that was cut through
        return False
    return True


class _Judgements:
    """Each query's best judged item and its split."""

    def __init__(self) -> None:
        self._best: dict[str, tuple[int, str]] = {}
        self._split: dict[str, str] = {}

    def check(self, records: Iterable[Record], items: _Seen, queries: _Seen, quarantine: _Quarantine) -> Iterator[dict[str, Any]]:
        """The judgements of known queries and items."""
        for record in records:
            query_id, item_id, relevance, split = (record.values.get(name) for name in QRELS_SCHEMA.names)
            query, item = str(query_id), str(item_id)
            if record.wrong:
                quarantine.add(record, record.wrong)
            elif query not in queries or item not in items:
                unknown = f"query {query!r}" if query not in queries else f"item {item!r}"
                quarantine.add(record, f"judges {unknown}, which is not there")
            elif (grade := _read_grade(relevance)) is None:
                quarantine.add(record, f"the relevance {relevance!r} is no whole number")
            else:
                if grade > self._best.get(query, (0, ""))[0]:
                    self._best[query] = (grade, item)
                if split:
                    self._split[query] = split
                yield {"query_id": query, "item_id": item, "relevance": grade, "split": split}

    def label(self, queries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Queries with `item_id` where every one has a label, and `split` where both train and test have some.

        A query that no split judges is for training, which needs no judgement.
        """
        best = {query: item for query, (_, item) in self._best.items()}
        labels = [row.get("item_id") or best.get(row["query_id"]) for row in queries]
        splits = [row.get("split") or self._split.get(row["query_id"], "train") for row in queries]
        more = {}
        if all(labels):
            more["item_id"] = labels
        if {"train", "test"} <= set(splits):
            more["split"] = splits
        plain = ({name: row[name] for name in ("query_id", "text", "world") if name in row} for row in queries)
        return [row | {name: column[n] for name, column in more.items()} for n, row in enumerate(plain)]


def _read_grade(relevance: Any) -> int | None:
    try:
        number = float(relevance or 0)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Write rows in pieces, null where a row lacks a column. Returns how many."""
    n, left = 0, iter(rows)
    with pa.parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while piece := list(itertools.islice(left, WRITE_ROWS)):
            writer.write_table(pa.Table.from_pylist(piece, schema))
            n += len(piece)
    return n


def _strings(*names: str) -> pa.Schema:
    return pa.schema([(name, pa.string()) for name in names])

"""An imported corpus leaves as a BEIR folder, which most retrieval tools read. Knows no model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from axn_ray.core.artifact import read_manifest
from axn_ray.core.corpus_formats import read_parquet
from axn_ray.core.corpus_import import QRELS
from axn_ray.core.score_formats import write_stream_atomically
from axn_ray.core.score_store import ITEMS, QUERIES
from axn_ray.errors import InputError


def export_corpus(corpus: Path, out: Path) -> None:
    """Write `corpus.jsonl`, `queries.jsonl` and a `qrels/SPLIT.tsv` for each split (`test` where there is none).

    The label of a query that has no judgement counts as one, of relevance 1.

    Raises:
        ArtifactError: `corpus` is no imported corpus.
        InputError: `out` is there already, or cannot be written.
    """
    read_manifest(corpus, "corpus")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; choose another output folder")
    _write_jsonl(out / "corpus.jsonl", corpus / ITEMS, {"_id": "item_id", "title": "title", "text": "text"})
    _write_jsonl(out / "queries.jsonl", corpus / QUERIES, {"_id": "query_id", "text": "text"})
    for name in dict.fromkeys(split for split, _ in _judgements(corpus)):
        with write_stream_atomically(out / "qrels" / f"{name}.tsv") as stream:
            stream.write(b"query-id\tcorpus-id\tscore\n")
            for split, line in _judgements(corpus):
                if split == name:
                    stream.write(line.encode())


def _judgements(corpus: Path) -> Iterator[tuple[str, str]]:
    """The split and the line of each judgement, then of each label without one."""
    judged = set()
    for row in _rows(corpus / QRELS):
        judged.add(row["query_id"])
        yield row["split"] or "test", f"{row['query_id']}\t{row['item_id']}\t{row['relevance']}\n"
    for row in _rows(corpus / QUERIES):
        if row.get("item_id") and row["query_id"] not in judged:
            yield row.get("split") or "test", f"{row['query_id']}\t{row['item_id']}\t1\n"


def _rows(path: Path) -> Iterator[Any]:
    return (record.values for record in read_parquet([path]))


def _write_jsonl(out: Path, source: Path, names: dict[str, str]) -> None:
    with write_stream_atomically(out) as stream:
        for row in _rows(source):
            line = {new: row.get(old) or "" for new, old in names.items()}
            stream.write((json.dumps(line, ensure_ascii=False) + "\n").encode())

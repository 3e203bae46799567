"""Files of scores: one Parquet shard per range of queries, beside a small JSON that says what made it.

A shard is `query_index int32, item_index int32, score float32` (raw logit). The folder may lie on any file system that
fsspec knows. Knows no model and no Ray.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from axn_ray.core.artifact import hash_file, is_local, read_manifest, write_file_atomically
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ArtifactError

FloatArray = npt.NDArray[np.float32]
SCHEMA = pa.schema([("query_index", pa.int32()), ("item_index", pa.int32()), ("score", pa.float32())])
ENCODING = {"query_index": "DELTA_BINARY_PACKED", "item_index": "DELTA_BINARY_PACKED", "score": "BYTE_STREAM_SPLIT"}
QUERIES, ITEMS, QUARANTINE = "queries.parquet", "items.parquet", "quarantine.jsonl"
DIGEST_BYTES = 16


def shard_path(folder: Path, shard: int) -> Path:
    """Where shard number `shard` of a scores folder stands."""
    return folder / "shards" / f"part-{shard:05d}.parquet"


def write_shard(
    folder: Path, shard: int, query_index: Int32Array, item_index: Int32Array, scores: FloatArray, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write one shard, then its JSON (`rows`, `sha256` and `facts`), which it returns: with both it counts as done.

    Pairs whose score is NaN were quarantined: they have no row.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    path = shard_path(folder, shard)
    scored = ~np.isnan(scores)
    content = _to_parquet(
        pa.table([query_index[scored], item_index[scored], scores[scored]], schema=SCHEMA),
        use_dictionary=False,
        column_encoding=ENCODING,
    )
    described = {"rows": int(scored.sum()), "sha256": hashlib.sha256(content).hexdigest(), **facts}
    write_into(folder, path, content)
    write_into(folder, path.with_suffix(".json"), (json.dumps(described, indent=1) + "\n").encode())
    return described


def write_into(folder: Path, path: Path, content: bytes) -> None:
    """Write one file of a scores folder atomically.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file_atomically(path, content)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _cannot_write(folder: Path, error: OSError) -> ArtifactError:
    reason = error.strerror or str(error)
    return ArtifactError(f"{folder} cannot be written ({reason}); free or choose another place, done shards are kept")


def _to_parquet(table: pa.Table, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    pa.parquet.write_table(table, buffer, compression="zstd", **settings)
    return buffer.getvalue()


def _read_parquet(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    return pa.parquet.read_table(pa.BufferReader(path.read_bytes()), schema=schema)


def read_shard_facts(folder: Path, shard: int, fingerprint: str) -> dict[str, Any] | None:
    """The JSON of a shard that is done and whole, or None where it must be scored (again).

    Raises:
        ArtifactError: the shard was made with another fingerprint.
    """
    path = shard_path(folder, shard)
    try:
        facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if facts["fingerprint"] != fingerprint:
        raise ArtifactError(
            f"{folder} holds scores made with the fingerprint {facts['fingerprint'][:12]}, this run has {fingerprint[:12]} "
            "(another model, corpus or setting); choose another output folder or delete the old one"
        )
    return facts if path.is_file() and hash_file(path) == facts["sha256"] else None


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder for one run; the lock goes with the process, however that ends.

    Object stores have no locks: two runs there write the same bytes to the same names, and pay twice.

    Raises:
        ArtifactError: another run holds it, or the folder cannot be written.
    """
    if not is_local(folder):
        yield
        return
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout as error:
        raise ArtifactError(f"another run is writing {folder}; wait for it or choose another output folder") from error
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def digest_texts(texts: Sequence[str]) -> list[bytes]:
    """16 bytes of each text's sha256: what makes a text the same text in another corpus."""
    return [hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES] for text in texts]


def match_rows(
    side: str, ids: Sequence[str], digests: Sequence[bytes], index_of: Mapping[str, int], texts: Sequence[str]
) -> list[int]:
    """The corpus's row of each id, with the text that was scored; `side` is query or item.

    Raises:
        ArtifactError: the corpus does not have it, or with another text.
    """
    unknown = [name for name in ids if name not in index_of]
    if unknown:
        raise ArtifactError(f"the scores hold {side} {unknown[0]!r}, the embeddings do not; give those that were scored")
    rows = [index_of[name] for name in ids]
    for name, digest, found in zip(ids, digests, digest_texts([texts[row] for row in rows]), strict=True):
        if digest != found:
            raise ArtifactError(
                f"the text of {side} {name!r} has changed since it was scored; score it again or give the embeddings of then"
            )
    return rows


def write_ids(folder: Path, name: str, column: str, ids: Sequence[str], texts: Sequence[str]) -> None:
    """Write `queries.parquet` or `items.parquet`: the id and the text's digest of each row."""
    table = pa.table({column: list(ids), "digest": pa.array(digest_texts(texts), pa.binary(DIGEST_BYTES))})
    write_into(folder, folder / name, _to_parquet(table))


def write_quarantine(folder: Path, failed: Iterable[tuple[str, str, str]]) -> None:
    """Write `quarantine.jsonl`, a line (`query_id`, `item_id`, `reason`) for each pair that could not be scored."""
    lines = [json.dumps({"query_id": q, "item_id": i, "reason": why}, ensure_ascii=False) + "\n" for q, i, why in failed]
    write_into(folder, folder / QUARANTINE, "".join(lines).encode())


@dataclass(frozen=True)
class Scores:
    """A scores artifact in memory: the matrix, and the ids and text digests of its rows and columns."""

    matrix: ScoreMatrix
    query_ids: tuple[str, ...]
    item_ids: tuple[str, ...]
    query_digests: tuple[bytes, ...]
    item_digests: tuple[bytes, ...]
    made_from: dict[str, str]
    config: dict[str, Any]

    def dense(self) -> FloatArray:
        """(n_queries, n_items) float32, where every pair was scored.

        Raises:
            ArtifactError: some pair is missing.
        """
        expected = self.matrix.n_queries * self.matrix.n_items
        if self.matrix.n_observed != expected:
            found = f"{self.matrix.n_observed} of {expected} pairs are scored"
            raise ArtifactError(f"{found}; exact truth and CUR's dense rows need all of them, score with --choice all")
        return self.matrix.scores.reshape(self.matrix.n_queries, self.matrix.n_items)


def load_scores(folder: Path) -> Scores:
    """Read a finished scores artifact.

    Raises:
        ArtifactError: not such an artifact, a damaged shard, or rows that do not add up.
    """
    manifest = read_manifest(folder, "scores")
    try:
        queries, items = _read_parquet(folder / QUERIES), _read_parquet(folder / ITEMS)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, error) from error
    matrix = read_shards(folder, _list_shards(folder), len(queries), len(items))
    _check_pairs(folder, matrix.n_observed)
    return Scores(
        matrix=matrix,
        query_ids=tuple(queries["query_id"].to_pylist()),
        item_ids=tuple(items["item_id"].to_pylist()),
        query_digests=tuple(queries["digest"].to_pylist()),
        item_digests=tuple(items["digest"].to_pylist()),
        made_from=manifest.made_from,
        config=manifest.config,
    )


@dataclass(frozen=True)
class ShardSpan:
    """One shard of a finished artifact: its number, how many rows it has, and its first and last query."""

    shard: int
    rows: int
    first: int
    last: int


def read_spans(folder: Path) -> list[ShardSpan]:
    """What the footers of a finished scores artifact say about its shards; those without rows are left out.

    Raises:
        ArtifactError: a damaged shard, or rows that do not add up.
    """
    spans = []
    try:
        for number in _list_shards(folder):
            with shard_path(folder, number).open("rb") as stream:
                footer = pa.parquet.ParquetFile(stream).metadata
                groups = [footer.row_group(n).column(0).statistics for n in range(footer.num_row_groups) if footer.num_rows]
            if groups:
                first, last = min(group.min for group in groups), max(group.max for group in groups)
                spans.append(ShardSpan(number, footer.num_rows, first, last))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, error) from error
    _check_pairs(folder, sum(span.rows for span in spans))
    return spans


def read_scored_queries(folder: Path) -> tuple[list[str], list[bytes]]:
    """Ids and text digests of the queries of a finished scores artifact, in order of their rows."""
    queries = _read_parquet(folder / QUERIES)
    return queries["query_id"].to_pylist(), queries["digest"].to_pylist()


def _list_shards(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("part-")) for path in (folder / "shards").glob("part-*.parquet"))


def _check_pairs(folder: Path, found: int) -> None:
    said = read_manifest(folder, "scores").counts["pairs"]
    if found != said:
        raise ArtifactError(f"{folder} has {found} rows, its manifest says {said}; score it again")


def read_shards(folder: Path, shards: Iterable[int], n_queries: int, n_items: int) -> ScoreMatrix:
    """The score matrix of some shards of a folder, finished or not.

    Raises:
        ArtifactError: a damaged shard.
    """
    try:
        tables = [_read_parquet(shard_path(folder, shard), SCHEMA) for shard in shards]
    except (pa.ArrowException, OSError) as error:
        raise _damaged(folder, error) from error
    table = pa.concat_tables([SCHEMA.empty_table(), *tables])
    query_index, item_index, scores = (table[name].to_numpy() for name in SCHEMA.names)
    return ScoreMatrix.from_triples(query_index, item_index, scores, n_queries=n_queries, n_items=n_items)


def _damaged(folder: Path, error: Exception) -> ArtifactError:
    reason = str(error).splitlines()[0]
    return ArtifactError(f"{folder} has a damaged file ({reason}); run the scoring again, it redoes only what is bad")

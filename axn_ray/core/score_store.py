"""Files of scores: one Parquet shard per range of queries, beside a small JSON that says what made it.

A shard is `query_index int32, item_index int32, score float32` (raw logit). Knows no model and no Ray.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from axn_ray.core.artifact import hash_file, read_manifest, write_file_atomically
from axn_ray.core.score_matrix import ScoreMatrix
from axn_ray.core.tokens import Int32Array
from axn_ray.errors import ArtifactError

FloatArray = npt.NDArray[np.float32]
SCHEMA = pa.schema([("query_index", pa.int32()), ("item_index", pa.int32()), ("score", pa.float32())])
ENCODING = {"query_index": "DELTA_BINARY_PACKED", "item_index": "DELTA_BINARY_PACKED", "score": "BYTE_STREAM_SPLIT"}


def shard_path(folder: Path, shard: int) -> Path:
    """Where shard number `shard` of a scores folder stands."""
    return folder / "shards" / f"part-{shard:05d}.parquet"


def write_shard(
    folder: Path, shard: int, query_index: Int32Array, item_index: Int32Array, scores: FloatArray, facts: Mapping[str, Any]
) -> None:
    """Write one shard, then its JSON (`rows`, `sha256` and `facts`): a shard counts as done once both stand there."""
    path = shard_path(folder, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pa.parquet.write_table(
        pa.table([query_index, item_index, scores], schema=SCHEMA),
        buffer,
        compression="zstd",
        use_dictionary=False,
        column_encoding=ENCODING,
    )
    write_file_atomically(path, buffer.getvalue())
    described = {"rows": len(scores), "sha256": hash_file(path), **facts}
    write_file_atomically(path.with_suffix(".json"), (json.dumps(described, indent=1) + "\n").encode())


def read_shard_facts(folder: Path, shard: int, fingerprint: str) -> dict[str, Any] | None:
    """The JSON of a shard that is done and whole, or None where it must be scored (again).

    Raises:
        ArtifactError: the shard was made with another fingerprint.
    """
    path = shard_path(folder, shard)
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    facts: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    if facts["fingerprint"] != fingerprint:
        raise ArtifactError(
            f"{folder} holds scores made with the fingerprint {facts['fingerprint'][:12]}, this run has {fingerprint[:12]} "
            "(another model, corpus or setting); choose another output folder or delete the old one"
        )
    return facts if hash_file(path) == facts["sha256"] else None


@dataclass(frozen=True)
class Scores:
    """A scores artifact in memory: the matrix and the ids of its rows."""

    matrix: ScoreMatrix
    query_ids: tuple[str, ...]
    made_from: dict[str, str]
    config: dict[str, Any]

    def dense(self) -> FloatArray:
        """(n_queries, n_items) float32, where every pair was scored.

        Raises:
            ArtifactError: some pair is missing.
        """
        expected = self.matrix.n_queries * self.matrix.n_items
        if self.matrix.n_observed != expected:
            raise ArtifactError(f"{self.matrix.n_observed} of {expected} pairs are scored; exact truth needs all of them")
        return self.matrix.scores.reshape(self.matrix.n_queries, self.matrix.n_items)


def load_scores(folder: Path) -> Scores:
    """Read a finished scores artifact.

    Raises:
        ArtifactError: not such an artifact, a damaged shard, or rows that do not add up.
    """
    manifest = read_manifest(folder, "scores")
    paths = sorted((folder / "shards").glob("part-*.parquet"))
    try:
        tables = [pa.parquet.read_table(path, schema=SCHEMA) for path in paths]
        query_ids = tuple(pa.parquet.read_table(folder / "queries.parquet")["query_id"].to_pylist())
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"{folder} has a damaged file ({reason}); run the scoring again, it redoes only what is bad"
        ) from error
    table = pa.concat_tables(tables)
    if table.num_rows != manifest.counts["pairs"]:
        raise ArtifactError(f"{folder} has {table.num_rows} rows, its manifest says {manifest.counts['pairs']}; score it again")
    columns = [table[name].to_numpy() for name in SCHEMA.names]
    matrix = ScoreMatrix.from_triples(
        columns[0], columns[1], columns[2], n_queries=len(query_ids), n_items=int(manifest.counts["n_items"])
    )
    return Scores(matrix, query_ids, manifest.made_from, manifest.config)

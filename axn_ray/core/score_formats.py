"""Files of scores that others write and read: Parquet with ids, and TREC runs (`qid Q0 docid rank score tag`).

Read and written in pieces, whatever their size. Knows ids and scores, no corpus and no artifact.
"""

import gzip
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from axn_ray.core.artifact import is_local
from axn_ray.core.pairs import FloatArray
from axn_ray.errors import InputError

Format = Literal["parquet", "trec"]
BATCH_ROWS = 1 << 17
BATCH_BYTES = 1 << 23
TREC_FIELDS = 6
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
NOT_FINITE = r"(?i)^[+-]?(nan|inf|infinity)$"


@dataclass(frozen=True)
class ScoredIds:
    """Some rows of a file: `query_id`, `item_id` (string arrays, null where absent), `score float32`, `row` (from 1).

    A row whose score is no number has NaN; rows that are no rows at all stand in `malformed` as (row, what is wrong).
    """

    row: npt.NDArray[np.int64]
    query_id: pa.Array
    item_id: pa.Array
    score: FloatArray
    malformed: Sequence[tuple[int, str]] = field(default_factory=tuple)


def find_format(source: Path) -> Format:
    """`parquet` by the ending, any other is a TREC run."""
    return "parquet" if source.name.endswith(".parquet") else "trec"


def read_scored_ids(source: Path, form: Format, columns: Sequence[str]) -> Iterator[ScoredIds]:
    """Read a file piece by piece; `columns` name the query id, the item id and the score of a Parquet file.

    Raises:
        InputError: no such file, a damaged one, a missing column, a score column that holds no numbers, or no text.
    """
    if not source.is_file():
        raise InputError(f"{source} does not exist or is not a file; check the path")
    try:
        with source.open("rb") as stream:
            yield from _read_parquet(stream, source, columns) if form == "parquet" else _read_trec(stream, source)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{source} cannot be read as {form} ({reason}); it may be damaged or of another format") from error


def _read_parquet(stream: IO[bytes], source: Path, columns: Sequence[str]) -> Iterator[ScoredIds]:
    file = pa.parquet.ParquetFile(stream)
    names = file.schema_arrow.names
    missing = [name for name in columns if name not in names]
    if missing:
        raise InputError(f"{source} has no column {missing[0]!r} (it has {', '.join(names)}); name its columns or rename one")
    kind = file.schema_arrow.field(columns[2]).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise InputError(f"{source}: column {columns[2]!r} holds {kind} values, scores are numbers; name another column")
    start = 1
    for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
        query_id, item_id = (batch.column(batch.schema.get_field_index(name)).cast(pa.string()) for name in columns[:2])
        scores = batch.column(batch.schema.get_field_index(columns[2])).cast(pa.float64(), safe=False)
        with np.errstate(over="ignore"):
            scores = scores.to_numpy(zero_copy_only=False).astype(np.float32)
        yield ScoredIds(np.arange(start, start + len(scores)), query_id, item_id, scores)
        start += len(scores)


def _read_trec(stream: IO[bytes], source: Path) -> Iterator[ScoredIds]:
    lines = cast(IO[bytes], gzip.open(stream)) if source.name.endswith(".gz") else stream
    start, rest = 1, b""
    while data := lines.read(BATCH_BYTES):
        whole, newline, rest = (rest + data).rpartition(b"\n")
        if newline:
            yield _parse_trec(whole, start)
            start += whole.count(b"\n") + 1
        elif len(rest) > BATCH_BYTES:
            raise InputError(f"{source}: line {start} has more than {BATCH_BYTES} bytes, which is no TREC run; check the path")
    yield _parse_trec(rest, start)


def _parse_trec(text: bytes, start: int) -> ScoredIds:
    """The lines of a piece, the first of them line `start` of the file."""
    lines = pc.ascii_trim_whitespace(pa.array(text.decode().split("\n"), pa.string()))
    fields = pc.ascii_split_whitespace(lines)
    counts = pc.list_value_length(fields).to_numpy()
    is_blank = pc.equal(lines, "").to_numpy(zero_copy_only=False)
    whole = np.flatnonzero((counts == TREC_FIELDS) & ~is_blank)
    wrong = np.flatnonzero((counts != TREC_FIELDS) & ~is_blank)
    malformed = [(int(line) + start, f"{counts[line]} fields, a line of a TREC run has {TREC_FIELDS}") for line in wrong]
    flat = fields.take(pa.array(whole)).flatten()
    query_id, item_id, score = (flat.take(pa.array(np.arange(len(whole)) * TREC_FIELDS + place)) for place in (0, 2, 4))
    is_number = pc.match_substring_regex(score, NUMBER).to_numpy(zero_copy_only=False)
    is_score = is_number | pc.match_substring_regex(score, NOT_FINITE).to_numpy(zero_copy_only=False)
    malformed += [(int(whole[n]) + start, f"the score {score[n].as_py()!r} is no number") for n in np.flatnonzero(~is_score)]
    kept = pa.array(np.flatnonzero(is_score))
    numbers = score.take(kept).cast(pa.float32()).to_numpy()  # straight to float32: by way of float64 it could round twice
    return ScoredIds(whole[is_score] + start, query_id.take(kept), item_id.take(kept), numbers, malformed)


def find_blank(ids: Iterable[str]) -> str | None:
    """The first id that a TREC run cannot hold, for it is empty or has a blank."""
    return next((name for name in ids if len(name.split()) != 1), None)


def format_trec_lines(query_id: str, item_ids: Sequence[str], scores: FloatArray, tag: str) -> bytes:
    """The lines of one query, its items given best first. Scores have the fewest digits that give the float32 back."""
    if not len(item_ids):
        return b""
    ranks = pa.array(range(1, len(item_ids) + 1)).cast(pa.string())
    texts = pa.array(scores, pa.float32()).cast(pa.string())
    lines = pc.binary_join_element_wise(query_id, "Q0", pa.array(item_ids, pa.string()), ranks, texts, tag, " ")
    return ("\n".join(lines.to_pylist()) + "\n").encode()


@contextmanager
def write_stream_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A stream to write a file of any size with: it appears under its name when all of it was written, or not at all.

    Raises:
        InputError: it cannot be written there.
    """
    try:
        if not is_local(path):
            with tempfile.TemporaryFile() as aside:
                yield aside
                aside.seek(0)
                with path.open("wb") as target:
                    shutil.copyfileobj(aside, target)
            return
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        local = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with local.open("wb") as stream:
                yield stream
            local.replace(path)
        finally:
            local.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error


@contextmanager
def write_parquet_atomically(path: Path, schema: pa.Schema) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetWriter` to such a stream."""
    with write_stream_atomically(path) as stream, pa.parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        yield writer

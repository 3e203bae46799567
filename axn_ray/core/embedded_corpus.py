"""The corpus of one job, frozen: its items, its queries with their splits, and their dual-encoder embeddings.

The artifact (kind `embeddings`) is what every later stage starts from. Knows no CE.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet

from axn_ray.core.artifact import read_manifest
from axn_ray.core.corpus import SPLITS, Items, Queries, read_items, read_queries, read_table, read_texts
from axn_ray.errors import ArtifactError, InputError

FloatArray = npt.NDArray[np.float32]
ITEM_EMBEDDINGS, QUERY_EMBEDDINGS = "item_embeddings.npy", "query_embeddings.npy"


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Items, queries, splits (n_queries,) and unit embeddings `(n_items, dim)`, `(n_queries, dim)`, float32."""

    items: Items
    queries: Queries
    splits: tuple[str, ...]
    item_embeddings: FloatArray
    query_embeddings: FloatArray
    dual_encoder: str

    def __post_init__(self) -> None:
        for name, rows, array in [
            ("items", len(self.items), self.item_embeddings),
            ("queries", len(self.queries), self.query_embeddings),
        ]:
            if array.ndim != 2 or len(array) != rows:
                raise ArtifactError(f"{rows} {name} but embeddings of shape {array.shape}; embed the corpus again")

    def rows_of(self, split: str) -> npt.NDArray[np.int64]:
        """Query indices of one split.

        Raises:
            InputError: the split is empty.
        """
        rows = np.flatnonzero(np.array(self.splits) == split)
        if not len(rows):
            raise InputError(f"the corpus has no {split} queries; embed it again with {split} queries")
        return rows


def assign_splits(queries: Queries, n_dev: int, n_test: int) -> tuple[str, ...]:
    """Splits for queries that bring none: the first `n_test` by sha256 of their id are test, the next `n_dev` dev."""
    if n_dev + n_test >= len(queries):
        raise InputError(f"{n_test} test and {n_dev} dev queries leave none of {len(queries)} to train; ask for fewer")
    order = sorted(range(len(queries)), key=lambda r: hashlib.sha256(queries.ids[r].encode()).digest())
    splits = ["train"] * len(queries)
    for place, row in enumerate(order[: n_test + n_dev]):
        splits[row] = "test" if place < n_test else "dev"
    return tuple(splits)


def read_splits(path: Path, queries: Queries) -> tuple[str, ...] | None:
    """The `split` of each query, or None where the file has no such column.

    Raises:
        InputError: a value that is not train, dev or test.
    """
    table = read_table(path)
    if "split" not in table.column_names:
        return None
    ids, named = (read_texts(table, path, name).to_pylist() for name in ("query_id", "split"))
    split_of = dict(zip(ids, named, strict=True))
    splits = tuple(split_of[i] for i in queries.ids)
    if unknown := set(splits) - set(SPLITS):
        raise InputError(f"{path} has the split {sorted(map(str, unknown))[0]!r}; name splits {', '.join(SPLITS)}")
    return splits


def choose_queries(splits: Sequence[str], train_queries: int | None, rng: np.random.Generator) -> list[int]:
    """Rows to keep, ascending: all dev and test queries and `train_queries` drawn from train (None keeps all).

    Raises:
        InputError: fewer train queries than asked for.
    """
    train = [row for row, split in enumerate(splits) if split == "train"]
    if train_queries is not None:
        if train_queries > len(train):
            raise InputError(f"train_queries={train_queries} exceeds the {len(train)} train queries; lower it or add queries")
        train = rng.permutation(train)[:train_queries].tolist()
    return sorted(train + [row for row, split in enumerate(splits) if split != "train"])


def save_embedded_corpus(folder: Path, corpus: EmbeddedCorpus) -> None:
    """Write the four files of the artifact into an empty folder."""
    items, queries = corpus.items, corpus.queries
    columns = {"query_id": queries.ids, "text": queries.texts, "split": corpus.splits}
    if queries.labels is not None:
        columns["item_id"] = queries.labels
    pa.parquet.write_table(
        pa.table({"item_id": items.ids, "title": items.titles, "text": items.texts, **items.columns}),
        folder / "items.parquet",
        compression="zstd",
    )
    pa.parquet.write_table(pa.table(columns), folder / "queries.parquet", compression="zstd")
    np.save(folder / ITEM_EMBEDDINGS, corpus.item_embeddings, allow_pickle=False)
    np.save(folder / QUERY_EMBEDDINGS, corpus.query_embeddings, allow_pickle=False)


def load_embedded_corpus(folder: Path) -> EmbeddedCorpus:
    """Read an `embeddings` artifact; the embeddings are memory-mapped.

    Raises:
        ArtifactError: not such an artifact, or a damaged one.
    """
    manifest = read_manifest(folder, "embeddings")
    queries = read_queries(folder / "queries.parquet")
    splits = read_splits(folder / "queries.parquet", queries)
    if splits is None:
        raise ArtifactError(f"{folder} has queries without splits; embed the corpus again")
    try:
        item_embeddings = np.load(folder / ITEM_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
        query_embeddings = np.load(folder / QUERY_EMBEDDINGS, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ArtifactError(f"{folder} has a damaged embeddings file ({error}); embed the corpus again") from error
    return EmbeddedCorpus(
        items=read_items(folder / "items.parquet"),
        queries=queries,
        splits=splits,
        item_embeddings=item_embeddings,
        query_embeddings=query_embeddings,
        dual_encoder=str(manifest.config["dual_encoder"]),
    )

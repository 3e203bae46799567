"""What bench-factorize fits: synthetic worlds on disk, of embeddings, queries and scores; and rows that are kept."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from axn_ray.core.artifact import Manifest, seal
from axn_ray.core.embedded_corpus import ITEM_EMBEDDINGS, QUERY_EMBEDDINGS
from axn_ray.core.fit_share import StoredInputs
from axn_ray.core.score_store import read_spans, write_ids, write_shard
from axn_ray.distributed.cluster import split_evenly

OUT = Path("runs/bench-factorize")
DIM, RANK, PER_QUERY, NOISE = 384, 32, 100, 0.3


def make_world(n_items, n_observed):
    """The artifacts of a synthetic world on disk, made once; `StoredInputs`."""
    folder = OUT / f"world-{n_items}-{n_observed}"
    n_queries = n_observed // PER_QUERY
    scores = folder / "scores"
    if not (scores / "manifest.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        write_units(folder / QUERY_EMBEDDINGS, n_queries, rng)
        write_units(folder / ITEM_EMBEDDINGS, n_items, rng)
        queries, items = (np.load(folder / name, mmap_mode="r") for name in (QUERY_EMBEDDINGS, ITEM_EMBEDDINGS))
        left, right = (rng.normal(scale=RANK**-0.5, size=shape).astype(np.float32) for shape in ((DIM, RANK), (RANK, DIM)))
        for shard, rows in enumerate(split_evenly(n_queries, 10_000)):
            columns = np.sort(rng.integers(0, n_items, (len(rows), PER_QUERY), dtype=np.int32), axis=1)
            query_index = np.repeat(np.arange(rows.start, rows.stop, dtype=np.int32), PER_QUERY)
            once = np.diff(columns, axis=1, prepend=-1).ravel() != 0
            distorted = queries[rows.start : rows.stop] + queries[rows.start : rows.stop] @ left @ right
            parts = [items[columns[at]] @ distorted[at] for at in range(len(rows))]
            noise = rng.normal(scale=NOISE * DIM**-0.5, size=len(query_index))
            values = (20 * (np.concatenate(parts) + noise) - 5).astype(np.float32)
            write_shard(scores, shard, query_index[once], columns.ravel()[once], values[once], {})
        write_ids(scores, "queries.parquet", "query_id", ids := [f"q{n}" for n in range(n_queries)], ids)
        pairs = sum(json.loads(path.read_text())["rows"] for path in (scores / "shards").glob("*.json"))
        seal(scores, Manifest(kind="scores", config={}, counts={"pairs": pairs}, made_from={}))
    return StoredInputs(folder.resolve(), scores.resolve(), np.arange(n_queries), read_spans(scores))


def write_units(path, rows, rng):
    """Random unit vectors, a block at a time."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, DIM))
    for block in split_evenly(rows, 1 << 15):
        vectors = rng.standard_normal((len(block), DIM), dtype=np.float32)
        array[block.start : block.stop] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    array.flush()


def kept(name, work, *arguments):
    """The row that `work(*arguments)` measures, or measured in an earlier run."""
    path = OUT / "rows" / f"{name}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        row = work(*arguments)
        path.write_text(json.dumps(row))
        sys.stdout.write(f"{row}\n")
    return json.loads(path.read_text())

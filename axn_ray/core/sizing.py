"""What a run of a given size takes: hours, money, memory and disk, from rates that the caller measured.

Holds no rate, price or model size of its own. Knows no clock and no machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

SCORE_BYTES = 12  # query_index int32, item_index int32, score float32
TOKEN_BYTES = 4  # int32
OFFSET_BYTES = 8  # int64, one per text


class SizingConfig(BaseModel):
    """A run and the rates it is reckoned with; `pairs_per_second` is one worker's, as `axn score --estimate` says it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_pairs: int = Field(ge=1, description="query-item pairs to score")
    n_items: int = Field(ge=1)
    workers: int = Field(ge=1, description="processes that hold the cross-encoder")
    workers_per_node: int = Field(ge=1, description="of them, how many share one node's memory")
    pairs_per_second: float = Field(gt=0, description="of one worker")
    price_per_hour: float = Field(ge=0, description="of one worker, in any currency")
    dim: int = Field(ge=1, description="of the item embeddings")
    bytes_per_number: int = Field(4, ge=1, description="of an embedding's number; 4 is float32, which the artifacts hold")
    tokens_per_item: float = Field(gt=0, description="mean over the items")
    process_bytes: int = Field(ge=0, description="resident memory of one worker: interpreter, libraries, model, one batch")


@dataclass(frozen=True)
class Sizing:
    """`worker_hours` of all workers together, `hours` on the clock, `cost` in the price's currency; memory in bytes."""

    worker_hours: float
    hours: float
    cost: float
    embedding_bytes: int
    shared_bytes: int
    worker_bytes: int
    score_bytes: int


def size_run(config: SizingConfig) -> Sizing:
    """Reckon the score stage alone, where the CE calls are; other stages and the start of workers are not in it.

    hours = n_pairs / (pairs_per_second * workers). Embeddings and token ids of all items stand once in each node's shared
    memory: shared = n_items * (dim * bytes_per_number + tokens_per_item * 4 + 8). A worker's share of its node is
    process_bytes + shared / workers_per_node. `score_bytes` are the scores before compression.
    """
    hours = config.n_pairs / (config.pairs_per_second * config.workers) / 3600
    worker_hours = hours * config.workers
    embedding_bytes = config.n_items * config.dim * config.bytes_per_number
    token_bytes = round(config.n_items * config.tokens_per_item) * TOKEN_BYTES + (config.n_items + 1) * OFFSET_BYTES
    shared = embedding_bytes + token_bytes
    return Sizing(
        worker_hours=worker_hours,
        hours=hours,
        cost=worker_hours * config.price_per_hour,
        embedding_bytes=embedding_bytes,
        shared_bytes=shared,
        worker_bytes=config.process_bytes + -(-shared // config.workers_per_node),
        score_bytes=config.n_pairs * SCORE_BYTES,
    )


def sizing_table(runs: Mapping[str, SizingConfig]) -> str:
    """Markdown, a row per named run: what was given, and what `size_run` makes of it."""
    lines = [
        "| run | pairs | items | workers | pairs/s each | worker-hours | hours | cost | memory per worker | shared per node |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, config in runs.items():
        sized = size_run(config)
        lines.append(
            f"| {name} | {config.n_pairs:,} | {config.n_items:,} | {config.workers} | {config.pairs_per_second:,.0f} "
            f"| {sized.worker_hours:,.2f} | {sized.hours:,.2f} | {sized.cost:,.2f} "
            f"| {sized.worker_bytes / 1e9:,.2f} GB | {sized.shared_bytes / 1e9:,.2f} GB |"
        )
    return "\n".join(lines) + "\n"

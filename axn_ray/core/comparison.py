"""Method against method on the same queries: means and paired gains with intervals, and the CE calls that one saves.

Reads the table that evaluation makes. Knows no search and no files.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from axn_ray.core.metrics import bootstrap_interval, permutation_p_value
from axn_ray.errors import InputError

CELL = ["method", "rounds", "budget", "k"]
MEASURES = {"recall": "recall", "accuracy": "accuracy", "ndcg_at_10": "nDCG@10"}
STOPS = ", stop at "  # in the name of a method that stops before its budget, between its own name and the target recall

Row = dict[str, Any]
Cell = tuple[str, int, int, int]
MethodAt = tuple[str, int]  # a method's name and its number of rounds
Float64Array = npt.NDArray[np.float64]


def per_query(table: pa.Table, measure: str) -> dict[Cell, Float64Array]:
    """The measure of every query (n_queries,), by method, rounds, budget and k, cells and queries in the table's order."""
    cells = table.group_by(CELL, use_threads=False).aggregate([(measure, "list")]).to_pylist()
    return {tuple(cell[name] for name in CELL): np.array(cell[f"{measure}_list"], dtype=np.float64) for cell in cells}


def summarize(table: pa.Table, seed: int = 0, baseline: MethodAt | None = None) -> list[Row]:
    """One JSON-able row per method, rounds, budget and k, in the table's order: means over all queries, in 0..1.

    Each measure has its 95 % bootstrap bounds beside it (`recall_low`, `recall_high`, ...). Every row resamples the same
    queries. Label measures are left out where the queries had no labels. `index_ce_calls` is None where it is not known,
    `target_recall` where the search was not to stop at a recall at this k.
    With a `baseline` each row has `gain` over the baseline's recall at the same budget and k, paired by query, with its
    95 % bootstrap bounds and the `p_value` of a permutation test, not corrected for the number of rows.

    Raises:
        InputError: see `bootstrap_interval`, or the baseline was not evaluated.
    """
    measured = {m: per_query(table, m) for m in MEASURES if table[m].null_count < table.num_rows}
    spent, seconds, offline = (per_query(table, name) for name in ("ce_calls", "search_seconds", "index_ce_calls"))
    targets = per_query(table, "target_recall")
    if baseline is not None and baseline not in {cell[:2] for cell in spent}:
        raise InputError(f"the baseline {baseline[0]!r} with {baseline[1]} rounds was not evaluated; add it to the methods")
    rows: list[Row] = []
    for cell, calls in spent.items():
        row: Row = {**dict(zip(CELL, cell, strict=True)), "n_queries": len(calls), "ce_calls": float(calls.mean())}
        row["index_ce_calls"] = None if np.isnan(offline[cell][0]) else int(offline[cell][0])
        row["target_recall"] = None if np.isnan(targets[cell][0]) else float(targets[cell][0])
        row["search_ms"] = float(1000 * seconds[cell].mean())
        for measure, values in measured.items():
            row[measure] = float(values[cell].mean())
            row[f"{measure}_low"], row[f"{measure}_high"] = bootstrap_interval(values[cell], np.random.default_rng(seed))
        if baseline is not None:
            row |= _compare(measured["recall"][cell], measured["recall"][*baseline, *cell[2:]], seed)
        rows.append(row)
    return rows


def _compare(values: Float64Array, others: Float64Array, seed: int) -> Row:
    low, high = bootstrap_interval(values - others, np.random.default_rng(seed))
    p_value = permutation_p_value(values, others, np.random.default_rng(seed))
    return {"gain": float((values - others).mean()), "gain_low": low, "gain_high": high, "p_value": p_value}


def list_methods(summary: Sequence[Row]) -> list[MethodAt]:
    """(method, rounds) in the table's order."""
    return list(dict.fromkeys((row["method"], row["rounds"]) for row in summary))


def calls_to_reach(summary: Sequence[Row], method: MethodAt, k: int, recall: float) -> float | None:
    """CE calls per query with which the method reaches a mean recall@k, or None where its largest budget does not.

    Between two budgets, and from nothing to the smallest, mean recall is taken to rise in a straight line.
    """
    rows = [row for row in summary if (row["method"], row["rounds"], row["k"]) == (*method, k)]
    calls, recalls = (np.array([0.0, *(row[name] for row in rows)]) for name in ("ce_calls", "recall"))
    order = np.argsort(calls)
    calls, recalls = calls[order], np.maximum.accumulate(recalls[order])
    above = int(np.searchsorted(recalls, recall))  # the first point that reaches it
    if above == len(recalls):
        return None
    return float(np.interp(recall, recalls[above - 1 : above + 1], calls[above - 1 : above + 1])) if above else 0.0

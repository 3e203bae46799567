"""The `evaluation` artifact: a row per query, the summary, tables, figures, TREC runs and a report to open in a browser.

Knows no search and no Ray.
"""

import gzip
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from axn_ray.core.artifact import Manifest, read_manifest
from axn_ray.core.comparison import CELL, MethodAt, Row
from axn_ray.core.evaluation import ExactScores
from axn_ray.core.report import markdown_table
from axn_ray.core.score_formats import find_blank, format_trec_lines

logger = logging.getLogger(__name__)

KIND = "evaluation"
ROWS, SUMMARY = "rows.parquet", "summary.json"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as it was written: the table (see `evaluation.SCHEMA`), its summary, what it was made with."""

    table: pa.Table
    summary: list[Row]
    manifest: Manifest

    @property
    def baseline(self) -> MethodAt | None:
        """Name and rounds of the method that all are compared with; None where settings were chosen."""
        found = self.manifest.config.get("baseline_at")
        return None if found is None else (found[0], found[1])


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write rows, summary, table, figure and report into an empty folder."""
    # Matplotlib takes a second to import, and what reads evaluations or searches needs none.
    from axn_ray.core.figures import draw_recall, save_figure
    from axn_ray.core.report_page import render_page

    summary, baseline = evaluation.summary, evaluation.baseline
    pyarrow.parquet.write_table(evaluation.table, folder / ROWS, compression="zstd")
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(markdown_table(summary))
    dataset = f"{evaluation.manifest.counts['items']:,} items"
    save_figure(draw_recall(summary, dataset, baseline=baseline), folder / "recall")
    page = render_page(evaluation.table, summary, evaluation.manifest, baseline)
    (folder / "report.html").write_text(page, encoding="utf-8")


def load_evaluation(folder: Path) -> Evaluation:
    """Read an evaluation.

    Raises:
        ArtifactError: not such an artifact, or one that lacks a file.
    """
    manifest = read_manifest(folder, KIND)
    return Evaluation(pa.parquet.read_table(folder / ROWS), json.loads((folder / SUMMARY).read_bytes()), manifest)


def write_runs(folder: Path, table: pa.Table, exact: ExactScores, item_ids: Sequence[str]) -> None:
    """Write a gzipped TREC run for each method, number of rounds and budget: what the search returns at the largest k.

    Ids with blanks fit into no run: then none is written, and the log says so.
    """
    if (blank := find_blank((*exact.query_ids, *item_ids))) is not None:
        logger.warning("the id %r is empty or has a blank, which a TREC run cannot hold; no runs are written", blank)
        return
    folder.mkdir()
    ids = pa.array(item_ids, pa.string())
    deepest = table.filter(pc.equal(table["k"], pc.max(table["k"])))
    lines: dict[str, list[bytes]] = {}
    for row in deepest.select([*CELL, "query_index", "found"]).to_pylist():
        slug = re.sub(r"[^a-z0-9.]+", "_", row["method"].lower()) + f"-r{row['rounds']}-b{row['budget']}"
        found, query = np.array(row["found"], dtype=np.int32), row["query_index"]
        item_ids_found, scores = ids.take(pa.array(found)), exact.scores[query][found]
        lines.setdefault(slug, []).append(format_trec_lines(exact.query_ids[query], item_ids_found, scores, slug))
    for slug, run in lines.items():
        with gzip.GzipFile(folder / f"{slug}.run.gz", "wb", mtime=0) as stream:
            stream.writelines(run)

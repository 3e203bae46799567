"""The examiner's report: one HTML page that holds everything, figures inline, and asks no other place for anything.

Reads table, summary and manifest of an evaluation. Knows no search.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jinja2
import pyarrow as pa

from axn_ray.core.advice import AdviceConfig, advise
from axn_ray.core.artifact import Manifest
from axn_ray.core.comparison import MethodAt, Row
from axn_ray.core.figures import (
    choose_lines,
    draw_calls_saved,
    draw_pareto,
    draw_recall,
    draw_reliability,
    draw_wins,
    panels_of,
    to_inline_svg,
)
from axn_ray.core.report import table_cells

BEST, BOUNDS = "<b>{}</b>", '<span class="bounds">{:.0f}–{:.0f}</span>'


def render_page(table: pa.Table, summary: Sequence[Row], manifest: Manifest, baseline: MethodAt | None) -> str:
    """The page of an evaluation; comparisons and advice are left out where it has no baseline (settings were chosen)."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("axn_ray.core") / "report_page.html.j2").read_text(encoding="utf-8"))
    header, grid = table_cells(summary, BEST, BOUNDS)
    ks = panels_of(summary)
    k = 10 if 10 in ks else ks[-1]
    advice = [] if baseline is None else advise(summary, manifest.counts, AdviceConfig(k=k))
    return template.render(
        counts=manifest.counts,
        n_queries=summary[0]["n_queries"],
        baseline=baseline,
        advice=advice,
        header=header,
        grid=grid,
        gains=[row for row in summary if row["k"] in ks and "gain" in row],
        figures=_figures(table, summary, manifest, baseline, k),
        settings=json.dumps({"config": manifest.config, "made_from": manifest.made_from}, indent=1, ensure_ascii=False),
    )


def _figures(
    table: pa.Table, summary: Sequence[Row], manifest: Manifest, baseline: MethodAt | None, k: int
) -> list[dict[str, Any]]:
    drawn = [
        (
            "Recall against budget",
            "Share of the exact top k that was found, by CE calls per query, with 95 % bootstrap bands over queries.",
            draw_recall(summary, f"{manifest.counts['items']:,} items", baseline=baseline),
        )
    ]
    if baseline is not None:
        best = max(choose_lines(summary), key=lambda method: _mean_recall(summary, method, k))
        drawn += [
            (
                "CE calls at equal recall",
                "CE calls that a method needs for the recall that the baseline has; below the dotted line it saves calls. "
                "A point is missing where the method's largest budget does not get there. Straight lines between budgets.",
                draw_calls_saved(summary, baseline),
            ),
            (
                f"Indexing cost against recall@{k}",
                "CE calls spent before the first query, and the recall they buy, with 95 % intervals. "
                "The dotted steps join what no other method beats in both.",
                draw_pareto(summary, k, baseline),
            ),
            (
                "Query by query",
                f"Each query's recall@{k} under {best[0]} and under the baseline. Points are moved a little to lie side by side.",
                draw_wins(table, best, baseline, k),
            ),
        ]
    if any(row["target_recall"] is not None for row in summary):
        drawn.append(
            (
                "Does the adaptive stop keep its word?",
                "Recall achieved against the recall at which the search was to stop, with 95 % bands over queries, and the CE "
                "calls that it spent. Above the dotted line it found more than it was asked for.",
                draw_reliability(summary),
            )
        )
    return [
        {"title": title, "caption": caption, "svg": to_inline_svg(figure, f"figure{number}")}
        for number, (title, caption, figure) in enumerate(drawn)
    ]


def _mean_recall(summary: Sequence[Row], method: MethodAt, k: int) -> float:
    recalls = [row["recall"] for row in summary if (row["method"], row["rounds"], row["k"]) == (*method, k)]
    return float(sum(recalls) / len(recalls))

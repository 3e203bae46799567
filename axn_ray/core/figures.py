"""The examiner's figures: recall against budget, calls saved, indexing cost against recall, wins and losses by query.

Reads the summary and the table that evaluation makes. Knows no search and no files but the figure's.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from axn_ray.core.comparison import STOPS, MethodAt, Row, calls_to_reach, list_methods, per_query

# Paul Tol's "bright" palette with two more: colour-blind readers tell them apart, on white and on black.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#EE7733", "#009988")
MARKERS = "os^Dv<>P"
PANELS = (1, 10, 100)
MOST_LINES = 9
INK = "#010203"  # stands for the page's own text colour, see `to_inline_svg`


def panels_of(summary: Sequence[Row]) -> list[int]:
    """The k that get a panel: 1, 10 and 100 as far as they were evaluated, or else all."""
    ks = sorted({row["k"] for row in summary})
    return [k for k in PANELS if k in ks] or ks


def choose_lines(summary: Sequence[Row], baseline: MethodAt | None = None, rounds: int = 10) -> list[MethodAt]:
    """The methods to draw, in the summary's order: those with the highest recall over all cells, and the baseline.

    Methods that stop at a target recall are left out: `draw_reliability` shows them.
    A method that was run with several numbers of rounds stands at `rounds`, or at its most where that is not among them.
    """
    depth: dict[str, int] = {}
    for name, number in list_methods([row for row in summary if STOPS not in row["method"]]):
        depth[name] = rounds if rounds in (number, depth.get(name)) else max(number, depth.get(name, 0))

    def strength(method: MethodAt) -> float:
        return float(np.mean([row["recall"] for row in summary if (row["method"], row["rounds"]) == method]))

    kept = sorted(depth.items(), key=lambda method: (method != baseline, -strength(method)))[:MOST_LINES]
    return [method for method in depth.items() if method in kept]


def new_figure(n_panels: int, height: float = 4.6, width: float = 4.2) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, `width` x `height` inches each, and the axes of the panels."""
    figure = Figure(figsize=(width * n_panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(1, n_panels, squeeze=False)[0])
    for axes in panels:
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _add_legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, columns), frameon=False)


def _label(method: MethodAt) -> str:
    return f"{method[0]}, R={method[1]}" if method[1] > 1 else method[0]


def _style(methods: Sequence[MethodAt], method: MethodAt) -> dict[str, Any]:
    number = methods.index(method)
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


def draw_recall(summary: Sequence[Row], dataset: str, rounds: int = 10, baseline: MethodAt | None = None) -> Figure:
    """Recall against CE calls, a panel per k, a line with its 95 % band per method. Dashed lines have one round."""
    ks, methods = panels_of(summary), choose_lines(summary, baseline, rounds)
    figure, panels = new_figure(len(ks), height=5.4)
    for axes, k in zip(panels, ks, strict=True):
        for method in methods:
            rows = [row for row in summary if (row["method"], row["rounds"], row["k"]) == (*method, k)]
            rows.sort(key=lambda row: row["ce_calls"])
            style, calls = _style(methods, method), [row["ce_calls"] for row in rows]
            percent = {name: [100 * row[name] for row in rows] for name in ("recall", "recall_low", "recall_high")}
            axes.fill_between(calls, percent["recall_low"], percent["recall_high"], color=style["color"], alpha=0.12, linewidth=0)
            line = axes.plot(calls, percent["recall"], "-" if method[1] > 1 else "--", label=_label(method))[0]
            line.set(**style, markersize=5, linewidth=1.6)
        _set_call_axis(axes, sorted({row["budget"] for row in summary}))
        axes.set(title=f"recall@{k}", xlabel="CE calls per query")
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("share of the exact top k found, %")
    _add_legend(figure, panels[0], min(4, len(methods)))
    figure.suptitle(f"{dataset}, {summary[0]['n_queries']} queries, 95 % bootstrap intervals over queries")
    return figure


def _set_call_axis(axes: Axes, budgets: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_calls_saved(summary: Sequence[Row], baseline: MethodAt) -> Figure:
    """CE calls that each method needs for the recall that the baseline has at each of its budgets, a panel per k.

    Below the dotted line calls are saved. A point is missing where the method's largest budget does not get there.
    """
    ks, methods = panels_of(summary), choose_lines(summary, baseline)
    figure, panels = new_figure(len(ks), height=5.4)
    budgets = sorted({row["budget"] for row in summary})
    for axes, k in zip(panels, ks, strict=True):
        goals = [row for row in summary if (row["method"], row["rounds"], row["k"]) == (*baseline, k)]
        for method in (other for other in methods if other != baseline):
            needed = [calls_to_reach(summary, method, k, row["recall"]) for row in goals]
            reached = [(row["ce_calls"], calls) for row, calls in zip(goals, needed, strict=True) if calls]
            # An empty line still stands in the legend: the method reaches the baseline nowhere.
            axes.plot(*np.array(reached).reshape(-1, 2).T, label=_label(method), markersize=5, **_style(methods, method))
        axes.plot(budgets, budgets, ":", color="grey", linewidth=1.2)
        _set_call_axis(axes, budgets)
        axes.set_yscale("log")
        axes.set_yticks([5, 10, 20, *budgets], [str(calls) for calls in (5, 10, 20, *budgets)])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(title=f"recall@{k}", xlabel=f"CE calls of {_label(baseline)}")
    panels[0].set_ylabel("CE calls for the same recall")
    _add_legend(figure, panels[0], min(4, len(methods)))
    return figure


def draw_pareto(summary: Sequence[Row], k: int, baseline: MethodAt | None = None) -> Figure:
    """Recall@k against the CE calls that made the index, a panel per budget: up and to the left is better.

    The step line joins the points that no other beats in both. Methods whose index calls are not known are left out.
    """
    methods = choose_lines(summary, baseline)
    budgets = sorted({row["budget"] for row in summary})
    figure, panels = new_figure(len(budgets), height=4.8, width=3.6)
    for axes, budget in zip(panels, budgets, strict=True):
        rows = [row for row in summary if (row["budget"], row["k"]) == (budget, k) and row["index_ce_calls"] is not None]
        rows = [row for row in rows if (row["method"], row["rounds"]) in methods]
        for row in rows:
            method, spread = (row["method"], row["rounds"]), 100 * np.array([[row["recall_low"]], [row["recall_high"]]])
            recall = 100 * row["recall"]
            bars = np.abs(spread - recall)
            axes.errorbar(
                row["index_ce_calls"], recall, bars, label=_label(method), linestyle="", elinewidth=0.8, **_style(methods, method)
            )
        best = sorted(rows, key=lambda row: (row["index_ce_calls"], -row["recall"]))
        heights = np.maximum.accumulate([100 * row["recall"] for row in best])
        axes.step([row["index_ce_calls"] for row in best], heights, where="post", color="grey", linewidth=1.0, linestyle=":")
        axes.set_xscale("symlog", linthresh=1000)
        costs = sorted({row["index_ce_calls"] for row in rows})
        axes.set_xticks(costs, [f"{cost / 1000:,.0f}k" if cost else "0" for cost in costs])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=f"B={budget}", xlabel="CE calls to make the index", ylim=(0, 103))
    panels[0].set_ylabel(f"recall@{k}, %")
    _add_legend(figure, panels[0], min(4, len(methods)))
    return figure


def draw_reliability(summary: Sequence[Row]) -> Figure:
    """Searches that stop at a target recall: recall achieved against the target, and the CE calls spent; a line per budget.

    On the dotted line the stop keeps its word; above it, it found more than it was asked for.
    """
    rows = [row for row in summary if row["target_recall"] is not None]
    name = rows[0]["method"].split(STOPS)[0]
    figure, (achieved, spent) = new_figure(2, height=4.8, width=5.0)
    for number, budget in enumerate(sorted({row["budget"] for row in rows})):
        mine = [row for row in rows if row["budget"] == budget and row["method"].split(STOPS)[0] == name]
        mine.sort(key=lambda row: row["target_recall"])
        targets = [100 * row["target_recall"] for row in mine]
        style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        low, high = ([100 * row[f"recall_{side}"] for row in mine] for side in ("low", "high"))
        achieved.fill_between(targets, low, high, color=style["color"], alpha=0.12, linewidth=0)
        achieved.plot(targets, [100 * row["recall"] for row in mine], label=f"at most {budget} calls", markersize=5, **style)
        spent.plot(targets, [row["ce_calls"] for row in mine], markersize=5, **style)
    achieved.axline((50, 50), slope=1, linestyle=":", color="grey", linewidth=1.2)
    achieved.set(title=f"{name}: what was found", xlabel="target recall, %", ylabel=f"recall@{rows[0]['k']} achieved, %")
    spent.set(title="what it cost", xlabel="target recall, %", ylabel="CE calls per query, mean")
    spent.set_ylim(bottom=0)
    _add_legend(figure, achieved, 4)
    return figure


def draw_wins(table: pa.Table, method: MethodAt, baseline: MethodAt, k: int) -> Figure:
    """Each query's recall@k under the method against the baseline's, a panel per budget; above the line the method wins."""
    recalls = per_query(table, "recall")
    budgets = sorted({cell[2] for cell in recalls})
    figure, panels = new_figure(len(budgets), height=3.9, width=3.5)
    rng = np.random.default_rng(0)
    for axes, budget in zip(panels, budgets, strict=True):
        ours, theirs = recalls[*method, budget, k], recalls[*baseline, budget, k]
        jitter = rng.uniform(-0.012, 0.012, (2, len(ours)))
        axes.plot([0, 100], [0, 100], ":", color="grey", linewidth=1.2)
        axes.scatter(100 * (theirs + jitter[0]), 100 * (ours + jitter[1]), s=14, alpha=0.55, color=COLOURS[0], linewidths=0)
        won, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
        axes.set(title=f"B={budget}: {won} won, {len(ours) - won - lost} even, {lost} lost", xlabel=_label(baseline))
        axes.set(xlim=(-4, 104), ylim=(-4, 104), aspect="equal")
    panels[0].set_ylabel(f"recall@{k} of {_label(method)}, %")
    return figure


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg; the same figure gives the same bytes."""
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    figure.savefig(png, dpi=160, metadata={"Software": None})
    with mpl.rc_context({"svg.hashsalt": "axn-ray"}):
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg


def to_inline_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element without background, its text and axes in the colour of the page around it.

    `name` keeps the ids inside apart from those of other figures on the page.
    """
    for axes in figure.axes:
        axes.tick_params(colors=INK)
        axes.spines[:].set_edgecolor(INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
    for text in [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]:
        text.set_color(INK)
    stream = io.StringIO()
    unsigned = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata=unsigned)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for mark in ('id="', 'href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    return svg

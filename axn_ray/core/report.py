"""The examiner's report: means with intervals over queries, as rows, as a table and as a figure.

Reads the table that evaluation makes. Knows no search and no files but the figure's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.table import Table

from axn_ray.core.metrics import bootstrap_interval

CELL = ["method", "rounds", "budget", "k"]
MEASURES = {"recall": "recall", "accuracy": "accuracy", "ndcg_at_10": "nDCG@10"}
# Paul Tol's "muted" palette: nine colours that colour-blind readers tell apart.
COLOURS = ("#332288", "#CC6677", "#117733", "#88CCEE", "#882255", "#999933", "#44AA99", "#AA4499", "#DDCC77")
MARKERS = "os^Dv<>P"
PANELS = (1, 10, 100)

Row = dict[str, Any]


def summarize(table: pa.Table, seed: int = 0) -> list[Row]:
    """One JSON-able row per method, rounds, budget and k, in the table's order: means over all queries, in 0..1.

    Each measure has its 95 % bootstrap bounds beside it (`recall_low`, `recall_high`, ...). Every row resamples the same
    queries. Label measures are left out where the queries had no labels. `index_ce_calls` is None where it is not known.

    Raises:
        InputError: see `bootstrap_interval`.
    """
    rows: list[Row] = []
    for cell in table.select(CELL).group_by(CELL, use_threads=False).aggregate([]).to_pylist():
        part = table
        for name, value in cell.items():
            part = part.filter(pc.equal(part[name], value))
        row = {**cell, "n_queries": part.num_rows, "ce_calls": pc.mean(part["ce_calls"]).as_py()}
        row["index_ce_calls"] = part["index_ce_calls"][0].as_py()
        for measure in MEASURES:
            if part[measure].null_count < part.num_rows:
                values = part[measure].to_numpy(zero_copy_only=False).astype(np.float64)
                row[measure] = float(values.mean())
                row[f"{measure}_low"], row[f"{measure}_high"] = bootstrap_interval(values, np.random.default_rng(seed))
        rows.append(row)
    return rows


def terminal_table(summary: Sequence[Row]) -> Table:
    """The summary for a terminal, in percent with 95 % bounds; a section per budget, its best value in bold."""
    header, grid = _grid(summary, best="[bold]{}[/bold]", bounds="[dim]{:.0f}–{:.0f}[/dim]")
    title = f"%, with 95 % intervals over {summary[0]['n_queries']} queries; R rounds, B cross-encoder calls per query"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header[:3]:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for name in header[3:]:  # a narrow terminal puts the bounds on a second line
        table.add_column(name.replace("@", "\n@"), justify="right", min_width=len("100–100"))
    for number, cells in enumerate(grid):
        is_last_of_budget = number + 1 == len(grid) or grid[number + 1][2] != cells[2]
        table.add_row(*cells, end_section=is_last_of_budget)
    return table


def markdown_table(summary: Sequence[Row]) -> str:
    """The same table in Markdown."""
    header, grid = _grid(summary, best="**{}**", bounds="({:.0f}–{:.0f})")
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *grid])


def _grid(summary: Sequence[Row], best: str, bounds: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one line per budget and method, one column per k and label measure; `best` and `bounds` format."""
    ks = sorted({row["k"] for row in summary})
    columns = [("recall", k) for k in ks]
    columns += [(measure, ks[0]) for measure in ("accuracy", "ndcg_at_10") if measure in summary[0]]
    cell = {(row["budget"], row["method"], row["rounds"], row["k"]): row for row in summary}
    grid = []
    for budget in sorted({row["budget"] for row in summary}):
        highest = {(m, k): max(cell[budget, *method, k][m] for method in _methods(summary)) for m, k in columns}
        for name, rounds in _methods(summary):
            line = [name, str(rounds), str(budget)]
            for m, k in columns:
                row = cell[budget, name, rounds, k]
                mean = best.format(f"{100 * row[m]:.1f}") if row[m] == highest[m, k] else f"{100 * row[m]:.1f}"
                line.append(f"{mean} {bounds.format(100 * row[f'{m}_low'], 100 * row[f'{m}_high'])}")
            grid.append(line)
    return ["method", "R", "B", *[f"{MEASURES[m]}@{k}" if m == "recall" else MEASURES[m] for m, k in columns]], grid


def _methods(summary: Sequence[Row]) -> list[tuple[str, int]]:
    """(method, rounds) in the table's order."""
    return list(dict.fromkeys((row["method"], row["rounds"]) for row in summary))


def draw_recall(summary: Sequence[Row], dataset: str, rounds: int = 10) -> Figure:
    """Recall against budget, a panel per k of 1, 10, 100 that was evaluated, a line with its 95 % band per method.

    A method that was run with several numbers of rounds is drawn at `rounds`, or at its most where that is not among
    them. Dashed lines have one round.
    """
    ks = [k for k in PANELS if any(row["k"] == k for row in summary)]
    depth: dict[str, int] = {}
    for name, number in _methods(summary):
        depth[name] = rounds if rounds in (number, depth.get(name)) else max(number, depth.get(name, 0))
    figure = Figure(figsize=(4.2 * len(ks), 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(ks), squeeze=False)[0]
    for axes, k in zip(panels, ks, strict=True):
        for number, method in enumerate(depth.items()):
            rows = [row for row in summary if (row["method"], row["rounds"], row["k"]) == (*method, k)]
            _draw_method(axes, sorted(rows, key=lambda row: row["budget"]), number)
        _dress_panel(axes, k, sorted({row["budget"] for row in summary}))
    panels[0].set_ylabel("share of the exact top k found, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(depth)), frameon=False)
    figure.suptitle(f"{dataset}, {summary[0]['n_queries']} test queries, 95 % bootstrap intervals over queries")
    return figure


def _draw_method(axes: Axes, rows: Sequence[Row], number: int) -> None:
    colour, marker, rounds = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], rows[0]["rounds"]
    label = f"{rows[0]['method']}, R={rounds}" if rounds > 1 else rows[0]["method"]
    budgets = [row["budget"] for row in rows]
    percent = {name: [100 * row[name] for row in rows] for name in ("recall", "recall_low", "recall_high")}
    axes.fill_between(budgets, percent["recall_low"], percent["recall_high"], color=colour, alpha=0.12, linewidth=0)
    line = axes.plot(budgets, percent["recall"], "-" if rounds > 1 else "--", label=label)[0]
    line.set(color=colour, marker=marker, markersize=5, linewidth=1.6)


def _dress_panel(axes: Axes, k: int, budgets: Sequence[int]) -> None:
    axes.set_title(f"recall@{k}")
    axes.set_xscale("log")
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("CE calls per query")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `stem`.png and `stem`.svg; the same figure gives the same bytes."""
    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    figure.savefig(png, dpi=160, metadata={"Software": None})
    with mpl.rc_context({"svg.hashsalt": "axn-ray"}):
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return png, svg

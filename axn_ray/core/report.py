"""The examiner's tables: a line per method and budget, for a terminal and in Markdown.

Reads the summary that `comparison` makes. Knows no search and no files.
"""

from collections.abc import Sequence

from rich import box
from rich.table import Table

from axn_ray.core.comparison import MEASURES, Row, list_methods

SIGNIFICANT = 0.05


def terminal_table(summary: Sequence[Row]) -> Table:
    """The summary for a terminal, in percent with 95 % bounds; a section per budget, its best value in bold."""
    header, grid = table_cells(summary, best="[bold]{}[/bold]", bounds="[dim]{:.0f}–{:.0f}[/dim]")
    title = f"%, with 95 % intervals over {summary[0]['n_queries']} queries; R rounds, B cross-encoder calls per query"
    if "gain" in summary[0]:
        title += "; * differs from the baseline (p < 0.05)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header[:3]:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for name in header[3:]:  # a narrow terminal puts the bounds on a second line
        lines = name.replace("@", "\n@")
        width = 2 if name == "ms" else max(len("100–100"), *map(len, lines.split()))
        table.add_column(lines, justify="right", min_width=width)
    for number, cells in enumerate(grid):
        is_last_of_budget = number + 1 == len(grid) or grid[number + 1][2] != cells[2]
        table.add_row(*cells, end_section=is_last_of_budget)
    return table


def markdown_table(summary: Sequence[Row]) -> str:
    """The same table in Markdown."""
    header, grid = table_cells(summary, best="**{}**", bounds="({:.0f}–{:.0f})")
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *grid])


def table_cells(summary: Sequence[Row], best: str, bounds: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one line per budget and method, one column per k and label measure; `best` and `bounds` format.

    `ms` is the search's own time per query. Calls stand in a column of their own where a method spent less than its
    budget. A recall whose difference from the baseline's is not chance (p < 0.05) has a star.
    """
    ks = sorted({row["k"] for row in summary})
    columns = [("recall", k) for k in ks]
    columns += [(measure, ks[0]) for measure in ("accuracy", "ndcg_at_10") if measure in summary[0]]
    saves_calls = any(row["ce_calls"] < row["budget"] for row in summary)
    cell = {(row["budget"], row["method"], row["rounds"], row["k"]): row for row in summary}
    grid = []
    for budget in sorted({row["budget"] for row in summary}):
        highest = {(m, k): max(cell[budget, *method, k][m] for method in list_methods(summary)) for m, k in columns}
        for name, rounds in list_methods(summary):
            first = cell[budget, name, rounds, ks[0]]
            line = [name, str(rounds), str(budget), *([f"{first['ce_calls']:.0f}"] if saves_calls else [])]
            for m, k in columns:
                row = cell[budget, name, rounds, k]
                mean = best.format(f"{100 * row[m]:.1f}") if row[m] == highest[m, k] else f"{100 * row[m]:.1f}"
                star = "*" if m == "recall" and row.get("p_value", 1.0) < SIGNIFICANT else ""
                line.append(f"{mean}{star} {bounds.format(100 * row[f'{m}_low'], 100 * row[f'{m}_high'])}")
            grid.append([*line, f"{first['search_ms']:.0f}"])
    named = [f"{MEASURES[m]}@{k}" if m == "recall" else MEASURES[m] for m, k in columns]
    return ["method", "R", "B", *(["calls"] if saves_calls else []), *named, "ms"], grid

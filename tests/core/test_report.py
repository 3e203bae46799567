import io

import pytest
from rich.console import Console

from axn_ray.core.comparison import summarize
from axn_ray.core.evaluation import evaluate_in_process
from axn_ray.core.methods import METHODS
from axn_ray.core.report import markdown_table, terminal_table
from tests.examinations import make_examination


@pytest.fixture(scope="module")
def table():
    return evaluate_in_process(make_examination(budgets=(20, 60), ks=(1, 10)))


@pytest.fixture(scope="module")
def summary(table):
    return summarize(table, baseline=("RnR, DE", 1))


def test_the_markdown_table_has_a_line_per_method_and_budget_and_marks_the_best(summary):
    lines = markdown_table(summary).splitlines()
    assert lines[0] == "| method | R | B | recall@1 | recall@10 | accuracy | nDCG@10 | ms |"
    assert len(lines) == 2 + len(METHODS) * 2
    assert all(line.count("|") == 9 for line in lines)
    best = max((r for r in summary if (r["budget"], r["k"]) == (60, 10)), key=lambda r: r["recall"])
    marked = [line for line in lines if f"| {best['method']} | {best['rounds']} | 60 |" in line][0]
    assert f"**{100 * best['recall']:.1f}**" in marked


def test_the_terminal_table_shows_the_same_cells(summary):
    stream = io.StringIO()
    Console(file=stream, width=160).print(terminal_table(summary))
    shown = stream.getvalue()
    assert "over 6 queries" in shown and "AXN pinv λ=0.5, MF_Ind" in shown and "[bold]" not in shown
    row = summary[0]
    assert f"{100 * row['recall']:.1f} {100 * row['recall_low']:.0f}–{100 * row['recall_high']:.0f}" in shown


def test_a_narrow_terminal_loses_nothing(summary):
    stream = io.StringIO()
    Console(file=stream, width=80).print(terminal_table(summary))
    assert "…" not in stream.getvalue() and "AXN pinv λ=0.5, MF_Ind" in stream.getvalue()


def test_a_star_marks_what_differs_from_the_baseline(summary):
    lines = markdown_table(summary).splitlines()
    starred = [row for row in summary if row["p_value"] < 0.05]
    assert starred
    columns = [cell.strip() for cell in lines[0].split("|")]
    for row in summary:
        line = next(line for line in lines if line.startswith(f"| {row['method']} | {row['rounds']} | {row['budget']} |"))
        cell = line.split("|")[columns.index(f"recall@{row['k']}")].replace("**", "")
        assert f"{100 * row['recall']:.1f}" in cell
        assert ("*" in cell) == (row["p_value"] < 0.05)
    plain = markdown_table([{name: value for name, value in row.items() if name != "p_value"} for row in summary])
    assert not any("* (" in line.replace("**", "") for line in plain.splitlines())


def test_calls_have_a_column_where_a_method_stops_before_its_budget(summary):
    assert "calls" not in markdown_table(summary).splitlines()[0]
    stopped = [{**row, "ce_calls": 0.7 * row["budget"]} for row in summary]
    lines = markdown_table(stopped).splitlines()
    assert lines[0].startswith("| method | R | B | calls | recall@1 |")
    assert all(line.split(" | ")[3] == "14" for line in lines[2:] if line.split(" | ")[2] == "20")


def test_without_labels_there_is_no_accuracy():
    rows = summarize(evaluate_in_process(make_examination(labels=False, budgets=(20,), ks=(10,))))
    assert "accuracy" not in markdown_table(rows)

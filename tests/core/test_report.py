import io
import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from axn_ray.core.evaluation import EvaluationPlan, evaluate_in_process
from axn_ray.core.methods import METHODS
from axn_ray.core.report import draw_recall, markdown_table, save_figure, summarize, terminal_table
from tests.examinations import make_examination, small_rounds


@pytest.fixture(scope="module")
def table():
    return evaluate_in_process(make_examination(budgets=(20, 60), ks=(1, 10)))


@pytest.fixture(scope="module")
def summary(table):
    return summarize(table)


def test_the_summary_is_the_mean_over_all_queries_with_bounds(table, summary):
    assert len(summary) == len(METHODS) * 2 * 2
    assert json.loads(json.dumps(summary)) == summary
    row = next(r for r in summary if (r["method"], r["budget"], r["k"]) == ("RnR, DE", 60, 10))
    values = [r["recall"] for r in table.to_pylist() if (r["method"], r["budget"], r["k"]) == ("RnR, DE", 60, 10)]
    assert row["n_queries"] == len(values) == 6
    assert row["recall"] == pytest.approx(np.mean(values))
    assert row["recall_low"] < row["recall"] < row["recall_high"]
    assert row["ce_calls"] == 60
    assert {"accuracy", "accuracy_low", "ndcg_at_10", "ndcg_at_10_high"} <= row.keys()


def test_the_summary_keeps_the_plans_order_and_is_reproducible(table, summary):
    methods = list(dict.fromkeys(row["method"] for row in summary))
    assert methods == [method.name for method in small_rounds()]
    assert summarize(table) == summary


def test_without_labels_only_recall_is_reported():
    rows = summarize(evaluate_in_process(make_examination(labels=False, budgets=(20,), ks=(10,))))
    assert "recall" in rows[0] and "accuracy" not in rows[0]
    assert "accuracy" not in markdown_table(rows)


def test_the_markdown_table_has_a_line_per_method_and_budget_and_marks_the_best(summary):
    lines = markdown_table(summary).splitlines()
    assert lines[0] == "| method | R | B | recall@1 | recall@10 | accuracy | nDCG@10 |"
    assert len(lines) == 2 + len(METHODS) * 2
    assert all(line.count("|") == 8 for line in lines)
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


def test_the_figure_has_a_panel_per_k_and_a_line_per_method(summary):
    figure = draw_recall(summary, "synthetic")
    assert [axes.get_title() for axes in figure.axes] == ["recall@1", "recall@10"]
    for axes in figure.axes:
        assert len(axes.lines) == len(axes.collections) == len(METHODS)
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == len(METHODS)
    assert len(figure.legends[0].get_texts()) == len(METHODS)


def test_a_method_with_several_rounds_is_one_line():
    examination = make_examination(budgets=(20,), ks=(10,))
    ridge, rnr = small_rounds()[-1], small_rounds()[1]
    plan = EvaluationPlan((rnr, *(replace(ridge, rounds=number) for number in (2, 10, 5))), (20,), (10,))
    summary = summarize(evaluate_in_process(replace(examination, plan=plan)))

    def labels(rounds):
        return [line.get_label() for line in draw_recall(summary, "synthetic", rounds).figure.axes[0].lines]

    assert labels(5) == ["RnR, DE", "AXN ridge, MF_Ind, R=5"]
    assert labels(10) == labels(7) == ["RnR, DE", "AXN ridge, MF_Ind, R=10"]
    styles = [line.get_linestyle() for line in draw_recall(summary, "synthetic").axes[0].lines]
    assert styles == ["--", "-"]


def test_the_same_figure_gives_the_same_bytes(summary, tmp_path):
    written = [save_figure(draw_recall(summary, "synthetic"), tmp_path / name) for name in ("a", "b")]
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in written[0]] == ["a.png", "a.svg"]
    assert b"<dc:date>" not in written[0][1].read_bytes()

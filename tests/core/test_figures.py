import re
from dataclasses import replace

import numpy as np
import pytest

from axn_ray.core.comparison import STOPS, summarize
from axn_ray.core.evaluation import EvaluationPlan, evaluate_in_process
from axn_ray.core.figures import (
    MOST_LINES,
    choose_lines,
    draw_calls_saved,
    draw_pareto,
    draw_recall,
    draw_reliability,
    draw_wins,
    save_figure,
    to_inline_svg,
)
from tests.examinations import make_examination, small_rounds

BASELINE = ("RnR, DE", 1)


@pytest.fixture(scope="module")
def table():
    return evaluate_in_process(make_examination(budgets=(20, 60), ks=(1, 10)))


@pytest.fixture(scope="module")
def summary(table):
    return summarize(table, baseline=BASELINE)


def test_the_figure_has_a_panel_per_k_and_a_line_per_method(summary):
    figure = draw_recall(summary, "synthetic")
    assert [axes.get_title() for axes in figure.axes] == ["recall@1", "recall@10"]
    for axes in figure.axes:
        assert len(axes.lines) == len(axes.collections) == MOST_LINES
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == MOST_LINES
    assert len(figure.legends[0].get_texts()) == MOST_LINES


def test_the_best_methods_and_the_baseline_are_drawn(summary):
    chosen = choose_lines(summary, BASELINE)
    assert BASELINE in chosen and len(chosen) == MOST_LINES
    means = {method: np.mean([r["recall"] for r in summary if r["method"] == method[0]]) for method in choose_lines(summary)}
    dropped = {row["method"] for row in summary} - {name for name, _ in means}
    assert min(means.values()) >= max(np.mean([r["recall"] for r in summary if r["method"] == name]) for name in dropped)


def test_the_calls_figure_has_a_point_where_the_recall_is_reached(summary):
    figure = draw_calls_saved(summary, BASELINE)
    top = {row["k"]: row["recall"] for row in summary if (row["method"], row["budget"]) == (BASELINE[0], 60)}
    for axes, k in zip(figure.axes, (1, 10), strict=True):
        assert axes.get_title() == f"recall@{k}"
        for line in axes.lines[:-1]:
            name = line.get_label().split(", R=")[0]
            reached = max(row["recall"] for row in summary if (row["method"], row["k"]) == (name, k)) >= top[k]
            assert (60.0 in line.get_xdata()) == reached


def test_the_pareto_figure_joins_what_no_other_beats(summary):
    for axes, budget in zip(draw_pareto(summary, 10, BASELINE).figure.axes, (20, 60), strict=True):
        steps = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
        rows = [row for row in summary if (row["method"], row["rounds"]) in choose_lines(summary, BASELINE)]
        priced = [row for row in rows if (row["budget"], row["k"]) == (budget, 10) and row["index_ce_calls"] is not None]
        assert len(steps.get_xdata()) == len(priced)
        assert steps.get_ydata()[-1] == pytest.approx(100 * max(row["recall"] for row in priced))


def test_wins_and_losses_are_counted_by_query(table):
    figure = draw_wins(table, ("AXN ridge, MF_Ind", 4), BASELINE, 10)
    rows = table.to_pylist()
    for axes, budget in zip(figure.axes, (20, 60), strict=True):
        ours, theirs = (
            {r["query_id"]: r["recall"] for r in rows if (r["method"], r["budget"], r["k"]) == (name, budget, 10)}
            for name in ("AXN ridge, MF_Ind", "RnR, DE")
        )
        won = sum(ours[query] > theirs[query] for query in ours)
        lost = sum(ours[query] < theirs[query] for query in ours)
        assert axes.get_title() == f"B={budget}: {won} won, {6 - won - lost} even, {lost} lost"
        assert len(axes.collections[0].get_offsets()) == 6


def test_the_reliability_figure_sets_what_was_found_against_what_was_asked():
    examination = make_examination()
    bayes = next(method for method in small_rounds() if method.name == "AXN bayes")
    named = {target: f"AXN bayes{STOPS}{target:.0%}" for target in (0.5, 0.9)}
    stopping = [replace(bayes, name=name, target_recall=target) for target, name in named.items()]
    plan = EvaluationPlan((bayes, *stopping), (40, 60), (1, 10))
    summary = summarize(evaluate_in_process(replace(examination, plan=plan)))
    cells = {(row["method"], row["budget"], row["k"]): row for row in summary}
    assert {row["target_recall"] for row in summary if row["k"] == 1} == {None}
    assert all(cells[name, 60, 10]["target_recall"] == target for target, name in named.items())
    assert all(cells[name, 60, 10]["ce_calls"] <= 60 for name in named.values())
    achieved, spent = draw_reliability(summary).figure.axes
    line = next(line for line in achieved.lines if line.get_label() == "at most 60 calls")
    assert line.get_xdata().tolist() == [50, 90]
    np.testing.assert_allclose(line.get_ydata(), [100 * cells[named[t], 60, 10]["recall"] for t in (0.5, 0.9)])
    np.testing.assert_allclose(spent.lines[1].get_ydata(), [cells[named[t], 60, 10]["ce_calls"] for t in (0.5, 0.9)])
    assert choose_lines(summary) == [("AXN bayes", 4)]


def test_an_inline_figure_takes_the_pages_colour_and_keeps_its_ids_apart(summary):
    first, second = (to_inline_svg(draw_recall(summary, "synthetic"), name) for name in ("a", "b"))
    assert first.startswith("<svg") and "currentColor" in first and "#010203" not in first
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'href="#([^"]+)"', first)) | set(re.findall(r"url\(#([^)]+)\)", first))
    assert used and used <= ids[0]
    assert to_inline_svg(draw_recall(summary, "synthetic"), "a") == first


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

import json
import re
from html.parser import HTMLParser

import ir_measures
import numpy as np
import pyarrow.parquet
import pytest

from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.comparison import summarize
from axn_ray.core.evaluation import evaluate_in_process
from axn_ray.core.evaluation_store import Evaluation, load_evaluation, write_evaluation, write_runs
from axn_ray.errors import ArtifactError
from tests.examinations import make_examination

ITEM_IDS = tuple(f"item-{i}" for i in range(300))


@pytest.fixture(scope="module")
def examination():
    return make_examination(budgets=(20, 60), ks=(1, 10))


def write(folder, examination, baseline=("RnR, DE", 1)):
    table = evaluate_in_process(examination)
    config = {"baseline_at": baseline, "note": "<script>alert(1)</script>"}
    counts = {"items": 300, "rows": table.num_rows, "exact_accuracy": 0.0, "ce_calls_per_second": 1234.5}
    manifest = Manifest(kind="evaluation", config=config, counts=counts, made_from={})
    evaluation = Evaluation(table, summarize(table, baseline=baseline), manifest)
    with new_artifact(folder, manifest) as aside:
        write_evaluation(aside, evaluation)
        write_runs(aside / "runs", table, examination.exact, ITEM_IDS)
    return evaluation


@pytest.fixture(scope="module")
def written(examination, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    return folder, write(folder, examination)


def test_an_evaluation_is_read_back(written):
    folder, evaluation = written
    loaded = load_evaluation(folder)
    assert loaded.table.equals(evaluation.table)
    assert (loaded.summary, loaded.baseline) == (evaluation.summary, ("RnR, DE", 1))
    assert json.loads((folder / "summary.json").read_text()) == evaluation.summary
    assert pyarrow.parquet.read_table(folder / "rows.parquet").num_rows == evaluation.table.num_rows
    with pytest.raises(ArtifactError, match="no manifest.json"):
        load_evaluation(folder / "runs")


def test_the_runs_give_the_recall_back_by_ir_measures(written, examination):
    folder, evaluation = written
    cells = {(row["method"], row["rounds"], row["budget"]) for row in evaluation.summary}
    assert len(list((folder / "runs").iterdir())) == len(cells)
    best = {q: np.argsort(-row)[:10] for q, row in zip(examination.exact.query_ids, examination.exact.scores, strict=True)}
    qrels = [ir_measures.Qrel(q, ITEM_IDS[item], 1) for q, items in best.items() for item in items]
    for name, slug in (("RnR, DE", "rnr_de-r1"), ("AXN pinv λ=0.5, MF_Ind", "axn_pinv_0.5_mf_ind-r4")):
        run = list(ir_measures.read_trec_run(str(folder / "runs" / f"{slug}-b60.run.gz")))
        recall = ir_measures.calc_aggregate([ir_measures.R @ 10], qrels, run)[ir_measures.R @ 10]
        row = next(r for r in evaluation.summary if (r["method"], r["budget"], r["k"]) == (name, 60, 10))
        assert recall == pytest.approx(row["recall"])


def test_ids_with_blanks_give_no_runs_and_a_sentence(examination, tmp_path, caplog):
    write_runs(tmp_path / "runs", evaluate_in_process(examination), examination.exact, ("a b", *ITEM_IDS[1:]))
    assert not (tmp_path / "runs").exists()
    assert "the id 'a b' is empty or has a blank" in caplog.text


class Page(HTMLParser):
    """The tags that a page opens, and the addresses that it would fetch from."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.fetched = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.opened.append(tag)
        self.fetched += [v for name, v in attrs if name in ("src", "href", "xlink:href") and not v.startswith("#")]


def test_the_page_holds_everything_and_fetches_nothing(written):
    folder, evaluation = written
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == [] and "script" not in page.opened and "link" not in page.opened
    assert not re.search(r"@import|url\((?!#)", text)
    assert page.opened.count("svg") == 4
    assert "&lt;script&gt;" in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    for row in evaluation.summary:
        assert row["method"] in text
    assert "1,234 CE calls a second" in text
    assert "To find 80 % of the exact top 10" in text or "No method" in text


def test_an_evaluation_that_chose_compares_and_advises_nothing(examination, tmp_path):
    write(tmp_path / "dev", examination, baseline=None)
    text = (tmp_path / "dev" / "report.html").read_text(encoding="utf-8")
    assert Page(text).opened.count("svg") == 1
    assert "dev queries" in text and "In plain words" not in text and "Gains over" not in text

import json
from dataclasses import replace

import numpy as np
import pytest

from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus, save_embedded_corpus
from axn_ray.core.evaluation_store import load_evaluation
from axn_ray.core.fitting import FactorizationConfig
from axn_ray.core.score_store import load_scores
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
from axn_ray.distributed.factorize import factorize_scores
from axn_ray.distributed.score import ScoreConfig, score
from axn_ray.distributed.truth import calls_per_second, check_split
from axn_ray.errors import ArtifactError, InputError

SCORER = "python:tests.distributed.scorers:Slow"
PLAN = {"cross_encoder": SCORER, "budgets": [10, 20], "k": [1, 5], "rounds": [2, 4], "methods": ["rnr_de", "tour_de", "ladr_de"]}


@pytest.fixture(scope="module")
def corpus():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((100, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = Items(tuple(f"i{n}" for n in range(88)), ("",) * 88, tuple(f"item {n}" for n in range(88)))
    ids, texts, labels = (tuple(f"{what}{n}" for n in range(12)) for what in ("q", "query ", "i"))
    queries = Queries(ids, texts, labels)
    return EmbeddedCorpus(items, queries, ("train", "dev", "test") * 4, vectors[:88], vectors[88:], "given")


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("examine")
    described = {"items": corpus.items.fingerprint, "queries": corpus.queries.fingerprint}
    manifest = Manifest(kind="embeddings", config={"dual_encoder": "given"}, counts={}, made_from=described)
    with new_artifact(folder / "embeddings", manifest) as aside:
        save_embedded_corpus(aside, corpus)
    return folder


@pytest.fixture(scope="module")
def truth(ray_session, corpus, folder):
    """Exact scores of the test queries, which no test changes."""
    score(corpus, ScoreConfig(cross_encoder=SCORER, split="test", choice="all"), folder / "truth")
    return folder / "truth"


def test_settings_are_chosen_on_dev_queries_and_judged_on_test_queries(ray_session, folder):
    embeddings = folder / "embeddings"
    tried = examine(EvaluateConfig(**PLAN, choose=True), embeddings, None, {}, folder / "dev")
    assert load_scores(folder / "dev_truth").query_ids == ("q1", "q4", "q7", "q10")
    choice = json.loads((folder / "dev" / "choice.json").read_text())
    assert choice["queries"] == ["q1", "q4", "q7", "q10"]
    assert set(choice["settings"]) == {"tour_de", "ladr_de"}
    means = {}
    for row in tried:
        means.setdefault((row["method"], row["rounds"]), []).append(row["recall"])
    won = choice["settings"]["tour_de"]
    named = f"TouR, DE (learning_rate={won['learning_rate']:g}, temperature={won['temperature']:g})"
    best = max(np.mean(recalls) for (name, _), recalls in means.items() if name.startswith("TouR"))
    assert np.mean(means[named, won["rounds"]]) == pytest.approx(best)

    # Half of the test truth is there already, as known scores; `--max-queries` keeps three of its four queries.
    score(load(folder), ScoreConfig(cross_encoder=SCORER, split="test", choice="all", n_queries=2), folder / "half")
    plan = EvaluateConfig(**PLAN, max_queries=3, known_scores=[str(folder / "half")])
    judged = examine(plan, embeddings, None, {}, folder / "test", choice=folder / "dev")
    assert {row["n_queries"] for row in judged} == {3}
    assert {row["method"]: row["rounds"] for row in judged}["TouR, DE"] == won["rounds"]
    sealed = json.loads((folder / "test_truth" / "manifest.json").read_text())["counts"]
    assert (sealed["pairs"], sealed["n_queries"]) == (3 * 88, 3) and sealed["known"] >= 88
    evaluation = load_evaluation(folder / "test")
    assert evaluation.baseline == ("RnR, DE", 1)
    assert evaluation.manifest.config["settings"] == choice["settings"]
    assert evaluation.manifest.counts["ce_calls_per_second"] == pytest.approx(calls_per_second(folder / "test_truth"))
    assert (folder / "test" / "report.html").is_file() and any((folder / "test" / "runs").iterdir())


def load(folder):
    return load_embedded_corpus(folder / "embeddings")


def test_the_splits_are_held_apart(folder, truth):
    embeddings, small = folder / "embeddings", {**PLAN, "methods": ["rnr_de"], "budgets": [4]}
    score(load(folder), ScoreConfig(cross_encoder=SCORER, split="dev", choice="all"), folder / "truth of dev")
    with pytest.raises(InputError, match="holds 4 dev queries, methods are judged on test queries; score --split test, or add"):
        examine(EvaluateConfig(**small), embeddings, folder / "truth of dev", {}, folder / "none")
    with pytest.raises(InputError, match="holds 4 test queries, settings are chosen on dev queries; score --split dev, or drop"):
        examine(EvaluateConfig(**small, choose=True), embeddings, truth, {}, folder / "none")
    examine(EvaluateConfig(**small, choose=True), embeddings, folder / "truth of dev", {}, folder / "chosen")
    with pytest.raises(InputError, match="exclude each other; choose on dev queries, judge on test queries"):
        plan = EvaluateConfig(**small, choose=True)
        examine(plan, embeddings, folder / "truth of dev", {}, folder / "none", choice=folder / "chosen")
    other = ScoreConfig(cross_encoder="python:tests.distributed.scorers:Fast", split="test", choice="all")
    score(load(folder), other, folder / "other")
    with pytest.raises(ArtifactError, match="was made from other cross_encoder"):
        examine(EvaluateConfig(**small), embeddings, folder / "other", {}, folder / "none", choice=folder / "chosen")
    assert not (folder / "none").exists()


def test_only_the_right_split_is_looked_at():
    with pytest.raises(InputError, match="holds 1 train queries"):
        check_split(["test", "train"], EvaluateConfig())
    check_split(["test", "test"], EvaluateConfig())
    check_split(["dev"], EvaluateConfig(choose=True))


def save(corpus, folder):
    described = {"dual_encoder": corpus.dual_encoder}
    with new_artifact(folder, Manifest(kind="embeddings", config=described, counts={}, made_from={})) as aside:
        save_embedded_corpus(aside, corpus)
    return folder


def test_queries_that_the_corpus_lacks_or_has_with_another_text_are_refused(corpus, truth, tmp_path):
    for ids, texts, message in (
        (corpus.queries.ids, tuple(f"other {n}" for n in range(12)), "the text of query 'q2' has changed since it was scored"),
        (tuple(f"x{n}" for n in range(12)), corpus.queries.texts, "the scores hold query 'q2', the embeddings do not"),
    ):
        other = save(replace(corpus, queries=Queries(ids, texts)), tmp_path / f"embeddings {ids[0]}")
        with pytest.raises(ArtifactError, match=message):
            examine(EvaluateConfig(**PLAN), other, truth, {}, tmp_path / "out")


def test_what_may_not_be_overwritten_is_named_before_anything_is_scored(folder, tmp_path):
    with pytest.raises(ArtifactError, match="holds a embeddings artifact, not an older evaluation artifact"):
        examine(EvaluateConfig(**PLAN), folder / "embeddings", None, {}, folder / "embeddings")
    assert not (folder / "embeddings_truth").exists()


def test_a_factorization_over_another_dual_encoder_is_refused_and_of_another_cross_encoder_named(
    ray_session, folder, corpus, tmp_path, caplog
):
    train = ScoreConfig(cross_encoder="python:tests.distributed.scorers:Fast", per_query=20, active_share=0.0)
    score(corpus, train, tmp_path / "scores")
    config = FactorizationConfig(views=[], lexical=False, epochs=1)
    factorize_scores(folder / "embeddings", tmp_path / "scores", config, tmp_path / "bayes")
    plan = EvaluateConfig(**(PLAN | {"methods": ["axn_bayes"]}))
    examine(plan, folder / "embeddings", None, {"bayes": tmp_path / "bayes"}, tmp_path / "out")
    assert "was fitted to the scores of another cross-encoder" in caplog.text
    other = save(replace(corpus, dual_encoder="taught"), tmp_path / "embeddings")
    with pytest.raises(ArtifactError, match="was made from other dual_encoder .given. than the given ones .taught."):
        examine(plan, other, tmp_path / "out_truth", {"bayes": tmp_path / "bayes"}, tmp_path / "out")


def test_shards_that_do_not_say_how_long_they_took_give_no_speed(tmp_path):
    (tmp_path / "shards").mkdir()
    assert calls_per_second(tmp_path) is None
    shards = {"rows": 9}, {"rows": 100, "known": 40, "seconds": 3.0}, {"rows": 40, "known": 0, "seconds": 1.0}
    for number, facts in enumerate(shards):
        (tmp_path / "shards" / f"part-{number:05d}.json").write_text(json.dumps(facts))
    assert calls_per_second(tmp_path) == 25.0

import json

import numpy as np
import pytest

from axn_ray.core.artifact import Manifest, new_artifact
from axn_ray.core.corpus import Items, Queries
from axn_ray.core.embedded_corpus import EmbeddedCorpus, load_embedded_corpus, save_embedded_corpus
from axn_ray.core.evaluation_store import load_evaluation
from axn_ray.core.score_store import load_scores
from axn_ray.distributed.evaluate import EvaluateConfig
from axn_ray.distributed.examine import examine
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


def test_the_splits_are_held_apart(ray_session, folder):
    embeddings, small = folder / "embeddings", {**PLAN, "methods": ["rnr_de"], "budgets": [4]}
    for split in ("dev", "test"):
        score(load(folder), ScoreConfig(cross_encoder=SCORER, split=split, choice="all"), folder / split / "scores")
    with pytest.raises(InputError, match="holds 4 dev queries, methods are judged on test queries; score --split test, or add"):
        examine(EvaluateConfig(**small), embeddings, folder / "dev/scores", {}, folder / "none")
    with pytest.raises(InputError, match="holds 4 test queries, settings are chosen on dev queries; score --split dev, or drop"):
        examine(EvaluateConfig(**small, choose=True), embeddings, folder / "test/scores", {}, folder / "none")
    examine(EvaluateConfig(**small, choose=True), embeddings, folder / "dev/scores", {}, folder / "chosen")
    with pytest.raises(InputError, match="exclude each other; choose on dev queries, judge on test queries"):
        plan = EvaluateConfig(**small, choose=True)
        examine(plan, embeddings, folder / "dev/scores", {}, folder / "none", choice=folder / "chosen")
    other = ScoreConfig(cross_encoder="python:tests.distributed.scorers:Fast", split="test", choice="all")
    score(load(folder), other, folder / "other")
    with pytest.raises(ArtifactError, match="was made from other cross_encoder"):
        examine(EvaluateConfig(**small), embeddings, folder / "other", {}, folder / "none", choice=folder / "chosen")
    assert not (folder / "none").exists()


def test_a_query_that_the_corpus_lacks_is_named(corpus):
    with pytest.raises(InputError, match="the exact scores know query 'zz', the corpus does not"):
        check_split(corpus, ("q2", "zz"), EvaluateConfig())
    with pytest.raises(InputError, match="holds 1 train queries"):
        check_split(corpus, ("q2", "q0"), EvaluateConfig())
    check_split(corpus, ("q2", "q5"), EvaluateConfig())
    check_split(corpus, ("q1",), EvaluateConfig(choose=True))


def test_shards_that_do_not_say_how_long_they_took_give_no_speed(tmp_path):
    (tmp_path / "shards").mkdir()
    assert calls_per_second(tmp_path) is None
    shards = {"rows": 9}, {"rows": 100, "known": 40, "seconds": 3.0}, {"rows": 40, "known": 0, "seconds": 1.0}
    for number, facts in enumerate(shards):
        (tmp_path / "shards" / f"part-{number:05d}.json").write_text(json.dumps(facts))
    assert calls_per_second(tmp_path) == 25.0
